"""Shares of one long work, each in a process of its own, with one progress bar for all.

Always: workers do not outlive the process that started them, and the first error ends them all
(tests/integration/model/test_convert_kills.py).
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_klong.files import checksum
from megatron_klong.processes import end_with_parent

type Step = Callable[[int], object]
"""To be called by a share after each part of its work, with the bytes done; may raise to end the share."""

_MOST_WORKERS = 8
_POLL_SECONDS = 0.2


class _Bar(tqdm):  # type: ignore[type-arg]
    """Without the thread that tqdm starts to look after bars which nobody moves."""

    monitor_interval = 0


class WorkerError(RuntimeError):
    """A worker died; the message says what to do."""


def one_thread() -> None:
    """Before torch is imported: it computes in this thread alone. The processes are the threads."""
    os.environ["OMP_NUM_THREADS"] = "1"


def default_processes() -> int:
    """One for each processor this process may use, but not more than disks like."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def in_shares[Share, Result](
    work: Callable[[Share, Step], Result],
    shares: Sequence[Share],
    *,
    processes: int,
    description: str,
    total_bytes: int,
) -> list[Result]:
    """`work` on each share; the results in order. One process: right here, one after the other.

    `work` must be a function of a module, and shares and results must pickle. Raises what `work` raises, WorkerError.
    """
    with _bar(total_bytes, description) as bar:
        if processes == 1 or len(shares) == 1:
            return [work(share, bar.update) for share in shares]
        context = multiprocessing.get_context(_start_method())
        done, stop = context.Value("q", 0), context.Event()
        with ProcessPoolExecutor(
            min(processes, len(shares)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(os.getpid(), done, stop),
        ) as pool:
            futures = [pool.submit(_work, work, share) for share in shares]
            pending = set(futures)
            try:
                while pending:
                    finished, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                    bar.update(done.value - bar.n)
                    for future in finished:
                        future.result()
                return [future.result() for future in futures]
            except BrokenProcessPool as error:
                raise WorkerError(
                    "a worker process was killed, most likely for want of memory; run the command again with fewer "
                    "--processes"
                ) from error
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)


def checksums_of(files: Sequence[Path], *, processes: int) -> list[dict[str, Any]]:
    """Size and SHA-256 of each file, so many at a time; in threads, since hashing leaves Python alone."""
    total = sum(file.stat().st_size for file in files)
    with _bar(total, "checksums") as bar, ThreadPoolExecutor(processes) as pool:
        found = []
        for one in pool.map(checksum, files):
            bar.update(one["bytes"])
            found.append(one)
        return found


def _bar(total_bytes: int, description: str) -> _Bar:
    return _Bar(total=total_bytes, desc=description, unit="B", unit_scale=True, delay=2, disable=None)


def _start_method() -> str:
    """A fork need not import torch, which takes seconds; but it inherits whatever other threads hold just then."""
    return "fork" if len(os.listdir("/proc/self/task")) == 1 else "spawn"


# -- in a worker

_done: Any = None
_stop: Any = None


class _StoppedError(Exception):
    """Another share failed."""


def _start_worker(parent: int, done: Any, stop: Any) -> None:
    global _done, _stop
    end_with_parent(parent)
    one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent says when to end
    _done, _stop = done, stop


def _work(work: Callable[[Any, Step], Any], share: Any) -> Any:
    return work(share, _step)


def _step(size: int) -> None:
    if _stop.is_set():
        raise _StoppedError
    with _done.get_lock():
        _done.value += size
