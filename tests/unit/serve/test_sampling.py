"""Drawing tokens: frequencies, filters, and that a draw depends on its own request only."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.serve.sampling import SeededSampling, draw, filter_logits, uniform

DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])


def filtered(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0) -> torch.Tensor:
    """Of one row, in double precision."""
    row = logits.double()[None]
    return filter_logits(row, torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p]))[0]


def context(numbers: list[int], position: int = 7, **parameters: Any) -> Any:
    """What the sampler asks of Megatron's."""
    rows = len(numbers)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 0.0, **parameters}
    return SimpleNamespace(
        paused_request_count=0,
        total_request_count=rows,
        request_ids=torch.tensor(numbers, dtype=torch.int32),
        active_request_metadata={name: torch.tensor([value] * rows) for name, value in defaults.items()},
        get_active_sequence_lengths=lambda: torch.full((rows,), position, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 0.0), (0.6, 0, 0.0), (1.0, 3, 0.0), (1.3, 0, 0.8), (0.8, 5, 0.9)]
)
def test_frequencies_are_those_of_the_filtered_softmax(temperature: float, top_k: int, top_p: float) -> None:
    seeds = {number: 1000 + number for number in range(DRAWS)}
    sampler = SeededSampling(seeds)
    asked = context(list(range(DRAWS)), temperature=temperature, top_k=top_k, top_p=top_p)
    rows = LOGITS.expand(DRAWS, -1)
    counts = torch.bincount(
        sampler.sample_kernel(rows, DRAWS, asked, no_top_k=False, no_top_p=False), minlength=len(LOGITS)
    ).double()
    expected = filtered(LOGITS, temperature, top_k, top_p).softmax(-1) * DRAWS
    kept = expected > 0
    assert not counts[~kept].any()
    chi_squared = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5  # about four standard deviations
    found = sampler.log_probs_kernel(rows[:1], context([0], temperature=temperature, top_k=top_k, top_p=top_p))[0]
    torch.testing.assert_close(found[kept].double().exp(), expected[kept] / DRAWS, rtol=1e-5, atol=0)


def test_filters_leave_what_transformers_leaves() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        logits = torch.randn(1, 40, generator=generator, dtype=torch.float64) * 3
        temperature, top_k, top_p = 0.3 + case % 7 / 3, case % 5 * 4, (case % 11) / 11
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p:
            expected = TopPLogitsWarper(top_p)(None, expected)
        torch.testing.assert_close(filtered(logits[0], temperature, top_k, top_p), expected[0])


def test_greedy_rows_take_the_likeliest_and_keep_the_models_log_probabilities() -> None:
    sampler = SeededSampling({})
    asked = context([4, 9], top_k=1)
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    assert sampler.sample_kernel(rows, 2, asked, no_top_k=False, no_top_p=True).tolist() == [0, 7]
    torch.testing.assert_close(sampler.log_probs_kernel(rows, asked), rows.log_softmax(-1))


def test_a_draw_does_not_depend_on_what_else_is_drawn() -> None:
    seeds = {number: number * 7919 for number in range(50)}
    sampler = SeededSampling(seeds)
    rows = torch.randn(50, 30, generator=torch.Generator().manual_seed(3))

    def sampled(numbers: list[int]) -> list[int]:
        asked = context(numbers, temperature=0.9, top_k=7, top_p=0.7)
        return sampler.sample_kernel(rows[numbers], len(numbers), asked, no_top_k=False, no_top_p=False).tolist()

    together = sampled(list(range(50)))
    assert [sampled([number])[0] for number in range(50)] == together
    assert sampled(list(reversed(range(50)))) == together[::-1]


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12), st.floats(0, 1, exclude_max=True))
def test_what_is_drawn_is_never_filtered_out(values: list[float], number: float) -> None:
    logits = filtered(torch.tensor(values), top_k=max(1, len(values) // 2))[None]
    token = int(draw(logits, torch.tensor([number], dtype=torch.float64)))
    assert torch.isfinite(logits[0, token])


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_place() -> None:
    seeds, places = (np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64))
    numbers = uniform(np.repeat(seeds, 300), np.tile(places, 300))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(set(numbers.tolist())) == len(numbers)
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    expected = len(numbers) / 100
    assert ((counts - expected) ** 2 / expected).sum() < 99 + 4 * (2 * 99) ** 0.5
    square = numbers.reshape(300, 300)
    assert abs(np.corrcoef(square[:, 0], square[:, 1])[0, 1]) < 0.25
    assert abs(np.corrcoef(square[0], square[1])[0, 1]) < 0.25
