"""A process that gets nowhere says where it hangs, and ends.

If nothing is finished for `stall_timeout` (the start, a step, a checkpoint, an export), every process prints the stacks
of its threads and ends with the status STALLED, so that the launcher ends them all instead of holding idle GPUs. The
process to look at is the one whose stack differs, or the one that prints none: it is stopped, or its node is gone.

Always (tests/integration/train/test_stall.py): time in which the process itself was suspended does not count.
"""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from types import TracebackType

from megatron_klong.duration import Duration
from megatron_klong.train.failure import ENDING, record_end, this_process

STALLED = 4  # exit status
_TICK_SECONDS = 1.0
_OTHERS_SECONDS = 5.0  # all processes begin to wait at about the same time: each prints before the launcher ends it


class Watchdog:
    """Use as a context manager, and say what is done."""

    def __init__(self, timeout: Duration) -> None:
        self._timeout = timeout
        self._last = "the start of the program"
        self._silent_seconds = 0.0
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="stall watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._over.set()

    def done(self, what: str) -> None:
        """Something is finished: the time begins anew."""
        self._last = what
        self._silent_seconds = 0.0

    def _watch(self) -> None:
        # ticks are counted, not clocks compared: after a suspension the next tick is only the next tick
        while not self._over.wait(_TICK_SECONDS):
            self._silent_seconds += _TICK_SECONDS
            if self._silent_seconds >= self._timeout.in_seconds:
                self._end()

    def _end(self) -> None:
        ENDING.acquire()  # the main thread may yet fail, when another process is gone
        reason = (
            f"nothing finished for {self._timeout} after {self._last}; if that is no hang, raise stall_timeout. "
            f"Its threads:\n{_stacks()}"
        )
        print(f"{this_process()} stalled: {reason}", end="", file=sys.stderr, flush=True)
        record_end(STALLED, reason)
        time.sleep(_OTHERS_SECONDS)
        os._exit(STALLED)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:  # faulthandler needs a descriptor
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
