"""What the curves show of a step, and of a validation: names and numbers, the same on every process."""

from collections.abc import Mapping, Sequence

from megatron_klong.train.step import StepResult

type Figures = dict[str, float]


def step_figures(result: StepResult, *, seconds: float) -> Figures:
    """A line of the curves, for SFT and RL alike."""
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "skipped_steps": result.skipped_steps,
        "expert_load": result.expert_load,
        "seconds": seconds,
        "tokens_per_second": result.tokens / seconds,
        **{name: value for name, value in result.metrics.items() if not name.startswith("group_")},
    }


def losses_by_group(metrics: Mapping[str, float], names: Sequence[str], *, prefix: str = "loss") -> Figures:
    """Of `cross_entropy_by_group`, whose groups are two a source: before the first cut of a transcript, and behind.

    names: of the sources. A kind of window that the batch held no trained token of is left out.
    """
    shares = [(metrics[f"group_loss/{n}"], metrics[f"group_tokens/{n}"]) for n in range(2 * len(names))]
    kinds = {f"{prefix}_first": shares[0::2], f"{prefix}_continuation": shares[1::2]}
    if len(names) > 1:
        kinds |= {f"{prefix}/{name}": shares[2 * n : 2 * n + 2] for n, name in enumerate(names)}
    return {
        name: sum(loss for loss, _ in parts) / tokens
        for name, parts in kinds.items()
        if (tokens := sum(count for _, count in parts))
    }
