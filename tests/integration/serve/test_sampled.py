"""What the engine samples, by many tokens: that frequencies and log-probabilities are those of the model."""

from pathlib import Path

import pytest
import torch

from megatron_klong.serve.protocol import CompletionRequest
from tests.integration.serve.conftest import load_reference, random_weights
from tests.integration.serve.in_process import Trained, sample, sampling
from tests.integration.serve.served import VOCABULARY, assert_log_probabilities, prompts


def test_a_run_with_the_same_requests_gives_the_same_replies(weights: Path, trained: Trained) -> None:
    """Without seeds of their own they are sampled from the server's."""
    runs = []
    for seed in (5, 5, 6):
        with sampling(weights, trained, seed=seed) as engine:
            one_by_one = [
                sample(engine, [CompletionRequest(prompt_token_ids=prompt, max_tokens=20)]) for prompt in prompts(3, 9)
            ]
            runs.append([completion.generation_token_ids for [completion] in one_by_one])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0][:5] != runs[0][1][:5]


@pytest.mark.parametrize("draws", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_frequencies_are_those_of_the_model(
    weights: Path, trained: Trained, reference: torch.nn.Module, draws: int
) -> None:
    """Of one next token, after temperature, top_k and top_p together; the sampler alone: tests/unit/serve."""
    [prompt] = prompts(20, seed=8)
    request = CompletionRequest(prompt_token_ids=prompt, max_tokens=1, temperature=0.8, top_k=20, top_p=0.9)
    counts = torch.zeros(VOCABULARY)
    with sampling(weights, trained, max_requests=256) as engine:
        for _ in range(draws // 1000):
            for completion in sample(engine, [request] * 1000):
                counts[completion.generation_token_ids[0]] += 1
    with torch.no_grad():
        logits = reference(torch.tensor([list(prompt)])).logits[0, -1].double() / 0.8
    kept = logits.topk(20).indices
    share = logits[kept].softmax(-1)
    kept = kept[share.cumsum(-1) - share < 0.9]
    expected = logits[kept].softmax(-1) * counts.sum()
    assert counts.sum() == counts[kept].sum() == draws
    chi_squared = float(((counts[kept] - expected) ** 2 / expected).sum())
    assert chi_squared < len(kept) - 1 + 4 * (2 * (len(kept) - 1)) ** 0.5


def test_the_trainer_finds_the_same_log_probabilities(other_weights: Path, trained: Trained) -> None:
    """For 10,000 sampled tokens, with the model as training builds and calls it: the mismatch that RL logs."""
    lengths = [3, 30, 90, 140, 500] * 5
    requests = [CompletionRequest(prompt_token_ids=prompt, max_tokens=400) for prompt in prompts(*lengths, seed=12)]
    with sampling(other_weights, trained, max_sequence_length=1024, max_requests=25, kv_cache_gib=0.05) as engine:
        completions = sample(engine, requests)
    found = []
    for completion in completions:
        prompt = len(completion.prompt_token_ids)
        ids = torch.tensor([[*completion.prompt_token_ids, *completion.generation_token_ids]])
        with torch.no_grad():
            losses = trained.model(
                ids[:, :-1].contiguous(),
                torch.arange(ids.shape[1] - 1)[None],
                None,
                labels=ids[:, 1:].contiguous(),
            )
        found.append(-losses[0, prompt - 1 :].double())
    trainers = torch.cat(found)
    engines = torch.tensor([value for one in completions for value in one.generation_log_probs]).double()
    assert len(engines) == 10_000
    assert float((trainers - engines).abs().max()) < 1e-5
    assert float((trainers - engines).exp().mean()) == pytest.approx(1, abs=1e-4)


def test_queries_and_keys_with_norms_and_lengths_far_apart(trained: Trained, tmp_path: Path) -> None:
    """One request with a long context among many with short ones, so that they are not attended to as one."""
    weights = random_weights(tmp_path / "weights", seed=7, use_qk_norm=True)
    requests = [
        CompletionRequest(prompt_token_ids=prompt, max_tokens=12, seed=number)
        for number, prompt in enumerate(prompts(900, *range(1, 21), 300, seed=24))
    ]
    with sampling(weights, trained, max_sequence_length=1024, max_requests=24, kv_cache_gib=0.05) as engine:
        completions = sample(engine, requests)
    reference = load_reference(weights)
    for completion in completions:
        assert_log_probabilities(reference, completion)


def test_without_a_cache_nothing_is_found(weights: Path, trained: Trained) -> None:
    request = CompletionRequest(prompt_token_ids=(1,) * 100, max_tokens=3)
    with sampling(weights, trained, prefix_cache=False) as engine:
        assert [sample(engine, [request])[0].cached_tokens for _ in range(2)] == [0, 0]
