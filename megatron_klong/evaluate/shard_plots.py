"""The plots of one shard: what its tokens are, how full its windows are, what they repeat, and what they teach.

Nothing to draw gives None, never an empty plot.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_klong.data.shard import Shard
from megatron_klong.data.summary import ShardSummary
from megatron_klong.evaluate.canvas import Plot, Theme, color_legend, legend_inches, render, whole_numbers
from megatron_klong.evaluate.findings import plural, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HALF = 6.0  # inches: one of two columns
_BINS = 20


def tokens_by_kind(summary: ShardSummary) -> Plot | None:
    """Tokens of the windows by kind, trained ones apart."""
    rows = [row for row in summary.kinds if row.in_windows]
    if not rows:
        return None
    trained = np.array([row.trained for row in rows])
    context = np.array([row.in_windows for row in rows]) - trained

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        places = np.arange(len(rows))
        axes.barh(places, trained, color=theme.new, height=0.7)
        axes.barh(places, context, left=trained, color=theme.overlap, height=0.7)
        axes.set_yticks(places, [words(row.kind) for row in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        whole_numbers(axes, "x")
        axes.set_xlabel("tokens in the windows, repeats counted")
        color_legend(figure, ["trained", "context"], [theme.new, theme.overlap])

    shares = ", ".join(f"{words(row.kind)} {row.in_windows:,}" for row in rows)
    return render(
        "tokens_by_kind",
        (_HALF, 1.1 + 0.3 * len(rows) + legend_inches(2)),
        draw,
        alt=f"Tokens of the windows by kind: {shares}.",
        caption="What the windows are made of, by kind. Only what the agent wrote is trained.",
    )


def phases_of_work(summary: ShardSummary) -> Plot | None:
    """Trainable tokens by the phase of work of their turn."""
    rows = summary.phases
    if not rows:
        return None

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        places = np.arange(len(rows))
        bars = axes.barh(places, [row.trainable_tokens for row in rows], color=theme.new, height=0.7)
        axes.bar_label(bars, [f" {plural(row.windows, 'window')}" for row in rows], color=theme.muted, fontsize=9)
        axes.set_yticks(places, [row.phase for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        whole_numbers(axes, "x")
        axes.set_xlabel("trainable tokens")

    shares = ", ".join(f"{row.phase} {row.trainable_tokens:,} in {plural(row.turns, 'turn')}" for row in rows)
    return render(
        "phases_of_work",
        (_HALF, 1.2 + 0.3 * len(rows)),
        draw,
        alt=f"Trainable tokens by phase of work: {shares}.",
        caption="Trainable tokens by what their turn did, and the windows whose turns mostly did it.",
    )


def window_fill(shard: Shard) -> Plot | None:
    """How many windows are how full."""
    if not len(shard):
        return None
    parts = [shard.column(f"{part}_tokens") for part in ("prefix", "overlap", "new")]
    fill = 100 * np.sum(parts, axis=0) / shard.manifest["policy"]["max_tokens"]
    last = np.array([str(end) == "finished" for end in shard.ends()])
    groups = {"cut": fill[~last], "last of its transcript": fill[last]}
    return _histogram(
        "window_fill",
        groups,
        np.linspace(0, 100, _BINS + 1),
        x="fill of the window, per cent of max_tokens",
        y="windows",
        caption="How full the windows are. A cut window is as full as the next turn allowed.",
    )


def window_overlap(shard: Shard) -> Plot | None:
    """How much history windows begin with."""
    overlap = shard.column("overlap_tokens")
    if not overlap.any():
        return None
    edges = np.linspace(0, int(overlap.max()), _BINS + 1)
    return _histogram(
        "window_overlap",
        {"windows": overlap},
        edges,
        x="tokens of history behind the prefix",
        y="windows",
        caption="History that windows begin with. The first window of a transcript has none.",
    )


def windows_per_document(shard: Shard) -> Plot | None:
    """How many documents have how many windows."""
    if not shard.documents:
        return None
    counts = np.bincount(shard.column("document"), minlength=len(shard.documents))
    fewest, most = int(counts.min()), int(counts.max())
    width = -(-(most - fewest + 1) // _BINS)
    edges = np.arange(fewest, most + width + 1, width) - 0.5
    return _histogram(
        "windows_per_document",
        {"documents": counts},
        edges,
        x="windows of the transcript",
        y="transcripts",
        caption="Windows that one transcript is cut into.",
    )


def _histogram(
    name: str, groups: dict[str, NDArray[Any]], edges: NDArray[Any], *, x: str, y: str, caption: str
) -> Plot:
    values = np.concatenate(list(groups.values()))

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        bottom = np.zeros(len(edges) - 1)
        colors = (theme.new, theme.overlap)[: len(groups)]
        for color, group in zip(colors, groups.values(), strict=True):
            heights, _ = np.histogram(group, edges)
            centres = (edges[:-1] + edges[1:]) / 2
            axes.bar(centres, heights, bottom=bottom, width=0.9 * (edges[1] - edges[0]), color=color)
            bottom += heights
        axes.set_xlim(edges[0], edges[-1])
        whole_numbers(axes, "x")
        whole_numbers(axes, "y")
        axes.grid(False, axis="x")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(groups) > 1:
            color_legend(figure, list(groups), colors)

    spread = f"from {values.min():,.0f} to {values.max():,.0f}, median {np.median(values):,.0f}"
    return render(name, (_HALF, 3.2), draw, alt=f"{caption} {x.capitalize()}: {spread}.", caption=caption)
