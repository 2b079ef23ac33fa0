"""What came out of the comparison, as figures by variant over the seeds; imports no torch.

Always: a mean carries the standard error of the mean over the seeds, each with data and weights of its own; the
difference between two variants is taken seed by seed, since they share both.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from examples.longhaul.ablation.runs import Budget
from examples.longhaul.ablation.variants import Variant
from megatron_klong.tables import aligned

PLACES = ("prefix", "overlap", "new", "late", "last")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """loss: nats a token.  right: share of tokens that are the likeliest of all."""

    tokens: int
    loss: float
    right: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One run. windows: in its training shard.  scores: by place."""

    variant: Variant
    seed: int
    windows: int
    budget: Budget
    scores: dict[str, Score]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """error: standard error of the mean; 0 for a single seed, which has none."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return cls(value=statistics.fmean(values), error=error)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def variants_of(outcomes: Sequence[Outcome]) -> list[Variant]:
    """In the order of their definition."""
    return [variant for variant in Variant if any(outcome.variant is variant for outcome in outcomes)]


def losses(outcomes: Sequence[Outcome], variant: Variant, place: str) -> list[float]:
    """One a seed, by seed."""
    chosen = sorted((o for o in outcomes if o.variant is variant), key=lambda outcome: outcome.seed)
    return [outcome.scores[place].loss for outcome in chosen]


def above_split(outcomes: Sequence[Outcome], variant: Variant, place: str) -> Mean:
    """By how much the variant's loss is above that of split, seed by seed."""
    pairs = zip(losses(outcomes, variant, place), losses(outcomes, Variant.SPLIT, place), strict=True)
    return Mean.of([theirs - own for theirs, own in pairs])


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Four tables: losses, right answers, differences to split, and what each variant was trained on."""
    return [
        "held-out loss, nats a token (mean ± standard error over the seeds)",
        *_table(outcomes, lambda variant, place: str(Mean.of(losses(outcomes, variant, place)))),
        "share that is the likeliest token",
        *_table(outcomes, lambda variant, place: str(Mean.of(_right(outcomes, variant, place)))),
        "loss above that of split, seed by seed",
        *_table(outcomes, lambda variant, place: str(above_split(outcomes, variant, place))),
        "trained on, a run",
        *_budgets(outcomes),
    ]


def _table(outcomes: Sequence[Outcome], cell: Any) -> list[str]:
    rows = [[variant, *(cell(variant, place) for place in PLACES)] for variant in variants_of(outcomes)]
    return aligned([["variant", *PLACES], *rows], indent="  ")


def _right(outcomes: Sequence[Outcome], variant: Variant, place: str) -> list[float]:
    return [outcome.scores[place].right for outcome in outcomes if outcome.variant is variant]


def _budgets(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [["variant", "windows", "steps", "tokens", "of them trained"]]
    for variant in variants_of(outcomes):
        chosen = [outcome for outcome in outcomes if outcome.variant is variant]
        figures = [
            [outcome.windows, outcome.budget.steps, outcome.budget.tokens, outcome.budget.trained_tokens]
            for outcome in chosen
        ]
        rows.append([variant, *(f"{statistics.fmean(column):,.0f}" for column in zip(*figures, strict=True))])
    return aligned(rows, indent="  ")
