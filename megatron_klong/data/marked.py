"""A piece of a window -> lines of text with marks: what is a control token, what stands for what cannot be seen.

Always: put together again without marks, the lines hold every character of the piece; a line end beside a control
token or at a border of the piece is written out, one inside text only breaks the line.
"""

from collections.abc import Iterator
from enum import StrEnum

from megatron_klong.data.decoded import Piece
from megatron_klong.data.visible import visible

LINE_END = "⏎"
type MarkedLine = list[tuple[str, Mark]]


class Mark(StrEnum):
    TEXT = "text"
    CONTROL = "control"
    SUBSTITUTE = "substitute"


def marked_lines(piece: Piece) -> Iterator[MarkedLine]:
    """The text of one segment by lines."""
    line: MarkedLine = []
    for run in piece.runs:
        if run.control:
            line.append((run.text, Mark.CONTROL))
            continue
        inner = run.text.strip("\n")
        before = len(run.text) - len(run.text.lstrip("\n")) if inner else len(run.text)
        for _ in range(before):
            yield [*line, (LINE_END, Mark.SUBSTITUTE)]
            line = []
        for text, substituted in visible(inner):
            first, *others = text.split("\n")
            line.append((first, Mark.SUBSTITUTE if substituted else Mark.TEXT))
            for other in others:
                yield line
                line = [(other, Mark.TEXT)]
        for _ in range(len(run.text) - before - len(inner)):
            yield [*line, (LINE_END, Mark.SUBSTITUTE)]
            line = []
    if line:
        yield line
