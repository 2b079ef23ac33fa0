"""The plots of a training run: SFT, RL iterations, phases. Nothing to draw gives None, never an empty plot."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_klong.duration import Duration
from megatron_klong.evaluate.canvas import (
    Plot,
    Theme,
    color_legend,
    legend_inches,
    render,
    short,
    stage_bands,
    whole_numbers,
)
from megatron_klong.evaluate.findings import percent, plural, words
from megatron_klong.evaluate.plots import ending_style, hatch_note, in_order
from megatron_klong.evaluate.training import IterationRow, SftSummary, TrainingRun, numbers, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HALF = 6.0  # inches: one of two columns
_LOGARITHMIC_FROM = 20  # times more loss at the start than at the end
_SMOOTHED_FROM = 60  # steps
_MOST_MARKERS = 40
_TICKS = [factor * 10.0**power for power in range(-6, 12) for factor in (1, 2, 5)]


def time_limit(seconds: float) -> str:
    """ "10m", "1h30m"."""
    return str(Duration(timedelta(seconds=seconds)))


def sft_loss(training: TrainingRun, summary: SftSummary | None) -> Plot | None:
    """The loss of every step, against steps below and tokens above."""
    losses = numbers(training.sft, "loss")
    finite = [loss for loss in losses if not math.isnan(loss)]
    if not finite or summary is None:
        return None
    steps = [int(line["step"]) for line in training.sft]
    logarithmic = min(finite) > 0 and max(finite) >= _LOGARITHMIC_FROM * min(finite)

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        many = len(losses) > _SMOOTHED_FROM
        style: dict[str, Any] = (
            {"alpha": 0.4, "linewidth": 1.0} if many else {"marker": "o", "markersize": 3.4, "clip_on": False}
        )
        axes.plot(steps, losses, color=theme.new, **style)
        if many:
            axes.plot(steps, _running_mean(losses), color=theme.new, linewidth=2.2)
        if logarithmic:
            _logarithmic(axes)
        else:
            low, high = min(0.0, *finite), max(0.0, *finite)
            axes.set_ylim(1.06 * low, 1.06 * high if high > low else 1.0)
        whole_numbers(axes, "x")
        axes.set_xlabel("step")
        axes.set_ylabel("loss" + (" (logarithmic)" if logarithmic else ""))
        _tokens_above(axes, steps, numbers(training.sft, "tokens"))

    caption = f"Loss of SFT at each of {plural(summary.steps, 'step')}"
    caption += ", with its running mean." if len(losses) > _SMOOTHED_FROM else "."
    if summary.tokens:
        caption += f" {summary.tokens:,} tokens went in, {summary.trained_tokens:,} of them were trained."
    alt = f"Loss of SFT over {plural(summary.steps, 'step')}: {finite[0]:.3g} at first, {finite[-1]:.3g} at last."
    return render("sft_loss", (_HALF, 4.0), draw, alt=alt, caption=caption)


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean around each value, over a 25th of them; gaps are left out."""
    half = max(len(values) // 50, 2)
    around = [values[max(place - half, 0) : place + half + 1] for place in range(len(values))]
    finite = [[value for value in part if not math.isnan(value)] for part in around]
    return [sum(part) / len(part) if part else math.nan for part in finite]


def _logarithmic(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tokens_above(axes: "Axes", steps: Sequence[int], tokens: Sequence[float]) -> None:
    """A second axis: tokens that went in up to a step. Left out where a step has no count."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if not all(count > 0 for count in tokens) or sorted(set(steps)) != list(steps):
        return
    at_steps = np.array([steps[0] - 1, *steps], dtype=float)
    at_tokens = np.array([0, *accumulate(tokens)], dtype=float)

    def tokens_of(places: Any) -> Any:
        return np.interp(places, at_steps, at_tokens)

    def steps_of(places: Any) -> Any:
        return np.interp(places, at_tokens, at_steps)

    above = axes.secondary_xaxis("top", functions=(tokens_of, steps_of))
    axes.set_xlim(at_steps[0], at_steps[-1])
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(0, at_tokens[-1])
    above.set_xticks([tick for tick in ticks if 0 <= tick <= at_tokens[-1]])
    above.xaxis.set_major_formatter(EngFormatter(sep=" "))
    above.set_xlabel("tokens")


def iteration_scores(rows: Sequence[IterationRow]) -> Plot | None:
    """The mean score of each RL iteration with its standard error, by stage."""
    scored = [row for row in rows if row.mean_score is not None and math.isfinite(row.mean_score)]
    if not scored:
        return None

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        for _, first, last in spans([row.stage for row in rows]):
            _stage_scores(axes, [row for row in scored if first <= row.number <= last], len(rows), theme)
        _iteration_axis(axes, rows, theme)
        highest = max((row.mean_score or 0.0) + (row.standard_error or 0.0) for row in scored)
        lowest = min((row.mean_score or 0.0) - (row.standard_error or 0.0) for row in scored)
        axes.set_ylim(min(0.0, 1.06 * lowest), 1.06 * max(highest, 0.05))
        axes.set_ylabel("mean score")

    listing = "; ".join(f"{row.stage} iteration {row.iteration}: {row.mean_score:.3f}" for row in scored)
    caption = "Mean score of the rollouts of each RL iteration, ± one standard error. Above: stage and its time limit."
    alt = f"Mean score of {plural(len(rows), 'RL iteration')}. {listing}."
    return render("iteration_scores", (_HALF, 4.2), draw, alt=alt, caption=caption)


def _stage_scores(axes: "Axes", rows: Sequence[IterationRow], of_all: int, theme: Theme) -> None:
    """Means joined by a line, with error bars, or with a band around them where there are too many bars."""
    places = [row.number for row in rows]
    means = np.array([row.mean_score or 0.0 for row in rows])
    errors = np.array([row.standard_error or 0.0 for row in rows])
    if of_all > _MOST_MARKERS:
        axes.plot(places, means, color=theme.new, linewidth=1.8, zorder=3)
        axes.fill_between(places, means - errors, means + errors, color=theme.new, alpha=0.25, linewidth=0)
        return
    axes.errorbar(
        places,
        means,
        yerr=errors,
        color=theme.new,
        marker="o",
        markersize=5,
        linewidth=1.8,
        elinewidth=1.4,
        capsize=3,
        zorder=3,
    )


def _iteration_axis(axes: "Axes", rows: Sequence[IterationRow], theme: Theme) -> None:
    named = [
        (f"{stage}\n{_limits(rows[first - 1 : last])}", first, last)
        for stage, first, last in spans([row.stage for row in rows])
    ]
    stage_bands(axes, named, theme)
    whole_numbers(axes, "x")
    axes.set_xlabel("RL iteration")


def _limits(rows: Sequence[IterationRow]) -> str:
    """The time limit of a stage, or the shortest and the longest."""
    limits = sorted({row.timeout_seconds for row in rows})
    return " to ".join(time_limit(limit) for limit in dict.fromkeys((limits[0], limits[-1])))


def iteration_endings(rows: Sequence[IterationRow]) -> Plot | None:
    """A bar an RL iteration: how its episodes ended."""
    kinds = in_order(kind for row in rows for kind, count in row.endings.items() if count)
    if not kinds:
        return None

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        styles = [ending_style(kind, theme) for kind in kinds]
        many = len(rows) > _MOST_MARKERS
        width = 1.0 if many else min(0.8, 0.2 + 0.1 * len(rows))
        places = [row.number for row in rows]
        bottom = [0] * len(rows)
        for kind, (face, hatch) in zip(kinds, styles, strict=True):
            counts = [row.endings.get(kind, 0) for row in rows]
            line = 0 if many else 1
            axes.bar(
                places, counts, width, bottom, color=face, hatch=hatch, edgecolor=theme.paper, linewidth=line, zorder=2
            )
            bottom = [below + count for below, count in zip(bottom, counts, strict=True)]
        _iteration_axis(axes, rows, theme)
        whole_numbers(axes, "y")
        axes.set_ylabel("episodes")
        color_legend(figure, list(map(words, kinds)), *zip(*styles, strict=True))

    total = {kind: sum(row.endings.get(kind, 0) for row in rows) for kind in kinds}
    listing = ", ".join(f"{count:,} {words(kind)}" for kind, count in total.items())
    alt = f"Endings of the episodes of {plural(len(rows), 'RL iteration')}: {listing}."
    caption = "How the rollouts of each RL iteration ended." + hatch_note(kinds)
    return render("iteration_endings", (_HALF, 4.0 + legend_inches(len(kinds))), draw, alt=alt, caption=caption)


def phases(seconds: Mapping[str, float]) -> Plot | None:
    """A bar a phase: where the time of the whole run went."""
    total = sum(seconds.values())
    if not total:
        return None

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        places = range(len(seconds))
        bars = axes.barh(places, list(seconds.values()), height=0.66, color=theme.new)
        axes.bar_label(bars, [percent(spent, total) for spent in seconds.values()], padding=5)
        axes.set_yticks(places, [short(name) for name in seconds])
        axes.set_ylim(len(seconds) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set_xlim(0, 1.14 * max(seconds.values()))
        _minutes(axes, max(seconds.values()))

    listing = ", ".join(f"{name} {spent:,.0f} s" for name, spent in seconds.items())
    size = (_HALF, 0.9 + 0.34 * len(seconds))
    caption = "Where the time of the run went, phase by phase in order."
    return render("phases", size, draw, alt=f"Seconds by phase: {listing}.", caption=caption)


def _minutes(axes: "Axes", longest: float) -> None:
    """Seconds, minutes or hours, whichever gives readable ticks."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    unit, name = next((unit, name) for unit, name in units if longest >= 2 * unit or unit == 1)
    step = next(step for step in _TICKS if 1.14 * longest / unit / step <= 7)
    axes.xaxis.set_major_locator(MultipleLocator(step * unit))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,g}"))
    axes.set_xlabel(name)
