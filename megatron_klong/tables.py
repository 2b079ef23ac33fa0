"""Tables in a terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, indent: str = "") -> list[str]:
    """Rows of cells as lines of a table: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
