"""The same weights divided among processes: the same ids and log-probabilities, with prompts of mixed lengths."""

from pathlib import Path

import pytest
import torch

from megatron_klong.serve.protocol import CompletionRequest
from tests.integration.serve.served import assert_log_probabilities, complete, greedy, prompts, serving

LAYOUTS = {
    "TP2": ["--layout.tensor_parallel", "2"],
    "EP2": ["--layout.expert_parallel", "2"],
    "PP2": ["--layout.pipeline_parallel", "2"],
    "DP2": [],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_divided_model_samples_as_transformers_does(weights: Path, reference: torch.nn.Module, layout: str) -> None:
    options = ["--step_tokens", "64", "--block_tokens", "16", "--kv_cache_gib", "0.005", *LAYOUTS[layout]]
    with serving(weights, *options, processes=2) as server:
        requests = [
            CompletionRequest(prompt_token_ids=prompt, max_tokens=most, temperature=0.0)
            for prompt, most in zip(prompts(1, 9, 40, 70, 150, 30), (24, 3, 20, 24, 24, 1), strict=True)
        ]
        # twice: the second time prompts are found in the cache, and more is in flight
        for request, completion in zip(
            requests * 3, complete(server, requests) + complete(server, requests * 2), strict=True
        ):
            assert list(completion.generation_token_ids) == greedy(
                reference, request.prompt_token_ids, request.max_tokens
            )
            assert_log_probabilities(reference, completion)
        seeded = [request.model_copy(update={"temperature": 0.8, "seed": 11 + n}) for n, request in enumerate(requests)]
        first, again = complete(server, seeded), complete(server, seeded)
        assert [one.generation_token_ids for one in first] == [one.generation_token_ids for one in again]
        for completion in first:
            assert_log_probabilities(reference, completion, 0.8)
