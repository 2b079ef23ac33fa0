"""Lines of marked text for a terminal: colours if it shows them, wrapped to its width if it has one.

Trained text is green and behind a heavy bar, other text dim and behind a light one; control tokens are reversed, or
in ⟦brackets⟧ without colours; red is what stands in the place of a character that cannot be seen.
"""

import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TextIO


class Style(StrEnum):
    """ANSI codes."""

    PLAIN = ""
    TITLE = "1"
    QUIET = "2"
    BORDER = "36"
    GOOD = "32"
    BAD = "31"
    TRAINED = "32"
    TRAINED_CONTROL = "7;32"
    CONTROL = "2;7"
    SUBSTITUTE = "31"


@dataclass(frozen=True, slots=True)
class Span:
    text: str
    style: Style = Style.PLAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class Terminal:
    """color: whether to write ANSI codes.  columns: where to wrap; None: never."""

    color: bool
    columns: int | None

    @classmethod
    def of(cls, stream: TextIO, color: str) -> "Terminal":
        """color: "always", "never" or "auto" (a terminal, and NO_COLOR is not set)."""
        is_terminal = stream.isatty()
        shown = color == "always" or (color == "auto" and is_terminal and not os.environ.get("NO_COLOR"))
        return cls(color=shown, columns=shutil.get_terminal_size().columns if is_terminal else None)

    def paint(self, text: str, style: Style) -> str:
        """Text in a style, as a string to print."""
        return f"\x1b[{style}m{text}\x1b[0m" if self.color and style and text else text

    def line(self, spans: Iterable[Span]) -> str:
        """Spans as one line."""
        return "".join(self.paint(span.text, span.style) for span in spans)

    def wrapped(self, spans: Iterable[Span], indent: int) -> Iterator[str]:
        """Spans as lines that leave room for an indentation."""
        room = self.columns - indent if self.columns and self.columns > indent + 10 else None
        if room is None:
            yield self.line(spans)
            return
        line: list[Span] = []
        used = 0
        for span in spans:
            start = 0
            for place, character in enumerate(span.text):
                width = _width(character)
                if used + width > room:
                    yield self.line([*line, Span(span.text[start:place], span.style)])
                    line, start, used = [], place, 0
                used += width
            line.append(Span(span.text[start:], span.style))
        yield self.line(line)

    def rule(self, title: str, style: Style = Style.BORDER) -> str:
        """A title in a horizontal rule."""
        width = min(self.columns or 100, 120)
        return self.paint(f"━━ {title} ".ljust(width, "━"), style)


def _width(character: str) -> int:
    """Cells a printable character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
