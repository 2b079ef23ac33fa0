"""An engine beside a model that is trained in the same process: it takes its weights, and is not in its way."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig
from megatron_klong.serve import refit
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.engine import MegatronEngine
from megatron_klong.serve.interface import Progress
from megatron_klong.serve.protocol import Completion, CompletionRequest, RefitRefused
from tests.integration.serve.in_process import Trained, sample, sampling
from tests.integration.serve.served import (
    TOLERANCE,
    VOCABULARY,
    assert_log_probabilities,
    greedy,
    log_probabilities,
    prompts,
)


@pytest.fixture(scope="module")
def engine(weights: Path, trained: Trained) -> Iterator[MegatronEngine]:
    with sampling(weights, trained, max_sequence_length=1024, max_requests=4, step_tokens=64) as running:
        yield running


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
    engine: MegatronEngine, reference: torch.nn.Module, other_reference: torch.nn.Module
) -> None:
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
    engine: MegatronEngine, trained: Trained, other_reference: torch.nn.Module
) -> None:
    ids = torch.randint(0, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(2))
    sample(engine, [CompletionRequest(prompt_token_ids=(1, 2), max_tokens=2)])
    positions = torch.arange(29)[None]
    losses = trained.model(ids[:, :-1].contiguous(), positions, None, labels=ids[:, 1:].contiguous())
    with torch.no_grad():
        expected = torch.log_softmax(other_reference(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(-losses[0].detach(), expected, atol=TOLERANCE, rtol=0)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in trained.model.parameters())


def test_weights_that_cannot_be_taken_leave_those_that_are_served(
    engine: MegatronEngine, trained: Trained, other_reference: torch.nn.Module
) -> None:
    """As a whole: also those that were replaced before the fault; a request in flight goes on under them."""
    [prompt] = prompts(60, seed=22)
    sample(engine, [CompletionRequest(prompt_token_ids=prompt, max_tokens=1)])
    broken = trained.model.output_layer.weight
    assert isinstance(broken, torch.Tensor)
    kept = broken.detach().clone()

    async def play() -> Completion:
        before = engine.policy_epoch
        stream = engine.stream(CompletionRequest(prompt_token_ids=prompt, max_tokens=100, seed=5))
        await first_tokens(stream, 20)
        broken.data[3, 3] = torch.nan
        for parameter in trained.model.decoder.parameters():
            parameter.data.mul_(2)
        try:
            with pytest.raises(RefitRefused, match=rf"policy {before} is served on: .* not finite"):
                await engine.refit_from_trained()
        finally:
            broken.data.copy_(kept)
            for parameter in trained.model.decoder.parameters():
                parameter.data.div_(2)
        assert engine.policy_epoch == before
        return await rest(stream)

    completion = asyncio.run(play())
    assert len(completion.policy_epoch) == 1
    assert completion.cached_tokens > 0
    assert_log_probabilities(other_reference, completion)


def test_weights_of_another_shape_are_refused_before_any_is_sent(trained: Trained) -> None:
    other = build_model(trained.config.model_copy(update={"moe_intermediate_size": 64}), LayoutConfig())
    with pytest.raises(refit.RefitError, match=r"another model .*moe_ffn_hidden_size"):
        refit.replace_from_model(trained.model, other, group=distributed.group.WORLD)


def test_without_a_model_beside_there_are_no_weights_to_take(weights: Path) -> None:
    alone = MegatronEngine(ServeConfig(weights=str(weights)))
    with pytest.raises(RefitRefused, match="no model is trained"):
        asyncio.run(alone.refit_from_trained())
