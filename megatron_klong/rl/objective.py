"""The policy loss as the train step takes it, and the log-probabilities that it is measured against."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from megatron_klong.data.batch import PackedBatch
from megatron_klong.rl.config import PolicyLossConfig
from megatron_klong.rl.losses import PolicyLossInput, policy_loss
from megatron_klong.train.loss import LossFunction, LossInput, LossOutput
from megatron_klong.train.optimizer import Training
from megatron_klong.train.step import forward_backward


def objective(config: PolicyLossConfig) -> LossFunction:
    """The loss of batches that hold advantages, weights, and log-probabilities of engine and trainer."""

    def loss(given: LossInput) -> LossOutput:
        batch = given.batch
        assert batch.old_log_probs is not None
        assert batch.advantages is not None
        assert batch.token_weights is not None
        output = policy_loss(
            PolicyLossInput(
                log_probs=given.log_probs,
                old_log_probs=batch.old_log_probs,
                advantages=batch.advantages,
                weights=batch.token_weights,
                loss_mask=batch.loss_mask,
                engine_log_probs=batch.rollout_log_probs,
                # minus the log-probability of what was sampled is an unbiased estimate; it needs no second pass
                # over the vocabulary
                entropies=-given.log_probs.detach(),
            ),
            config,
        )
        return LossOutput(
            loss_sum=output.loss_sum, trained_tokens=output.trained_tokens, metric_sums=output.metric_sums
        )

    return loss


def with_old_log_probs(training: Training, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """The batches with the log-probabilities that the present weights give: the ratio's denominator."""
    recorded: list[torch.Tensor] = []

    def record(given: LossInput) -> LossOutput:
        recorded.append(given.log_probs.detach().clone())
        return LossOutput(loss_sum=given.log_probs.sum(), trained_tokens=given.batch.loss_mask.sum())

    with torch.no_grad():
        forward_backward(training, batches, record, forward_only=True)
    if not recorded:  # not the last pipeline stage: it computes no loss
        return list(batches)
    return [replace(batch, old_log_probs=log_probs) for batch, log_probs in zip(batches, recorded, strict=True)]


def largest_mismatch(batches: Sequence[PackedBatch], device: torch.device) -> float:
    """Over all trained tokens of all processes: |log-probability by the trainer - by the engine|."""
    largest = torch.zeros((), device=device)
    for batch in batches:
        if batch.old_log_probs is not None and batch.rollout_log_probs is not None:
            moved = batch.to(device)
            difference = (moved.old_log_probs - moved.rollout_log_probs).abs()[moved.loss_mask]  # type: ignore[operator]
            largest = torch.maximum(largest, difference.max()) if difference.numel() else largest
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return float(largest)


@contextmanager
def tempered(chunks: Sequence[Any], temperature: float) -> Iterator[None]:
    """Log-probabilities of the distribution that was sampled from: logits divided by the temperature."""
    last = [chunk for chunk in chunks if chunk.post_process and temperature != 1.0]
    hooks = [
        chunk.output_layer.register_forward_hook(lambda _, __, output: (output[0] / temperature, *output[1:]))
        for chunk in last
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
