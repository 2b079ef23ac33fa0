"""Loss functions: log-probabilities and a batch in, sums over the trained tokens out.

A loss function never decides what is trained: the mask arrives final. It returns sums, not means; the train step
divides by the number of trained tokens of the *global* batch, so a token weighs the same in whichever row, micro-batch
or process it stands (tests/unit/train/test_loss.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_klong.data.batch import PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInput:
    """log_probs [rows, tokens] float32: natural logarithm of the probability of each label of the batch."""

    log_probs: torch.Tensor
    batch: PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """Sums over trained tokens. `loss_sum` carries the gradient; `metric_sums` are reported as means per token."""

    loss_sum: torch.Tensor  # [] float32
    trained_tokens: torch.Tensor  # [] int64
    metric_sums: Mapping[str, torch.Tensor] = field(default_factory=dict)  # each [] float32


class LossFunction(Protocol):
    """What the train step takes; the same metric names on every call."""

    def __call__(self, given: LossInput) -> LossOutput: ...


def cross_entropy(given: LossInput) -> LossOutput:
    """Supervised fine-tuning: minus the log-probability of every trained token."""
    mask = given.batch.loss_mask
    # where, not a product: an untrained position may hold an infinity, and 0 * inf is not a number
    losses = torch.where(mask, -given.log_probs, torch.zeros_like(given.log_probs))
    return LossOutput(loss_sum=losses.sum(), trained_tokens=mask.sum())


def cross_entropy_by_group(groups: int) -> LossFunction:
    """The same, reporting besides for each of so many groups of windows `group_loss/N` and `group_tokens/N`.

    Both are shares of the batch: their ratio is the mean loss of the group's trained tokens.
    """

    def loss(given: LossInput) -> LossOutput:
        output = cross_entropy(given)
        mask = given.batch.loss_mask
        chosen = given.batch.groups[mask]
        losses = torch.zeros(groups, device=mask.device).index_add_(0, chosen, -given.log_probs.detach()[mask])
        tokens = torch.bincount(chosen, minlength=groups).float()
        sums = {f"group_loss/{group}": losses[group] for group in range(groups)}
        sums |= {f"group_tokens/{group}": tokens[group] for group in range(groups)}
        return LossOutput(loss_sum=output.loss_sum, trained_tokens=output.trained_tokens, metric_sums=sums)

    return loss
