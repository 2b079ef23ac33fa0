"""The most memory that a piece of a program held at once, to compare a plan with.

On a CPU it is the running sum over the allocations and releases of torch's allocator, which the profiler records one by
one: every tensor counts, those that only autograd holds and those that live inside one operation alike. What libraries
allocate by themselves (the workspaces of matrix products) does not. What was there before is not known, so a model to
be counted is made by `prepare`. The profiler sees the calling thread only, while threads of gloo may be the last to let
go of what they sent; so waiting for a collective takes a moment longer, in which they do, and a block that was handed
out twice without a release in between is counted once (`unseen_bytes` says how much that was).

On a GPU the allocator keeps the peak itself; that branch has not been run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_MARK = "klong measured piece"
_SETTLING_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPeak:
    """before_bytes: held when the measured piece began; peak_bytes: most held at once during it."""

    before_bytes: int
    peak_bytes: int
    unseen_bytes: int = 0


def measure[State](prepare: Callable[[], State], work: Callable[[State], object]) -> MeasuredPeak:
    """Peak during `work(state)`, where `state = prepare()` counts as held."""
    import torch

    if not torch.cuda.is_available():
        return _measure_on_cpu(prepare, work)
    state = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(state)
    torch.cuda.synchronize()
    return MeasuredPeak(before_bytes=before, peak_bytes=torch.cuda.max_memory_allocated())


def _measure_on_cpu[State](prepare: Callable[[], State], work: Callable[[State], object]) -> MeasuredPeak:
    from torch.profiler import ProfilerActivity, profile, record_function

    with _settled_collectives(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = prepare()
        with record_function(_MARK):
            work(state)
    started = 0
    changes: list[tuple[int, int, int]] = []  # nanosecond, address, bytes
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name == _MARK:
            started = event.start_time_ns
    return _peak(sorted(changes, key=lambda change: change[0]), started)


def _peak(changes: list[tuple[int, int, int]], started: int) -> MeasuredPeak:
    """Allocations are positive, releases negative; those before `started` make up what is held at the start."""
    blocks: dict[int, int] = {}
    held = before = peak = unseen = 0
    for moment, address, size in changes:
        if size > 0:
            lost = blocks.pop(address, 0)
            unseen += lost
            held += size - lost
            blocks[address] = size
        else:
            held -= blocks.pop(address, 0)
        if moment < started:
            before = peak = held
        peak = max(peak, held)
    return MeasuredPeak(before_bytes=before, peak_bytes=peak, unseen_bytes=unseen)


@contextmanager
def _settled_collectives() -> Iterator[None]:
    """Meanwhile waiting for a collective takes a moment more, so that gloo's thread lets go of its tensors first."""
    from torch.distributed import Work

    wait = Work.wait

    def settled(work: Work, *arguments: Any, **options: Any) -> bool:
        done = wait(work, *arguments, **options)
        time.sleep(_SETTLING_SECONDS)
        return done

    setattr(Work, "wait", settled)  # noqa: B010  # a method, which may not be assigned to
    try:
        yield
    finally:
        setattr(Work, "wait", wait)  # noqa: B010
