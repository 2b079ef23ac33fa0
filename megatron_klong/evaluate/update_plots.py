"""The plots of RL updates: how the policy moves, and how far trainer and engine are apart.

Nothing to draw gives None, never an empty plot. A number that is absent or not finite is a gap in its curve.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_klong.evaluate.canvas import Plot, Theme, render, stage_bands, whole_numbers
from megatron_klong.evaluate.findings import plural
from megatron_klong.evaluate.training import TrainingRun, numbers, spans
from megatron_klong.evaluate.training_findings import MISMATCH_LIMIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HALF = 6.0  # inches: one of two columns
_MOST_MARKERS = 80
_PANELS = {"entropy": "entropy", "kl": "KL to old", "clip_fraction": "clip fraction"}
_MISMATCH = {"mismatch_max": "largest of a token", "mismatch_absolute": "mean of tokens"}


def update_metrics(training: TrainingRun) -> Plot | None:
    """Entropy, KL and clip fraction over updates, one above the other."""
    curves = _curves(training, _PANELS)
    if not curves:
        return None

    def draw(figure: "Figure", theme: Theme) -> None:
        panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
        for number, (axes, (name, values)) in enumerate(zip(panels, curves.items(), strict=True)):
            axes.plot(range(1, len(values) + 1), values, color=theme.new, linewidth=1.6, **_marker(values))
            _update_axis(axes, training, theme, named=number == 0)
            _from_zero(axes, values)
            axes.set_ylabel(_PANELS[name])
        panels[-1].set_xlabel("RL update")
        figure.align_ylabels()

    size = (_HALF, 1.0 + 1.4 * len(curves))
    caption = (
        "What the updates do to the policy, as means over trained tokens: entropy (nats), KL to the policy at the "
        "start of the iteration, and the share of tokens that PPO clips. Above: the stage."
    )
    return render("update_metrics", size, draw, alt=_in_words(training, _PANELS, curves), caption=caption)


def mismatch(training: TrainingRun) -> Plot | None:
    """How far apart the log-probabilities of trainer and engine are, on a logarithmic axis."""
    curves = _curves(training, _MISMATCH)
    if not curves:
        return None
    positive = [value for values in curves.values() for value in values if value > 0]
    floor = 10.0 ** math.floor(math.log10(min([*positive, MISMATCH_LIMIT])) - 0.3)
    top = max([*positive, MISMATCH_LIMIT])
    zeros = any(value <= 0 for values in curves.values() for value in values)

    def draw(figure: "Figure", theme: Theme) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator

        axes = figure.subplots()
        styles = {"mismatch_max": (theme.new, "o"), "mismatch_absolute": (theme.muted, "D")}
        for name, values in curves.items():
            color, style = styles[name]
            drawn = [value if math.isnan(value) else max(value, floor) for value in values]
            label, marker = _MISMATCH[name], _marker(values, style)
            axes.plot(range(1, len(values) + 1), drawn, color=color, linewidth=1.6, label=label, zorder=3, **marker)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.set_ylim(floor / 1.3, top * (top / floor) ** 0.12)  # room for the name of the limit
        _update_axis(axes, training, theme, named=True)
        axes.axhline(MISMATCH_LIMIT, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"limit {_power(MISMATCH_LIMIT)}",
            (1, MISMATCH_LIMIT),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=theme.muted,
        )
        axes.set_xlabel("RL update")
        axes.set_ylabel("difference of log-probabilities")
        figure.legend(loc="outside upper left", ncols=2)

    caption = (
        "Trainer against engine on the same weights: the absolute difference of their log-probabilities (logarithmic)."
    ) + (" Zeros are drawn at the lower edge." if zeros else "")
    return render("mismatch", (_HALF, 4.3), draw, alt=_in_words(training, _MISMATCH, curves), caption=caption)


def _power(value: float) -> str:
    """ "1e-5"."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _curves(training: TrainingRun, names: dict[str, str]) -> dict[str, list[float]]:
    """The metrics of which there is at least one finite number."""
    curves = {name: numbers(training.rl, name) for name in names}
    return {name: values for name, values in curves.items() if not all(map(math.isnan, values))}


def _marker(values: Sequence[float], marker: str = "o") -> dict[str, Any]:
    return {"marker": marker, "markersize": 3.4, "clip_on": False} if len(values) <= _MOST_MARKERS else {}


def _update_axis(axes: "Axes", training: TrainingRun, theme: Theme, *, named: bool) -> None:
    stage_bands(axes, spans([str(line["stage"]) for line in training.rl]), theme, named=named)
    whole_numbers(axes, "x")


def _from_zero(axes: "Axes", values: Sequence[float]) -> None:
    """An axis that begins at 0, or below where values do, and has room where all are 0."""
    finite = [value for value in values if not math.isnan(value)]
    low, high = min(0.0, *finite), max(0.0, *finite)
    room = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - (room if low < 0 else 0), high + room)


def _in_words(training: TrainingRun, labels: dict[str, str], curves: dict[str, list[float]]) -> str:
    listing = []
    for name, values in curves.items():
        finite = [value for value in values if not math.isnan(value)]
        listing.append(f"{labels[name]} from {min(finite):.3g} to {max(finite):.3g}, {finite[-1]:.3g} at last")
    return f"Over {plural(len(training.rl), 'RL update')}: {'; '.join(listing)}."
