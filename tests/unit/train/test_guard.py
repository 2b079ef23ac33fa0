"""Which updates are made."""

import math

import pytest

from megatron_klong.train.guard import UpdateGuard


def test_without_a_factor_only_what_is_no_number_is_skipped() -> None:
    guard = UpdateGuard(spike_factor=None, max_skipped=2)
    assert [guard.accepts(1.0, norm) for norm in (0.1, 1e9, math.nan, math.inf)] == [True, True, False, False]
    assert not guard.accepts(math.nan, 1.0)
    assert guard.skipped == 3


@pytest.mark.parametrize(("in_a_row", "gives_up"), [(0, False), (2, False), (3, True)])
def test_it_gives_up_when_more_are_skipped_in_a_row_than_may_be(in_a_row: int, gives_up: bool) -> None:
    guard = UpdateGuard(spike_factor=None, max_skipped=2)
    guard.accepts(1.0, math.nan)
    guard.accepts(1.0, 1.0)  # not in a row with the next ones
    for _ in range(in_a_row):
        guard.accepts(1.0, math.nan)
    assert guard.gives_up is gives_up


def test_a_spike_is_measured_by_the_median_of_what_was_accepted() -> None:
    guard = UpdateGuard(spike_factor=5.0, max_skipped=100)
    assert guard.accepts(1.0, 1000.0)  # too early to tell
    assert all(guard.accepts(1.0, norm) for norm in [0.7, 0.8, 0.9] * 5)
    # 16 norms: 0.7 and 0.8 and 0.9 five times each, and one of 1000: the middle two are 0.8
    assert guard.limit == pytest.approx(4.0)
    assert guard.accepts(1.0, 4.0)
    assert not guard.accepts(1.0, 4.1)
    assert guard.limit == pytest.approx(4.0)  # 17 norms; the skipped one is not among them


def test_a_resumed_one_decides_as_the_other() -> None:
    first = UpdateGuard(spike_factor=3.0, max_skipped=1)
    for n in range(100):
        first.accepts(1.0, 1.0 + n / 100)
    first.accepts(1.0, math.nan)
    second = UpdateGuard(spike_factor=3.0, max_skipped=1)
    second.load_state_dict(first.state_dict())
    assert (second.limit, second.skipped, second.gives_up) == (first.limit, 1, False)
    second.accepts(1.0, math.nan)
    assert second.gives_up
