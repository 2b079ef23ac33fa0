"""What is read once is not read again, replies included; and what is found gives the tokens that reading it would."""

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_klong.serve.engine import MegatronEngine
from megatron_klong.serve.protocol import Completion, CompletionRequest
from tests.integration.serve.in_process import BLOCK, room_for, sample, sampling
from tests.integration.serve.served import VOCABULARY, assert_log_probabilities, greedy

LONGEST = 1024


@pytest.fixture(scope="module")
def engine(weights: Path) -> Iterator[MegatronEngine]:
    options = {"block_tokens": BLOCK, "step_tokens": 128, "max_requests": 8, "kv_cache_gib": 0.004}
    with sampling(weights, max_sequence_length=LONGEST, **options) as running:
        yield running


def random_ids(count: int, chosen: random.Random) -> tuple[int, ...]:
    return tuple(chosen.randrange(VOCABULARY) for _ in range(count))


def test_a_turn_reads_no_more_than_what_is_new_and_a_block(engine: MegatronEngine) -> None:
    chosen = random.Random(1)
    prompt = random_ids(70, chosen)
    new = len(prompt)
    for _ in range(50):
        request = CompletionRequest(prompt_token_ids=prompt, max_tokens=chosen.randint(1, 12))
        [completion] = sample(engine, [request])
        assert len(prompt) - completion.cached_tokens <= new + BLOCK
        added = random_ids(chosen.randint(1, 6), chosen)
        new = len(added) + 1  # and the last token of the reply, which was sampled but not read
        prompt = (*prompt, *completion.generation_token_ids, *added)
    [load] = engine.loads
    assert load.prefill_reused > 20 * load.prefill_computed


def test_what_was_found_in_the_cache_gives_what_reading_it_gives(
    engine: MegatronEngine, reference: torch.nn.Module
) -> None:
    """Episodes that share beginnings, many at once, in a cache too small for all of them."""
    chosen = random.Random(2)
    beginnings = [random_ids(length, chosen) for length in (30, 48, 100)]
    replies: list[Completion] = []

    async def episode(number: int) -> None:
        own = random.Random(number)
        prompt = beginnings[number % 3]
        for _ in range(6):
            request = CompletionRequest(
                prompt_token_ids=prompt, max_tokens=own.randint(4, 30), temperature=0.7, seed=number
            )
            reply = await engine.generate(request)
            replies.append(reply)
            prompt = (*prompt, *reply.generation_token_ids, *random_ids(own.randint(1, 9), own))

    async def play() -> None:
        await asyncio.gather(*(episode(number) for number in range(24)))

    asyncio.run(play())
    assert len(replies) == 24 * 6
    assert sum(reply.cached_tokens > 0 for reply in replies) > 60
    for reply in replies:
        assert_log_probabilities(reference, reply, 0.7)
    again = CompletionRequest(prompt_token_ids=replies[-1].prompt_token_ids, max_tokens=20, temperature=0.0)
    assert list(sample(engine, [again])[0].generation_token_ids) == greedy(reference, again.prompt_token_ids, 20)


def test_a_full_cache_takes_no_room_from_replies(weights: Path, reference: torch.nn.Module) -> None:
    """One request after another, many times what the cache holds; each goes on into blocks that must be given up."""
    chosen = random.Random(3)
    requests = [
        CompletionRequest(prompt_token_ids=random_ids(chosen.randint(1, 60), chosen), max_tokens=40, temperature=0.0)
        for _ in range(8)
    ]
    with sampling(weights, kv_cache_gib=room_for(8), max_sequence_length=8 * BLOCK) as engine:
        replies = [sample(engine, [request])[0] for request in requests]
        [load] = engine.loads
        assert load.blocks == 8
    for request, reply in zip(requests, replies, strict=True):
        assert list(reply.generation_token_ids) == greedy(reference, request.prompt_token_ids, 40)
        assert reply.num_evictions == 0


def test_where_all_need_a_block_at_once_and_share_theirs_somebody_goes_on(
    weights: Path, reference: torch.nn.Module
) -> None:
    """Two hold a block of their own behind the beginning that all share; to put off the others frees nothing."""
    chosen = random.Random(4)
    shared = random_ids(2 * BLOCK, chosen)
    prompts = [
        # read one step before the others, which wait for what they share, and so in need of a block at the same step
        (*shared, *random_ids(BLOCK - 1, chosen)),
        (*shared, *random_ids(BLOCK, chosen)),
        shared,
        shared,
    ]
    requests = [CompletionRequest(prompt_token_ids=prompt, max_tokens=4, temperature=0.0) for prompt in prompts]
    with sampling(weights, kv_cache_gib=room_for(4), max_sequence_length=4 * BLOCK) as engine:
        gate = threading.Event()
        engine._loop.call_soon_threadsafe(gate.wait)

        async def play() -> list[Completion]:
            asked = [asyncio.ensure_future(engine.generate(request)) for request in requests]
            await asyncio.sleep(0.1)
            gate.set()
            return await asyncio.gather(*asked)

        replies = asyncio.run(play())
    assert sum(reply.num_evictions for reply in replies) >= 3
    for request, reply in zip(requests, replies, strict=True):
        assert list(reply.generation_token_ids) == greedy(reference, request.prompt_token_ids, 4)
