"""The plots of episodes: scores and endings. Nothing to draw gives None, never an empty plot."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_klong.agent.ending import Ending
from megatron_klong.evaluate.canvas import (
    Plot,
    Theme,
    color_legend,
    ink_on,
    legend_inches,
    render,
    short,
    spread,
    whole_numbers,
)
from megatron_klong.evaluate.findings import plural, words
from megatron_klong.evaluate.summary import HELDOUT, TRAIN, EpisodeRow, ScoreRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HALF = 6.0  # inches: one of two columns
_MOST_LABELS = 6
_MOST_LARGE_POINTS = 200
# endings the policy did not bring about, and their hatches
_MACHINERY: dict[str, str] = {Ending.SANDBOX_FAILED: "///", Ending.ENGINE_FAILED: "...", Ending.AGENT_FAILED: "xxx"}
_LOGARITHMIC_FROM = 8  # times more turns in the longest episode than in the shortest


def score_by_turns(episodes: Sequence[EpisodeRow], names: Sequence[str]) -> Plot | None:
    """A point an episode: its score against how many turns it took. names: the policies, in order of their colours."""
    scored = [episode for episode in episodes if episode.score is not None]
    if not scored:
        return None

    def draw(figure: "Figure", theme: Theme) -> None:
        axes = figure.subplots()
        for number, name in enumerate(names):
            _points(axes, [episode for episode in scored if episode.policy == name], theme.policy(number), len(scored))
        _turn_axis(axes, [episode.turns for episode in scored])
        scores = [_score(episode) for episode in scored]
        axes.set_ylim(min(-0.03, *scores), max(1.03, *scores))
        axes.set_ylabel("score")
        if len(names) <= _MOST_LABELS:
            _label_policies(axes, scored, names, theme)
        _score_legend(figure, scored, names, theme)

    ranges = "; ".join(_range_in_words(name, scored) for name in names)
    alt = f"Score against turns, a point for each of {plural(len(scored), 'episode')}. {ranges}."
    caption = "Score against length, one point an episode."
    if any(episode.split == TRAIN for episode in scored):
        caption += " Rings are training tasks, filled points are others."
    extra = legend_inches(len(names)) if len(names) > _MOST_LABELS else 0
    return render("score_by_turns", (_HALF, 4.2 + extra), draw, alt=alt, caption=caption)


def _score(episode: EpisodeRow) -> float:
    assert episode.score is not None
    return episode.score


def _range_in_words(name: str, scored: Sequence[EpisodeRow]) -> str:
    scores = [_score(episode) for episode in scored if episode.policy == name]
    if not scores:
        return f"{name}: no score"
    return f"{name}: {plural(len(scores), 'episode')}, scores from {min(scores):.2f} to {max(scores):.2f}"


def _points(axes: "Axes", episodes: Sequence[EpisodeRow], style: tuple[str, str, str], num_points: int) -> None:
    """Rings for training tasks, wide enough to be seen around a filled point at the same place."""
    color, marker, _ = style
    size = 44 if num_points <= _MOST_LARGE_POINTS else 16
    for train in (True, False):
        part = [episode for episode in episodes if (episode.split == TRAIN) == train]
        axes.scatter(
            [episode.turns for episode in part],
            [_score(episode) for episode in part],
            s=2.6 * size if train else size,
            marker=marker,
            facecolor="none" if train else color,
            edgecolor=color,
            linewidth=1.5 if train else 0,
            zorder=3,
            alpha=1 if num_points <= _MOST_LARGE_POINTS else 0.75,
            clip_on=False,
        )


def _turn_axis(axes: "Axes", turns: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(turns) > 0 and max(turns) >= _LOGARITHMIC_FROM * min(turns):
        axes.set_xscale("log")
        axes.set_xlim(min(turns) / 1.25, max(turns) * 1.25)
        decades = max(turns) / min(turns)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1000 else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("turns in the episode (logarithmic)")
    else:
        axes.set_xlim(0, max(*turns, 1) * 1.08)
        whole_numbers(axes, "x")
        axes.set_xlabel("turns in the episode")


def _label_policies(axes: "Axes", scored: Sequence[EpisodeRow], names: Sequence[str], theme: Theme) -> None:
    """Write each policy beside its point furthest to the right, labels never on top of each other."""
    ends: list[tuple[float, float, int]] = []
    for number, name in enumerate(names):
        points = [(episode.turns, _score(episode)) for episode in scored if episode.policy == name]
        if points:
            ends.append((*max(points), number))
    heights = spread([score for _, score, _ in ends], 0.06)
    for (turns, _, number), height in zip(ends, heights, strict=True):
        axes.annotate(
            short(names[number]),
            (turns, height),
            xytext=(11, 0),
            textcoords="offset points",
            va="center",
            color=theme.policy(number)[0],
            fontweight="bold",
            annotation_clip=False,
        )


def _score_legend(figure: "Figure", scored: Sequence[EpisodeRow], names: Sequence[str], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if len(names) > _MOST_LABELS:
        for number, name in enumerate(names):
            color, marker, _ = theme.policy(number)
            handles.append(Line2D([], [], linestyle="", marker=marker, color=color, label=short(name)))
    splits = {episode.split for episode in scored}
    if TRAIN in splits and len(splits) > 1:
        other = "held-out task" if splits == {TRAIN, HELDOUT} else "other task"
        for size, face, label in ((6, theme.muted, other), (9, "none", "training task")):
            ring = theme.muted
            handles.append(
                Line2D([], [], ls="", marker="o", ms=size, mfc=face, mec=ring, mew=1.5, color=ring, label=label)
            )
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(handles)), handletextpad=0.2)


def heldout_scores(scores: Sequence[ScoreRow], episodes: Sequence[EpisodeRow], names: Sequence[str]) -> Plot | None:
    """A row a policy: the mean of its held-out scores with its standard error, and every score behind it."""
    rows = [row for row in scores if row.split == HELDOUT and row.mean is not None]
    if not rows:
        return None
    listing = "; ".join(f"{row.policy}: {_mean_in_words(row)}, n = {row.scored:,}" for row in rows)
    caption = "Mean held-out score, ± one standard error. Small points are single episodes."
    size = (_HALF, 0.8 + 0.52 * len(rows))
    draw = partial(_draw_heldout, rows=rows, episodes=episodes, names=names)
    return render("heldout_scores", size, draw, alt=f"Mean held-out score by policy. {listing}.", caption=caption)


def _mean_in_words(row: ScoreRow) -> str:
    error = f" ± {row.standard_error:.3f}" if row.standard_error is not None else ""
    return f"{row.mean:.3f}{error}"


def _draw_heldout(
    figure: "Figure", theme: Theme, *, rows: Sequence[ScoreRow], episodes: Sequence[EpisodeRow], names: Sequence[str]
) -> None:
    axes = figure.subplots()
    low, high = 0.0, 1.0
    for place, row in enumerate(rows):
        color, marker, _ = theme.policy(names.index(row.policy))
        chosen = [episode for episode in episodes if episode.policy == row.policy and episode.split == HELDOUT]
        scores = [_score(episode) for episode in chosen if episode.score is not None]
        low, high = min(low, *scores), max(high, *scores)
        # side by side in the lower part of the row, in the order of the episodes: many have the same score
        heights = [place + 0.16 + 0.16 * number / max(len(scores) - 1, 1) for number in range(len(scores))]
        axes.scatter(scores, heights, s=16, color=color, alpha=0.55, linewidth=0, clip_on=False)
        assert row.mean is not None
        axes.errorbar(
            row.mean,
            place - 0.08,
            xerr=row.standard_error,
            color=color,
            marker=marker,
            markersize=7,
            linewidth=2,
            capsize=4,
            capthick=2,
            clip_on=False,
            zorder=3,
        )
        axes.text(1.02, place, _mean_in_words(row), transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(rows)), [short(row.policy) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlim(low - 0.02, high + 0.02)
    axes.set_xlabel("held-out score")


def endings(episodes: Sequence[EpisodeRow], names: Sequence[str]) -> Plot | None:
    """A bar a policy: how its episodes ended."""
    if not episodes:
        return None
    counted = {name: Counter(episode.ending for episode in episodes if episode.policy == name) for name in names}
    kinds = in_order(episode.ending for episode in episodes)
    listing = "; ".join(
        f"{name}: " + ", ".join(f"{count} {words(kind)}" for kind, count in counted[name].most_common())
        for name in names
    )
    alt = f"Endings of {plural(len(episodes), 'episode')}. {listing}."
    caption = "How episodes ended, by policy." + hatch_note(kinds)
    size = (_HALF, 1.1 + 0.5 * len(names) + legend_inches(len(kinds)))
    return render("endings", size, partial(_draw_endings, counted=counted, kinds=kinds), alt=alt, caption=caption)


def _draw_endings(figure: "Figure", theme: Theme, *, counted: Mapping[str, Counter[str]], kinds: Sequence[str]) -> None:
    """Bars of `counted` episodes by policy and ending, the parts in the order of `kinds`."""
    axes = figure.subplots()
    rows = range(len(counted))
    left = [0] * len(counted)
    most = max(map(Counter.total, counted.values()))
    styles = [ending_style(kind, theme) for kind in kinds]
    for kind, (face, hatch) in zip(kinds, styles, strict=True):
        counts = [ended[kind] for ended in counted.values()]
        bars = axes.barh(
            rows, counts, left=left, height=0.62, color=face, hatch=hatch, edgecolor=theme.paper, linewidth=1.2
        )
        labels = [f"{count:,}" if not hatch and count * 25 >= most else "" for count in counts]
        axes.bar_label(bars, labels, label_type="center", color=ink_on(face), fontweight="bold")
        left = [before + count for before, count in zip(left, counts, strict=True)]
    axes.set_yticks(rows, [short(name) for name in counted])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    whole_numbers(axes, "x")
    axes.set_xlabel("episodes")
    color_legend(figure, list(map(words, kinds)), *zip(*styles, strict=True))


def in_order(kinds: Iterable[str]) -> list[str]:
    """Each kind of ending once, in the order of Ending, others last."""
    order = [str(ending) for ending in Ending]
    return sorted(set(kinds), key=lambda kind: (order.index(kind) if kind in order else len(order), kind))


def hatch_note(kinds: Iterable[str]) -> str:
    """What a caption must say where some endings are hatched."""
    hatched = any(kind in _MACHINERY for kind in kinds)
    return " Hatched grey: what broke around the policy." if hatched else ""


def ending_style(kind: str, theme: Theme) -> tuple[str, str]:
    """Colour and hatch."""
    blue, vermilion, green, purple, orange, sky, *_ = theme.cycle
    colors: dict[str, str] = {
        Ending.FINISHED: green,
        Ending.TIMED_OUT: orange,
        Ending.HARD_TIMED_OUT: vermilion,
        Ending.TURN_LIMIT: sky,
        Ending.STALLED: purple,
        Ending.CONTEXT_ERROR: blue,
    }
    return colors.get(kind, theme.grey), _MACHINERY.get(kind, "")
