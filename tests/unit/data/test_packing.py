"""Packing: every window in exactly one row, no row too long, the same rows every time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.data.packing import PackingError, pack_rows

ROW_TOKENS = 50
lengths = st.lists(st.integers(1, ROW_TOKENS), max_size=60)


def test_the_tightest_row_is_chosen() -> None:
    # by length: 7 opens row 0 (3 left), 5 opens row 1 (5 left), 4 fits row 1 only (1 left), 3 fits row 0 exactly
    assert pack_rows([5, 7, 3, 4], row_tokens=10) == [(1, 2), (0, 3)]


def test_of_two_rows_the_fuller_one_takes_a_window() -> None:
    # 8 and 7 open rows with 2 and 3 left; the 2 goes where it leaves nothing
    assert pack_rows([7, 8, 2], row_tokens=10) == [(1, 2), (0,)]


@given(lengths)
def test_every_window_is_in_exactly_one_row(lengths_tokens: list[int]) -> None:
    rows = pack_rows(lengths_tokens, row_tokens=ROW_TOKENS)
    assert sorted(window for row in rows for window in row) == list(range(len(lengths_tokens)))
    assert all(rows)


@given(lengths)
def test_no_row_is_too_long_and_no_two_rows_fit_into_one(lengths_tokens: list[int]) -> None:
    rows = pack_rows(lengths_tokens, row_tokens=ROW_TOKENS)
    filled = sorted(sum(lengths_tokens[window] for window in row) for row in rows)
    assert all(tokens <= ROW_TOKENS for tokens in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > ROW_TOKENS


@given(lengths)
def test_the_same_lengths_give_the_same_rows(lengths_tokens: list[int]) -> None:
    assert pack_rows(lengths_tokens, row_tokens=ROW_TOKENS) == pack_rows(tuple(lengths_tokens), row_tokens=ROW_TOKENS)


def test_a_window_longer_than_a_row_is_an_error_with_the_numbers() -> None:
    with pytest.raises(PackingError, match=r"windows 1, 3 are longer than a row of 10 tokens \(the longest has 12\)"):
        pack_rows([10, 11, 1, 12], row_tokens=10)


def test_an_empty_window_is_an_error() -> None:
    with pytest.raises(PackingError, match="windows 1 have no tokens"):
        pack_rows([3, 0], row_tokens=10)


def test_windows_take_up_multiples() -> None:
    # 5, 3 and 4 tokens take up 8, 4 and 4 of rows of 12
    assert pack_rows([5, 3, 4], row_tokens=12, window_multiple=4) == [(0, 1), (2,)]
    with pytest.raises(PackingError, match="the longest has 16"):
        pack_rows([13], row_tokens=14, window_multiple=4)
