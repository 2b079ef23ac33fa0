"""The data of each step, made ready by a thread while the step before it is trained."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_klong.data.batch import PackedBatch
from megatron_klong.data.blend import Blend
from megatron_klong.data.packing import Row

_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """batches: this process's; everything else: of the global batch."""

    batches: list[PackedBatch]
    window_tokens: list[int]
    prefix_tokens: int


def step_data(blend: Blend, rows: Sequence[Row], *, part: int, parts: int) -> StepData:
    """Pack what process `part` of `parts` trains of these rows."""
    windows = [number for row in rows for number in row]
    return StepData(
        batches=blend.batches(rows, part=part, parts=parts),
        window_tokens=blend.lengths_tokens[windows].tolist(),
        prefix_tokens=int(blend.prefix_tokens[windows].sum()),
    )


@contextmanager
def prefetched[T](make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[Iterator[tuple[T, float]]]:
    """`make(n)` for each number, in order, by one thread that is two ahead; each with the seconds it was waited for."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        left = iter(numbers)
        waiting: deque[Future[T]] = deque()

        def ask() -> None:
            if (number := next(left, None)) is not None:
                waiting.append(thread.submit(make, number))

        def results() -> Iterator[tuple[T, float]]:
            while waiting:
                started = time.monotonic()
                made = waiting.popleft().result()
                waited = time.monotonic() - started
                ask()
                yield made, waited

        for _ in range(_AHEAD):
            ask()
        try:
            yield results()
        finally:
            thread.shutdown(cancel_futures=True)
