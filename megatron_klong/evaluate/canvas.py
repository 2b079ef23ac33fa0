"""A drawing function -> one PNG for light pages and one for dark pages, in the same style.

Always: colours stay apart for colour-blind readers (Okabe and Ito 2008, lightened on dark), and each comes with a
marker or a label; names from outside are drawn as they are, never read as mathematics; matplotlib's settings are as
before afterwards. Matplotlib is imported when something is drawn.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 170
_LONGEST_NAME = 28
_INCHES_A_LETTER = 0.085  # at font size 9
_FEWEST_LETTERS = 7  # of a name that is cut before it is turned upright
_MARKERS = "osD^vPX"
_HATCHES = ("", "////", "....", "xxxx")


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours. cycle: for policies.  prefix, overlap, new: the parts of a window, context in greys."""

    paper: str
    ink: str
    muted: str
    grid: str
    band: str
    cycle: tuple[str, ...]
    prefix: str
    overlap: str
    new: str
    grey: str

    def policy(self, number: int) -> tuple[str, str, str]:
        """Colour, marker and, for areas, hatch of the policy with that number."""
        again = number // len(self.cycle)
        return self.cycle[number % len(self.cycle)], _MARKERS[number % len(_MARKERS)], _HATCHES[again % len(_HATCHES)]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2127",
    muted="#5c6670",
    grid="#e3e7ea",
    band="#f2f4f6",
    cycle=("#0072b2", "#d55e00", "#009e73", "#b5578f", "#e69f00", "#56b4e9", "#3b4148"),
    prefix="#5d6b78",
    overlap="#b9c3cc",
    new="#4353c4",
    grey="#8b949c",
)
DARK = Theme(
    paper="#16191d",
    ink="#e7eaed",
    muted="#a3adb6",
    grid="#2c3238",
    band="#1e2328",
    cycle=("#4aa3df", "#f27d3c", "#2fbf94", "#dd8fbe", "#f2b63c", "#8fd0f7", "#d5dade"),
    prefix="#8493a1",
    overlap="#46525d",
    new="#8f9dff",
    grey="#7d8790",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A finished plot. alt: what it shows, for those who cannot see it.  width, height: CSS pixels."""

    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes
    width: int
    height: int


type Draw = Callable[["Figure", Theme], None]


def render(name: str, size: tuple[float, float], draw: Draw, *, alt: str, caption: str) -> Plot:
    """Draw once for each theme; `size` is in inches."""
    light, dark = (_png(size, draw, theme) for theme in (LIGHT, DARK))
    width, height = (round(96 * inches) for inches in size)
    return Plot(name=name, alt=alt, caption=caption, light=light, dark=dark, width=width, height=height)


def _png(size: tuple[float, float], draw: Draw, theme: Theme) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_style(theme)):
        figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
        draw(figure, theme)
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": theme.ink,
        "text.parse_math": False,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
    }


def short(name: str, letters: int = _LONGEST_NAME) -> str:
    """A name on one line of at most so many letters; by default it fits beside a plot."""
    line = " ".join(name.split())
    return line if len(line) <= letters else line[: letters - 1] + "…"


def color_legend(figure: "Figure", names: Sequence[str], colors: Sequence[str], hatches: Sequence[str] = ()) -> None:
    """A legend of patches above the plot."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=color, hatch=hatch, edgecolor=figure.get_facecolor(), linewidth=0)
        for color, hatch in zip(colors, hatches or [""] * len(colors), strict=True)
    ]
    figure.legend(
        patches,
        list(map(short, names)),
        loc="outside upper left",
        ncols=3,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def legend_inches(entries: int) -> float:
    """The height a legend of three columns takes."""
    return 0.19 * -(-entries // 3)


def ink_on(color: str) -> str:
    """Black or white, whichever is easier to read on a colour (relative luminance, WCAG 2)."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#111111" if luminance > 0.179 else "#ffffff"


def whole_numbers(axes: "Axes", axis: str) -> None:
    """Ticks of an axis at whole numbers, with separators for thousands."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    chosen = axes.xaxis if axis == "x" else axes.yaxis
    chosen.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1, steps=[1, 2, 5, 10]))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def stage_bands(axes: "Axes", spans: Sequence[tuple[str, int, int]], theme: Theme, *, named: bool = True) -> None:
    """Stages behind a plot whose x counts from 1: name, first and last place. The names stand above the axes."""
    places = spans[-1][2]
    width = axes.get_figure(root=True).get_size_inches()[0] - 1.0  # type: ignore[union-attr]
    for number, (name, first, last) in enumerate(spans):
        if number % 2:
            axes.axvspan(first - 0.5, last + 0.5, color=theme.band, zorder=0, linewidth=0)
        if number:
            axes.axvline(first - 0.5, color=theme.muted, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        if named:
            letters = int(width * (last - first + 1) / places / _INCHES_A_LETTER)
            crowded = letters < _FEWEST_LETTERS and letters < max(map(len, name.split("\n")))
            axes.text(
                (first + last) / 2,
                1.02,
                "\n".join(short(line, 2 * _FEWEST_LETTERS if crowded else letters) for line in name.split("\n")),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                rotation=90 if crowded else 0,
                fontsize=9,
                color=theme.muted,
            )
    axes.set_xlim(0.5, places + 0.5)
    axes.grid(False, axis="x")


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """The positions, moved up where needed so that neighbours are at least `gap` apart."""
    moved = list(positions)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for lower, upper in pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + gap)
    return moved
