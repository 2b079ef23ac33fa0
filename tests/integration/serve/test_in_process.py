"""The engine without its front: beside a model that is trained, and step by step."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.serve import refit
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.engine import MegatronEngine
from megatron_klong.serve.interface import Progress
from megatron_klong.serve.protocol import Completion, CompletionRequest, RefitRefused
from megatron_klong.serve.replica import Replica
from tests.integration.serve.conftest import load_reference, random_weights
from tests.integration.serve.served import (
    TOLERANCE,
    VOCABULARY,
    assert_log_probabilities,
    greedy,
    log_probabilities,
    prompts,
)

SLOTS = 3


@dataclass(frozen=True, kw_only=True)
class Beside:
    """An engine that serves `weights`, and beside it a model that has `other_weights`."""

    engine: MegatronEngine
    trained: torch.nn.Module
    config: ModelConfig


@pytest.fixture(scope="module")
def beside(weights: Path, other_weights: Path) -> Iterator[Beside]:
    config, layout = ModelConfig.from_hugging_face(weights), LayoutConfig()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the machine has other tests to run
    initialize(layout, seed=0)
    trained = build_model(config, layout)
    load_hugging_face([trained], config, other_weights)
    settings = ServeConfig(
        weights=str(weights),
        max_sequence_length=1024,
        max_requests=SLOTS,
        block_tokens=16,
        step_tokens=64,
        kv_cache_gib=0.02,
    )
    engine = MegatronEngine(settings, trained=trained)
    engine.start()
    yield Beside(engine=engine, trained=trained, config=config)
    engine.stop()
    assert distributed.is_initialized(), "the trainer's groups stay"
    destroy()
    torch.set_num_threads(threads)


async def first_tokens(stream: AsyncIterator[Progress | Completion], count: int) -> None:
    async for _ in stream:
        count -= 1
        if not count:
            return


async def rest(stream: AsyncIterator[Progress | Completion]) -> Completion:
    async for part in stream:
        if isinstance(part, Completion):
            return part
    raise AssertionError("a reply without an end")


def test_a_running_engine_takes_the_weights_of_the_model_trained_beside(
    beside: Beside, reference: torch.nn.Module, other_reference: torch.nn.Module
) -> None:
    engine = beside.engine
    [prompt, cached] = prompts(40, 150, seed=21)
    request = CompletionRequest(prompt_token_ids=prompt, max_tokens=200, seed=3)
    found = CompletionRequest(prompt_token_ids=cached, max_tokens=12, temperature=0.0)

    async def play() -> tuple[Completion, list[Completion]]:
        before = [await engine.generate(found) for _ in range(2)]
        stream = engine.stream(request)
        await first_tokens(stream, 30)
        reply = await engine.refit_from_trained()
        assert (reply.policy_epoch, engine.policy_epoch) == (1, 1)
        return await rest(stream), [*before, await engine.generate(found), await engine.generate(found)]

    completion, [_, warm, anew, again] = asyncio.run(play())
    [(start, first), (boundary, second)] = completion.policy_epoch
    assert (start, first, second) == (0, 0, 1)
    assert len(prompt) + 30 <= boundary < len(prompt) + 200
    assert completion.kv_cache_epoch == ((0, 1),)  # all of it was read anew
    sampled_before = boundary - len(prompt)
    own = torch.tensor(completion.generation_log_probs)
    for model, part in ((reference, slice(0, sampled_before)), (other_reference, slice(sampled_before, 200))):
        torch.testing.assert_close(own[part], log_probabilities(model, completion)[part], atol=TOLERANCE, rtol=0)
    # what the old weights read is not found again; what the new ones read is
    assert warm.cached_tokens > 100
    assert anew.cached_tokens == 0
    assert again.cached_tokens > 100
    assert list(warm.generation_token_ids) == greedy(reference, cached, 12)
    assert list(anew.generation_token_ids) == list(again.generation_token_ids) == greedy(other_reference, cached, 12)


def test_the_model_beside_is_trained_as_if_there_were_no_engine(
    beside: Beside, other_reference: torch.nn.Module
) -> None:
    ids = torch.randint(0, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(2))
    asyncio.run(beside.engine.generate(CompletionRequest(prompt_token_ids=(1, 2), max_tokens=2)))
    positions = torch.arange(29)[None]
    losses = beside.trained(ids[:, :-1].contiguous(), positions, None, labels=ids[:, 1:].contiguous())
    with torch.no_grad():
        expected = torch.log_softmax(other_reference(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(-losses[0].detach(), expected, atol=TOLERANCE, rtol=0)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in beside.trained.parameters())


def test_weights_that_cannot_be_taken_leave_those_that_are_served(
    beside: Beside, other_reference: torch.nn.Module
) -> None:
    """As a whole: also those that were replaced before the fault; a request in flight goes on under them."""
    engine = beside.engine
    [prompt] = prompts(60, seed=22)
    asyncio.run(engine.generate(CompletionRequest(prompt_token_ids=prompt, max_tokens=1)))
    broken = beside.trained.output_layer.weight
    assert isinstance(broken, torch.Tensor)
    kept = broken.detach().clone()

    async def play() -> Completion:
        before = engine.policy_epoch
        stream = engine.stream(CompletionRequest(prompt_token_ids=prompt, max_tokens=100, seed=5))
        await first_tokens(stream, 20)
        broken.data[3, 3] = torch.nan
        for parameter in beside.trained.decoder.parameters():
            parameter.data.mul_(2)
        try:
            with pytest.raises(RefitRefused, match=rf"policy {before} is served on: .* not finite"):
                await engine.refit_from_trained()
        finally:
            broken.data.copy_(kept)
            for parameter in beside.trained.decoder.parameters():
                parameter.data.div_(2)
        assert engine.policy_epoch == before
        return await rest(stream)

    completion = asyncio.run(play())
    assert len(completion.policy_epoch) == 1
    assert completion.cached_tokens > 0
    assert_log_probabilities(other_reference, completion)


def test_weights_of_another_shape_are_refused_before_any_is_sent(beside: Beside) -> None:
    other = build_model(beside.config.model_copy(update={"moe_intermediate_size": 64}), LayoutConfig())
    with pytest.raises(refit.RefitError, match=r"another model .*moe_ffn_hidden_size"):
        refit.replace_from_model(beside.trained, other, group=distributed.group.WORLD)


def test_without_a_model_beside_there_are_no_weights_to_take(weights: Path) -> None:
    alone = MegatronEngine(ServeConfig(weights=str(weights)))
    with pytest.raises(RefitRefused, match="no model is trained"):
        asyncio.run(alone.refit_from_trained())


def test_queries_and_keys_with_norms_and_lengths_far_apart(beside: Beside, tmp_path: Path) -> None:
    """One request with a long context among many with short ones, so that they are not attended to as one."""
    weights = random_weights(tmp_path / "weights", seed=7, use_qk_norm=True)
    settings = ServeConfig(
        weights=str(weights), max_sequence_length=1024, max_requests=24, block_tokens=16, kv_cache_gib=0.05
    )
    engine = MegatronEngine(settings, trained=beside.trained)  # so that it takes the groups that are there
    engine.start()
    requests = [
        CompletionRequest(prompt_token_ids=prompt, max_tokens=12, seed=number)
        for number, prompt in enumerate(prompts(900, *range(1, 21), 300, seed=24))
    ]

    async def play() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    completions = asyncio.run(play())
    engine.stop()
    reference = load_reference(weights)
    for completion in completions:
        assert_log_probabilities(reference, completion)


class Events:
    """What happens in the engine's thread, in order: who is told to end, and the steps that begin after that."""

    def __init__(self, engine: MegatronEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        """For each request that is told to end, how many steps began from then until it held nothing."""
        self.steps = 0
        told, steps, step = set[int](), Counter[int](), Replica.step

        async def counted(replica: Replica) -> list[Progress]:
            self.steps += 1
            steps.update(told)
            made = await step(replica)
            for number in told - replica._engine.requests.keys():
                told.remove(number)
                self.begun.append(steps.pop(number, 0))
            return made

        class Left(deque[Any]):
            def append(self, flight: Any) -> None:
                told.add(flight.number)
                super().append(flight)

        monkeypatch.setattr(Replica, "step", counted)
        monkeypatch.setattr(engine, "_left", Left())

    async def more(self, steps: int) -> None:
        """Wait until so many more have begun."""
        until = self.steps + steps
        while self.steps < until:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("state", ["sampled", "half read", "waiting"])
def test_who_is_cancelled_gives_up_the_place_within_one_step(
    beside: Beside, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """The step that is under way when the engine hears of it ends as it began, and the next is the last."""
    engine = beside.engine
    events = Events(engine, monkeypatch)
    endless = CompletionRequest(prompt_token_ids=(7,), max_tokens=1000)
    short = CompletionRequest(prompt_token_ids=(8,), max_tokens=1)

    async def play(steps: int) -> None:
        long = CompletionRequest(prompt_token_ids=prompts(950, seed=steps)[0], max_tokens=4)
        last = long if state == "half read" else endless
        running = [asyncio.ensure_future(engine.generate(one)) for one in [*[endless] * (SLOTS - 1), last]]
        await events.more(2 + steps)
        behind = asyncio.ensure_future(engine.generate(endless if state == "waiting" else short))
        await events.more(2)
        assert not behind.done()
        (behind if state == "waiting" else running[-1]).cancel()
        if state != "waiting":
            await behind  # it has got the place
        for one in running:
            one.cancel()
        await asyncio.gather(*running, behind, return_exceptions=True)

    for steps in range(5):
        asyncio.run(play(steps))
    asyncio.run(engine.generate(short))  # by now all have ended
    assert len(events.begun) == 5 * (SLOTS + (state == "waiting"))
    assert set(events.begun) == {1}
