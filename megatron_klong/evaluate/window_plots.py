"""The plots of contexts: prompts of one episode, composition of a shard's windows, windows per episode.

Nothing to draw gives None, never an empty plot.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_klong.data.shard import Shard
from megatron_klong.evaluate.canvas import (
    Plot,
    Theme,
    color_legend,
    ink_on,
    legend_inches,
    render,
    spread,
    whole_numbers,
)
from megatron_klong.evaluate.findings import plural
from megatron_klong.evaluate.summary import EpisodeRow
from megatron_klong.trajectory.episode import EpisodeRecord, PolicyRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HALF, _WIDE = 6.0, 11.6  # inches: one of two columns, the whole page
_MOST_BARS = 160
_MOST_BORDERS = 60
_MOST_BINS = 30
_BIN_WIDTHS = [factor * 10**power for power in range(6) for factor in (1, 2, 5)]
_PARTS = ("prefix", "overlap", "new")


def longest_episode(records: Sequence[EpisodeRecord], shard: Shard) -> EpisodeRecord | None:
    """The episode with the most turns that recorded a prompt; among equals one whose prefix the shard knows."""
    with_prompts = [record for record in records if _prompts(record)]
    most = max((len(record.turns) for record in with_prompts), default=0)
    return max(
        (record for record in with_prompts if len(record.turns) == most),
        key=lambda record: (prefix_levels(record, shard) is not None, record.windows),
        default=None,
    )


def prefix_levels(record: EpisodeRecord, shard: Shard) -> list[int] | None:
    """Prefix tokens of each window of the episode; None if the shard was not cut from it by the same policy."""
    numbers = [number for number, document in enumerate(shard.documents) if document["id"] == record.id]
    if not numbers or record.context is None or record.context != PolicyRecord(**shard.manifest["policy"]):
        return None
    inside = shard.column("document") == numbers[0]
    return [int(tokens) for tokens in shard.column("prefix_tokens")[inside]]


def prompt_tokens(record: EpisodeRecord, prefixes: Sequence[int] | None, *, name: str = "prompt_tokens") -> Plot:
    """The saw-tooth: tokens of the prompt at each turn, a rise a window; for any record with a prompt.

    prefixes: the level of the pinned prefix in each window, None where only the record itself is known.
    """
    policy, prompts = record.context, _prompts(record)
    windows = sorted({window for _, window, _ in prompts})
    levels = prefixes if prefixes and len(prefixes) > windows[-1] else None
    lengths = [tokens for _, _, tokens in prompts]

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        starts = _rises(axes, prompts, windows, theme)
        _borders(axes, starts, theme)
        _dropped_turns(figure, axes, record, theme)
        if levels:
            ends = [*starts[1:], len(record.turns) + 1]
            for window, start, stop in zip(windows, starts, ends, strict=True):
                axes.fill_between([start - 0.5, stop - 0.5], levels[window], color=theme.prefix, alpha=0.16, lw=0)
                axes.plot([start - 0.5, stop - 0.5], [levels[window]] * 2, color=theme.prefix, lw=1.6)
        if policy:
            _levels(axes, policy, levels[windows[-1]] if levels else None, theme)
        axes.set_xlim(0.5, len(record.turns) + 0.5)
        axes.set_ylim(0, 1.1 * max(policy.max_tokens if policy else 0, *lengths))
        whole_numbers(axes, "x")
        whole_numbers(axes, "y")
        axes.grid(False, axis="x")
        axes.set_xlabel("turn")
        axes.set_ylabel("tokens of the prompt")

    alt = (
        f"Tokens of the prompt at each of {plural(len(record.turns), 'turn')} of {record.id}: between {min(lengths):,} "
        f"and {max(lengths):,}, in {plural(len(windows), 'window')}"
    ) + (f" of at most {policy.max_tokens:,} tokens." if policy else ".")
    caption = "Tokens of the prompt at each turn." + (
        " Dotted lines are window borders." if 1 < len(windows) <= _MOST_BORDERS else ""
    )
    if not levels:
        caption += " The pinned prefix is not drawn: the shard was not cut from this episode under the same policy."
    elif policy and policy.pin == "reading":
        caption += " The pinned prefix is the task and, from the second window on, the reading pinned with it."
    return render(name, (_WIDE, 4.0), draw, alt=alt, caption=caption)


def _rises(axes: "Axes", prompts: Sequence[tuple[int, int, int]], windows: Sequence[int], theme: Theme) -> list[int]:
    """Draw the prompts window by window, and return the first turn of each."""
    starts = []
    thickness = 1.6 if len(windows) <= _MOST_BORDERS else 0.7
    for window in windows:
        turns = [turn for turn, number, _ in prompts if number == window]
        tokens = [tokens for _, number, tokens in prompts if number == window]
        starts.append(turns[0])
        style = {"marker": "o", "markersize": 3.4} if len(prompts) <= 250 or len(turns) == 1 else {}
        axes.plot(turns, tokens, color=theme.new, linewidth=thickness, zorder=3, **style)  # type: ignore[arg-type]
    return starts


def _prompts(record: EpisodeRecord) -> list[tuple[int, int, int]]:
    """Turn (from 1), window and tokens of each prompt that fitted a window."""
    return [
        (number, turn.window, turn.prompt_tokens)
        for number, turn in enumerate(record.turns, start=1)
        if turn.window is not None and turn.prompt_tokens is not None
    ]


def _borders(axes: "Axes", starts: Sequence[int], theme: Theme) -> None:
    """A line before the first turn of each window but the first, and the windows' numbers where there is room."""
    for start in starts[1:] if len(starts) <= _MOST_BORDERS else []:
        axes.axvline(start - 0.5, color=theme.muted, linewidth=0.8, linestyle=(0, (2, 3)))
    if len(starts) <= 25:
        for number, start in enumerate(starts):
            axes.text(
                start - (0.3 if number else 0.35),
                0.995,
                f" window {number + 1}" if number == 0 else f" {number + 1}",
                transform=axes.get_xaxis_transform(),
                va="top",
                fontsize=8.5,
                color=theme.muted,
            )


def _dropped_turns(figure: "Figure", axes: "Axes", record: EpisodeRecord, theme: Theme) -> None:
    dropped = [number for number, turn in enumerate(record.turns, start=1) if turn.window is None]
    if dropped:
        axes.plot(
            dropped,
            [0.02] * len(dropped),
            transform=axes.get_xaxis_transform(),
            linestyle="",
            marker="x",
            color=theme.cycle[1],
            label="turn that fits no window",
        )
        figure.legend(loc="outside upper right")


def _levels(axes: "Axes", policy: PolicyRecord, prefix: int | None, theme: Theme) -> None:
    """The limits of the policy and the level of the last prefix, each named at the right margin."""
    limit = policy.max_tokens - policy.reserve_tokens
    lines = [
        (policy.max_tokens, f"max_tokens\n{policy.max_tokens:,}", theme.ink),
        (limit, f"less reserve\n{limit:,}", theme.muted),
    ]
    axes.axhline(policy.max_tokens, color=theme.ink, linewidth=1.2)
    axes.axhline(limit, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
    if prefix is not None:
        lines.append((prefix, f"pinned prefix\n{prefix:,}", theme.prefix))
    heights = spread([level for level, _, _ in lines], 0.125 * policy.max_tokens)
    for (_, label, color), height in zip(lines, heights, strict=True):
        axes.annotate(
            label,
            (1, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
        )


def window_composition(shard: Shard) -> Plot | None:
    """What the windows of a shard are made of: a bar a window, or shares where there are too many."""
    if not len(shard):
        return None
    parts = {part: shard.column(f"{part}_tokens") for part in _PARTS}
    total = sum(int(tokens.sum()) for tokens in parts.values())
    shares = ", ".join(f"{tokens.sum() / max(total, 1):.0%} {part}" for part, tokens in parts.items())
    alt = f"Tokens of {plural(len(shard), 'window')}: {shares}."
    if len(shard) > _MOST_BARS:
        caption = "What the windows of the shard are made of."
        draw_shares = partial(_shares, parts=parts)
        return render("window_composition", (_WIDE, 2.6), draw_shares, alt=alt, caption=caption)

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        document = shard.column("document")
        edges = [0, *(np.flatnonzero(np.diff(document)) + 1), len(document)]
        for number, (start, stop) in enumerate(pairwise(edges)):
            if number % 2:
                axes.axvspan(start + 0.5, stop + 0.5, color=theme.band, zorder=0)
        bottom = np.zeros(len(shard), dtype=np.int64)
        for part, tokens in parts.items():
            color = getattr(theme, part)
            axes.bar(np.arange(1, len(shard) + 1), tokens, bottom=bottom, width=0.86, color=color)
            bottom = bottom + tokens
        limit = shard.manifest["policy"]["max_tokens"]
        axes.axhline(limit, color=theme.ink, linewidth=1.2)
        axes.annotate(
            f"max_tokens\n{limit:,}",
            (1, limit),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
        axes.set_xlim(0.5, len(shard) + 0.5)
        whole_numbers(axes, "x")
        whole_numbers(axes, "y")
        axes.grid(False, axis="x")
        axes.set_xlabel("window, in order of transcript")
        axes.set_ylabel("tokens")
        color_legend(figure, _PARTS, [getattr(theme, part) for part in _PARTS])

    caption = "What each window of the shard is made of. The background changes shade with each transcript."
    return render("window_composition", (_WIDE, 3.8), draw, alt=alt, caption=caption)


def _shares(figure: "Figure", theme: Theme, parts: dict[str, NDArray[Any]]) -> None:
    """Share bars of all windows, of those without overlap and of those with it."""
    axes = figure.subplots()
    overlaps = parts["overlap"] > 0
    rows = {"all": np.ones_like(overlaps), "without overlap": ~overlaps, "with overlap": overlaps}
    rows = {name: chosen for name, chosen in rows.items() if chosen.any()}
    for row, chosen in enumerate(rows.values()):
        total = sum(int(tokens[chosen].sum()) for tokens in parts.values())
        left = 0.0
        for part, tokens in parts.items():
            share = 100 * int(tokens[chosen].sum()) / max(total, 1)
            color = getattr(theme, part)
            bars = axes.barh(row, share, left=left, height=0.66, color=color)
            label = f"{share:.0f} %" if share >= 4 else ""
            axes.bar_label(bars, [label], label_type="center", color=ink_on(color), fontweight="bold")
            left += share
    axes.set_yticks(range(len(rows)), [f"{name} ({chosen.sum():,})" for name, chosen in rows.items()])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the windows' tokens, in per cent")
    color_legend(figure, _PARTS, [getattr(theme, part) for part in _PARTS])


def windows_per_episode(episodes: Sequence[EpisodeRow], names: Sequence[str]) -> Plot | None:
    """How many episodes needed how many windows, by policy."""
    if not episodes:
        return None
    fewest, most = (chosen(episode.windows for episode in episodes) for chosen in (min, max))
    width = next(width for width in _BIN_WIDTHS if most < width * _MOST_BINS)

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        bins = np.arange(most // width + 1)
        bottom = np.zeros(len(bins), dtype=np.int64)
        for number, name in enumerate(names):
            color, _, hatch = theme.policy(number)
            counted = Counter(episode.windows // width for episode in episodes if episode.policy == name)
            heights = np.array([counted[place] for place in bins], dtype=np.int64)
            axes.bar(
                bins * width + (width - 1) / 2,
                heights,
                bottom=bottom,
                width=0.86 * width,
                color=color,
                hatch=hatch,
                edgecolor=theme.paper,
                linewidth=1,
            )
            bottom += heights
        axes.set_xlim((0 if fewest < width else 1) - 0.7 * width, most + 0.7 * width)
        whole_numbers(axes, "x")
        whole_numbers(axes, "y")
        axes.grid(False, axis="x")
        axes.set_xlabel("windows in the episode" + (f" (bars of {width})" if width > 1 else ""))
        axes.set_ylabel("episodes")
        styles = [theme.policy(number) for number in range(len(names))]
        color_legend(figure, names, [color for color, _, _ in styles], [hatch for _, _, hatch in styles])

    alt = f"Windows per episode of {plural(len(episodes), 'episode')}: from {fewest:,} to {most:,}."
    caption = "Windows the live agent needed, by policy. One window: the whole episode fitted."
    return render("windows_per_episode", (_HALF, 3.9 + legend_inches(len(names))), draw, alt=alt, caption=caption)
