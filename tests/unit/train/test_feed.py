"""Steps made ready ahead of time: in order, a fault at its place, nothing made for nobody."""

import threading

import pytest

from megatron_klong.train.feed import prefetched


def test_they_come_in_order_made_by_one_other_thread() -> None:
    threads = set()

    def make(number: int) -> int:
        threads.add(threading.get_ident())
        return number * number

    with prefetched(make, range(20)) as made:
        assert [value for value, _ in made] == [number * number for number in range(20)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_the_wait_is_measured() -> None:
    ready = threading.Event()

    def make(number: int) -> int:
        assert number == 0 or ready.wait(10)
        return number

    with prefetched(make, range(2)) as made:
        next(made)
        threading.Timer(0.2, ready.set).start()
        _, waited = next(made)
    assert waited > 0.1


def test_a_fault_comes_where_its_step_would_have() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("torn")
        return number

    with prefetched(make, range(5)) as made:
        assert [next(made)[0], next(made)[0]] == [0, 1]
        with pytest.raises(ValueError, match="torn"):
            next(made)


def test_no_more_than_two_ahead_and_none_after_the_end() -> None:
    asked: list[int] = []

    def make(number: int) -> int:
        asked.append(number)
        return number

    with prefetched(make, range(100)) as made:
        assert next(made)[0] == 0
        assert len(asked) <= 3
    count = len(asked)
    assert count <= 4
    assert asked == list(range(count))
