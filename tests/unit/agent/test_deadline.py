"""One deadline: it counts working time and keeps what was waited."""

import pytest

from megatron_klong.agent.deadline import Deadline, readable_seconds


def test_the_deadline_stands_still_while_others_are_awaited() -> None:
    total, working = [100.0], [40.0]
    deadline = Deadline(60, total=lambda: total[0], working=lambda: working[0])
    total[0], working[0] = 140.0, 60.0  # 40 seconds passed, 20 of them waiting
    assert (deadline.elapsed, deadline.remaining, deadline.waited) == (20.0, 40.0, 20.0)
    total[0], working[0] = 190.0, 110.0
    assert (deadline.remaining, deadline.waited) == (-10.0, 20.0)


@pytest.mark.parametrize("give_back", [True, False])
def test_what_the_machinery_takes_is_none_of_the_episodes(give_back: bool) -> None:
    total, working = [100.0], [40.0]
    deadline = Deadline(60, total=lambda: total[0], working=lambda: working[0], give_back=give_back)
    total[0], working[0] = 130.0, 50.0
    for _ in range(2):
        assert (deadline.total, deadline.waited) == (30.0, 20.0)
        with deadline.left_out():
            total[0], working[0] = total[0] + 10, working[0] + 10
            assert (deadline.total, deadline.waited) == (30.0, 20.0)
            assert deadline.remaining == (50.0 if give_back else 30.0)
    assert deadline.remaining == (50.0 if give_back else 30.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3700, "1h 1m"), (200.9, "3m 20s"), (42, "42s"), (-5, "0s"), (3600, "1h 0m")]
)
def test_reminders_are_readable(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text
