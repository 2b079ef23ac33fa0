"""Which tasks are held out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.data.splits import held_out

KEYS = [f"task:{number}" for number in range(2000)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_about_the_share_of_them(share: float) -> None:
    held = held_out([KEYS], [share])
    assert abs(len(held) / len(KEYS) - share) < 0.03


def test_none_and_all() -> None:
    assert held_out([KEYS], [0.0]) == frozenset()
    assert held_out([KEYS], [1.0]) == frozenset(KEYS)


@given(st.sets(st.sampled_from(KEYS), min_size=1), st.sets(st.sampled_from(KEYS)), st.floats(0.05, 0.9))
def test_more_data_moves_no_task(few: set[str], more: set[str], share: float) -> None:
    threshold = held_out([KEYS], [share])
    assert held_out([sorted(few)], [share]) - threshold <= {min(few, key=lambda k: k)} or len(few) >= 1
    held = held_out([sorted(few | more)], [share])
    assert held & few <= held_out([sorted(few)], [share])
    assert (held_out([sorted(few)], [share]) & threshold) <= held


def test_a_small_source_holds_out_one_all_the_same() -> None:
    for key in KEYS[:50]:
        assert held_out([[key, *KEYS[50:53]]], [1e-6])
    assert len(held_out([KEYS[:3]], [1e-6])) == 1


def test_what_one_source_holds_out_is_out_for_all() -> None:
    assert held_out([["task:x"], ["task:x", "task:y"]], [1.0, 0.0]) == {"task:x"}
