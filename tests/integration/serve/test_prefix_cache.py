"""What is read once is not read again, replies included; and what is found gives the tokens that reading it would."""

import random
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import pytest
import torch

from megatron_klong.serve.client import Client
from megatron_klong.serve.protocol import Completion, CompletionRequest
from tests.integration.serve.served import VOCABULARY, Server, assert_log_probabilities, complete, greedy, serving

BLOCK = 16
LONGEST = 1024


@pytest.fixture(scope="module")
def server(weights: Path) -> Iterator[Server]:
    options = ["--block_tokens", str(BLOCK), "--kv_cache_gib", "0.02", "--step_tokens", "128", "--max_requests", "8"]
    with serving(weights, *options, limit=LONGEST) as running:
        yield running


def random_ids(count: int, chosen: random.Random) -> tuple[int, ...]:
    return tuple(chosen.randrange(VOCABULARY) for _ in range(count))


def test_a_turn_reads_no_more_than_what_is_new_and_a_block(server: Server) -> None:
    chosen = random.Random(1)
    prompt = random_ids(70, chosen)
    new = len(prompt)
    for _ in range(50):
        request = CompletionRequest(prompt_token_ids=prompt, max_tokens=chosen.randint(1, 12))
        [completion] = complete(server, [request])
        assert len(prompt) - completion.cached_tokens <= new + BLOCK
        added = random_ids(chosen.randint(1, 6), chosen)
        new = len(added) + 1  # and the last token of the reply, which was sampled but not read
        prompt = (*prompt, *completion.generation_token_ids, *added)
    computed, reused = (metric(server, f"klong_engine_prefill_{name}") for name in ("computed", "reused"))
    assert reused > 20 * computed


def test_what_was_found_in_the_cache_gives_what_reading_it_gives(server: Server, reference: torch.nn.Module) -> None:
    """Episodes that share beginnings, many at once, in a cache too small for all of them."""
    chosen = random.Random(2)
    beginnings = [random_ids(length, chosen) for length in (30, 48, 100)]
    replies: list[Completion] = []

    async def play() -> None:
        async with Client(server.url) as client, anyio.create_task_group() as group:

            async def episode(number: int) -> None:
                own = random.Random(number)
                prompt = beginnings[number % 3]
                for _ in range(6):
                    request = CompletionRequest(
                        prompt_token_ids=prompt, max_tokens=own.randint(4, 30), temperature=0.7, seed=number
                    )
                    reply = await client.complete(request)
                    replies.append(reply)
                    prompt = (*prompt, *reply.generation_token_ids, *random_ids(own.randint(1, 9), own))

            for number in range(24):
                group.start_soon(episode, number)

    anyio.run(play)
    assert len(replies) == 24 * 6
    assert sum(reply.cached_tokens > 0 for reply in replies) > 60
    for reply in replies:
        assert_log_probabilities(reference, reply, 0.7)
    again = CompletionRequest(prompt_token_ids=replies[-1].prompt_token_ids, max_tokens=20, temperature=0.0)
    assert list(complete(server, [again])[0].generation_token_ids) == greedy(reference, again.prompt_token_ids, 20)


def test_without_a_cache_nothing_is_found(weights: Path) -> None:
    with serving(weights, "--prefix_cache", "false", "--block_tokens", str(BLOCK), "--kv_cache_gib", "0.02") as server:
        request = CompletionRequest(prompt_token_ids=(1,) * 100, max_tokens=3)
        assert [complete(server, [request])[0].cached_tokens for _ in range(2)] == [0, 0]


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
