"""The training of a run: models, curves of SFT and RL, RL iterations and phases, checked and as rows to be shown.

The one place that knows the shape of what programs hand to a report. Always: a line that lacks what every plot or
table needs is refused by name; a metric that is absent or null is None, never 0; keys beyond those named are kept out
of the page but checked to be finite.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from statistics import fmean, median
from typing import Any

type Line = Mapping[str, Any]

_LAST_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """What was trained, and how it went. Anything may be empty. Raises ValueError for a line that lacks a key.

    models: names of the policies in order of training, the untrained first; their held-out episodes are among the
    records of the report, under that name.
    sft: lines of `metrics.jsonl`: step, loss, grad_norm, learning_rate, tokens, trained_tokens, seconds,
    tokens_per_second; only step and loss must be there.
    rl: a line an update: the same, and stage, iteration, ratio, clip_fraction, kl, mismatch_kl, mismatch_absolute,
    mismatch_max, entropy; only stage and iteration must be there.
    iterations: a mapping for each RL iteration, with the fields of IterationRow but its number.
    phases: name and seconds, in order, of the whole run; those of one name are added up.
    """

    models: tuple[str, ...] = ()
    sft: Sequence[Line] = ()
    rl: Sequence[Line] = ()
    iterations: Sequence[Line] = ()
    phases: Sequence[tuple[str, float]] = ()

    def __post_init__(self) -> None:
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models {self.models} names one twice; name each once, in order of training")
        _require("sft", self.sft, ("step", "loss"))
        _require("rl", self.rl, ("stage", "iteration"))
        _require("iterations", self.iterations, _ITERATION)
        for name, seconds in self.phases:
            if not 0 <= seconds < math.inf:
                raise ValueError(f"phase {name!r} took {seconds} seconds; give a finite number, 0 or more")

    def iteration_rows(self) -> list["IterationRow"]:
        """The iterations, numbered through all stages."""
        return [
            IterationRow(number=number, **{name: line[name] for name in _ITERATION})
            for number, line in enumerate(self.iterations, start=1)
        ]

    def sft_summary(self) -> "SftSummary | None":
        """What SFT comes to; None without a step."""
        losses = _finite(self.sft, "loss")
        if not self.sft:
            return None
        return SftSummary(
            steps=len(self.sft),
            tokens=int(sum(_finite(self.sft, "tokens"))),
            trained_tokens=int(sum(_finite(self.sft, "trained_tokens"))),
            seconds=sum(_finite(self.sft, "seconds")),
            tokens_per_second=median(_finite(self.sft, "tokens_per_second") or [0.0]),
            first_loss=losses[0] if losses else None,
            last_loss=fmean(losses[-_LAST_STEPS:]) if losses else None,
            last_steps=min(len(losses), _LAST_STEPS),
        )

    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase, in order of first appearance."""
        seconds: dict[str, float] = {}
        for name, spent in self.phases:
            seconds[name] = seconds.get(name, 0.0) + spent
        return seconds

    def not_finite(self) -> Iterator[tuple[str, str, str]]:
        """Kind of line, metric and place of every number that is NaN or infinite."""
        for kind, lines in (("SFT", self.sft), ("RL", self.rl), ("RL iterations", self.iterations)):
            for number, line in enumerate(lines, start=1):
                for name, value in line.items():
                    if isinstance(value, float) and not math.isfinite(value):
                        yield kind, name, _place(line, number)


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationRow:
    """One RL iteration. number: counted from 1 through all stages.  iteration: as the run numbers it in its stage.

    mean_score and standard_error are over the `scored` of the `episodes`, None where there are too few.
    endings: episodes by ending.  left_out: episodes not trained on, by reason.
    """

    number: int
    stage: str
    iteration: int
    timeout_seconds: float
    episodes: int
    scored: int
    mean_score: float | None
    standard_error: float | None
    mean_turns: float
    windows: int
    trained_tokens: int
    endings: Mapping[str, int]
    updates: int
    left_out: Mapping[str, int]


_ITERATION = tuple(field.name for field in fields(IterationRow) if field.name != "number")


@dataclass(frozen=True, kw_only=True, slots=True)
class SftSummary:
    """last_loss: the mean over the `last_steps` at the end.  tokens_per_second: the median over steps."""

    steps: int
    tokens: int
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    first_loss: float | None
    last_loss: float | None
    last_steps: int


def numbers(lines: Sequence[Line], name: str) -> list[float]:
    """A metric of each line; NaN where it is absent, null, infinite or NaN, so that a curve has a gap there."""
    values = [line.get(name) for line in lines]
    return [float(value) if value is not None and math.isfinite(value) else math.nan for value in values]


def spans(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of equal names: the name, and the first and last place, counted from 1."""
    places = groupby(enumerate(names, start=1), key=lambda place: place[1])
    found = [(name, [number for number, _ in run]) for name, run in places]
    return [(name, run[0], run[-1]) for name, run in found]


def _finite(lines: Sequence[Line], name: str) -> list[float]:
    return [value for value in numbers(lines, name) if not math.isnan(value)]


def _place(line: Line, number: int) -> str:
    if "stage" in line:
        update = f", update {number}" if "endings" not in line else ""
        return f"{line['stage']} iteration {line['iteration']}{update}"
    return f"step {line['step']}"


def _require(name: str, lines: Sequence[Line], keys: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        missing = [key for key in keys if key not in line]
        if missing:
            raise ValueError(f"{name}[{number}] of the training run has no {missing[0]!r}; it has {', '.join(line)}")
