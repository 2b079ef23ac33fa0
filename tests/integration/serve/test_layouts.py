"""The same weights divided among processes: the same ids, log-probabilities and routes, prompts of mixed lengths."""

import pytest
import torch

from megatron_klong.serve.protocol import Completion
from tests.integration.serve.conftest import LAYOUTS, REQUESTS
from tests.integration.serve.served import assert_log_probabilities, assert_routes, greedy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_divided_model_samples_as_transformers_does(
    on_ranks: dict[str, list[list[Completion]]], reference: torch.nn.Module, layout: str
) -> None:
    first, more = on_ranks[layout]
    assert any(completion.cached_tokens for completion in more)
    count = len(REQUESTS)
    for request, completion in zip(REQUESTS * 3, first[:count] + more[:-count], strict=True):
        assert list(completion.generation_token_ids) == greedy(reference, request.prompt_token_ids, request.max_tokens)
        assert_log_probabilities(reference, completion)
        assert_routes(reference, completion)
    seeded, again = first[-count:], more[-count:]
    assert [one.generation_token_ids for one in seeded] == [one.generation_token_ids for one in again]
    for completion in seeded:
        assert_log_probabilities(reference, completion, 0.8)
