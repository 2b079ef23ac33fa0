"""Log-probabilities of sampled tokens and the advantages of their rollouts -> the clipped policy loss, as sums.

    ratio  = exp(log_probs - old_log_probs)
    policy = -min(ratio * advantage, clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
    loss   = sum over trained tokens of weight * policy + kl_coefficient * kl

(reference: KLong, arXiv 2602.17547, progressive RL). `old_log_probs` are the trainer's own, computed again with the
weights the iteration began with: that policy is both the ratio's denominator and the anchor of the KL. What the engine
computed while sampling differs by kernels, expert routing and refits in mid-window: it serves the statistics of that
mismatch and, if wanted, a correction (the policy term times exp(old - engine), cut off at a clamp), nothing else.

As in megatron_klong.train.loss, sums are returned and the train step divides them by the trained tokens of the *global*
batch. `megatron_klong.rl.normalisation` makes of that division the one that was asked for.

The KL is the mean over trained tokens, whatever the normalisation: the paper's expectation over t.

Always (tests/unit/rl/test_losses.py): what the mask excludes has no influence, not even as an infinity or NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_klong.rl.config import KlEstimator, PolicyLossConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossInput:
    """Tokens of a micro-batch, all [tokens]; log-probabilities are natural logarithms, at the sampling temperature.

    Only the gradient of log_probs is used. Raises ValueError where shapes differ.
    """

    log_probs: torch.Tensor  # float32, of the policy in training
    old_log_probs: torch.Tensor  # float32, of the policy the iteration began with, by the trainer
    advantages: torch.Tensor  # float32
    weights: torch.Tensor  # float32, token_weights of each token's rollout
    loss_mask: torch.Tensor  # bool, final: nothing here decides what is trained
    engine_log_probs: torch.Tensor | None = None  # float32, recorded when the token was sampled
    entropies: torch.Tensor | None = None  # float32, nats, of the policy in training

    def __post_init__(self) -> None:
        for name in ("log_probs", "old_log_probs", "advantages", "weights", "engine_log_probs", "entropies"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.loss_mask.shape:
                raise ValueError(
                    f"{name} {list(tensor.shape)} and loss_mask {list(self.loss_mask.shape)} must be equal"
                )
        if self.loss_mask.dtype != torch.bool:
            raise ValueError(f"loss_mask is {self.loss_mask.dtype}, must be bool: weights have a tensor of their own")


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossOutput:
    """Sums over trained tokens. `loss_sum` carries the gradient; `metric_sums` are reported as means per token."""

    loss_sum: torch.Tensor  # [] float32
    trained_tokens: torch.Tensor  # [] int64
    metric_sums: Mapping[str, torch.Tensor]  # each [] float32, without gradient


def policy_loss(given: PolicyLossInput, config: PolicyLossConfig) -> PolicyLossOutput:
    """The loss of a micro-batch and what to watch about it."""
    log_ratio = _masked(given.log_probs - given.old_log_probs.detach(), given.loss_mask)
    advantages = _masked(given.advantages, given.loss_mask).detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_epsilon, 1 + config.clip_epsilon)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    kl = kl_to_old(log_ratio, config.kl_estimator)
    metrics = {
        "ratio": ratio,
        "clip_fraction": (clipped * advantages < ratio * advantages).float(),
        "kl": kl,
    }
    if given.engine_log_probs is not None:
        metrics |= _mismatch(given.old_log_probs - given.engine_log_probs, given.loss_mask)
    if config.truncated_importance_clamp is not None:
        weight = _importance_weight(given, config.truncated_importance_clamp)
        gain = gain * weight
        metrics["importance_weight"] = weight
        metrics["importance_truncated"] = (weight >= config.truncated_importance_clamp).float()
    if given.entropies is not None:
        metrics["entropy"] = given.entropies
    weights = _masked(given.weights, given.loss_mask).detach()
    loss = -weights * gain + config.kl_coefficient * kl
    return PolicyLossOutput(
        loss_sum=_masked(loss, given.loss_mask).sum(),
        trained_tokens=given.loss_mask.sum(),
        metric_sums={name: _masked(value.detach(), given.loss_mask).sum() for name, value in metrics.items()},
    )


def kl_to_old(log_ratio: torch.Tensor, estimator: KlEstimator) -> torch.Tensor:
    """KL(policy || old policy) estimated at each token; log_ratio [tokens] = log policy - log old. At least 0, 0 at 0.

    The tokens were sampled by the old policy. "exact": r log r - (r - 1) has the divergence as its expectation under
    that policy, and its gradient too. "k3": 1/r - 1 + log r, as in GRPO, would be so under the new policy, and
    is so to second order in the log-ratio only. Neither sums over the vocabulary.
    """
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)


def _mismatch(log_ratio: torch.Tensor, loss_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Trainer against engine on the same weights; mismatch_kl estimates KL(engine || trainer): the engine sampled."""
    difference = _masked(log_ratio, loss_mask)
    return {"mismatch_kl": torch.expm1(difference) - difference, "mismatch_absolute": difference.abs()}


def _importance_weight(given: PolicyLossInput, clamp: float) -> torch.Tensor:
    if given.engine_log_probs is None:
        raise ValueError(
            "truncated_importance_clamp is set but there are no engine_log_probs; record them, or unset it"
        )
    log_weight = _masked(given.old_log_probs - given.engine_log_probs, given.loss_mask)
    return log_weight.exp().clamp(max=clamp).detach()


def _masked(values: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    # where, not a product: an untrained position may hold an infinity, and 0 * inf is not a number
    return torch.where(loss_mask, values, torch.zeros_like(values))
