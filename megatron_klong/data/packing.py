"""Windows -> rows of a fixed length, several windows a row, by best fit decreasing.

Example: windows of 5, 7, 3 and 4 tokens in rows of 10. By length: 7, 5, 4, 3. The 7 opens row 0 (3 left), the 5 row 1
(5 left), the 4 fits row 1 only (1 left), the 3 fits row 0: rows [[1, 2], [0, 3]], one token of padding in all.

Always (tests/unit/data/test_packing.py): every window is in exactly one row; no row is longer than `row_tokens`; the
same lengths give the same rows; no two rows would fit into one. What does not fit is an error, never cut or dropped.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

type Row = tuple[int, ...]  # window numbers, in the order they stand in the row


class PackingError(ValueError):
    """Windows that no row can hold; the message names them and the cure."""


def padded_length(length_tokens: int, multiple: int) -> int:
    """The next multiple."""
    return -(-length_tokens // multiple) * multiple


def pack_rows(lengths_tokens: Sequence[int], *, row_tokens: int, window_multiple: int = 1) -> list[Row]:
    """Rows in the order they were opened, the ones with the longest windows first. Raises PackingError.

    window_multiple: each window takes up a multiple of so many tokens.
    """
    lengths_tokens = [padded_length(int(length), window_multiple) for length in lengths_tokens]
    _refuse_what_fits_no_row(lengths_tokens, row_tokens)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted: the tightest fit is one bisection away
    for window in sorted(range(len(lengths_tokens)), key=lambda number: (-lengths_tokens[number], number)):
        length = lengths_tokens[window]
        place = bisect_left(room, (length, 0))
        if place == len(room):
            rows.append([window])
            free, row = row_tokens - length, len(rows) - 1
        else:
            free, row = room.pop(place)
            rows[row].append(window)
            free -= length
        if free:
            insort(room, (free, row))
    return [tuple(row) for row in rows]


def _refuse_what_fits_no_row(lengths_tokens: Sequence[int], row_tokens: int) -> None:
    empty = [window for window, length in enumerate(lengths_tokens) if length <= 0]
    if empty:
        raise PackingError(f"windows {_some(empty)} have no tokens; preprocess again")
    too_long = [window for window, length in enumerate(lengths_tokens) if length > row_tokens]
    if too_long:
        longest = max(lengths_tokens)
        raise PackingError(
            f"windows {_some(too_long)} are longer than a row of {row_tokens} tokens (the longest has {longest}); "
            f"set row_tokens to {longest} or more, or preprocess with shorter windows"
        )


def _some(numbers: Sequence[int], shown: int = 5) -> str:
    text = ", ".join(map(str, numbers[:shown]))
    return text if len(numbers) <= shown else f"{text} and {len(numbers) - shown} more"
