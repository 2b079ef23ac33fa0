"""Losses against numbers worked out by hand."""

import math

import pytest
import torch

from megatron_klong.data.batch import PackedBatch
from megatron_klong.train.loss import LossInput, cross_entropy, cross_entropy_by_group


def batch(mask: list[list[bool]], groups: list[list[int]] | None = None) -> PackedBatch:
    loss_mask = torch.tensor(mask)
    zeros = torch.zeros(loss_mask.shape, dtype=torch.int64)
    return PackedBatch(
        ids=zeros,
        positions=zeros,
        labels=zeros,
        loss_mask=loss_mask,
        groups=zeros if groups is None else torch.tensor(groups),
        padding_mask=torch.zeros_like(loss_mask),
        cu_seqlens=torch.tensor([0, loss_mask.numel()], dtype=torch.int32),
        longest_window_tokens=loss_mask.numel(),
    )


def test_cross_entropy_sums_over_trained_tokens_only() -> None:
    # probabilities 1/2, 1/4, 1/8, 1/16; the second and the fourth are trained: ln 4 + ln 16 = 6 ln 2
    log_probs = -math.log(2) * torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    output = cross_entropy(LossInput(log_probs=log_probs, batch=batch([[False, True, False, True]])))
    assert output.loss_sum.item() == pytest.approx(6 * math.log(2))
    assert output.trained_tokens.item() == 2


def test_the_gradient_is_minus_one_for_each_trained_token() -> None:
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    cross_entropy(LossInput(log_probs=log_probs, batch=batch([[True, False], [True, True]]))).loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-1.0, 0.0], [-1.0, -1.0]]


def test_two_halves_add_up_to_the_whole() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]])
    mask = [[True, True, False]]
    whole = cross_entropy(LossInput(log_probs=log_probs, batch=batch(mask)))
    halves = [
        cross_entropy(LossInput(log_probs=log_probs[:, n : n + 1], batch=batch([mask[0][n : n + 1]]))) for n in range(3)
    ]
    assert whole.loss_sum.item() == sum(half.loss_sum.item() for half in halves) == 3.0
    assert whole.trained_tokens.item() == sum(half.trained_tokens.item() for half in halves) == 2


def test_an_infinity_where_nothing_is_trained_does_no_harm() -> None:
    log_probs = torch.tensor([[-math.inf, -0.5]], requires_grad=True)
    output = cross_entropy(LossInput(log_probs=log_probs, batch=batch([[False, True]])))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.5
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[0.0, -1.0]]


def test_nothing_trained_is_a_loss_of_zero_over_zero_tokens() -> None:
    output = cross_entropy(LossInput(log_probs=torch.tensor([[-1.0]]), batch=batch([[False]])))
    assert (output.loss_sum.item(), output.trained_tokens.item()) == (0.0, 0)


def test_by_group_each_trained_token_counts_for_the_group_of_its_window() -> None:
    log_probs = -math.log(2) * torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    given = batch([[True, False, True, True, False]], [[0, 0, 2, 2, 1]])
    plain = cross_entropy(LossInput(log_probs=log_probs, batch=given))
    output = cross_entropy_by_group(3)(LossInput(log_probs=log_probs, batch=given))
    assert output.loss_sum.item() == plain.loss_sum.item()
    sums = {name: round(value.item() / math.log(2), 4) for name, value in output.metric_sums.items() if "loss" in name}
    assert sums == {"group_loss/0": 1.0, "group_loss/1": 0.0, "group_loss/2": 7.0}
    assert [output.metric_sums[f"group_tokens/{group}"].item() for group in range(3)] == [1, 0, 2]
