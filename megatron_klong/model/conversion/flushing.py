"""Writing more than memory holds: what was written goes to the disk and out of the page cache while the work goes on.

Left to itself the kernel fills memory with files that nobody will read again, and a machine that lends its memory out,
as virtual ones do, is then slow to get more. The end of the work has only the last piece to wait for.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

_PIECE_BYTES = 128 << 20
_PIECES_AHEAD = 2


class Flusher:
    """For one writer, of one file or of several. A context manager: left without an error, all is on the disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._unflushed: dict[int, int] = {}

    def wrote(self, descriptor: int, size: int) -> None:
        """To be told of what was written. Raises OSError for what could not be brought to the disk earlier."""
        self._unflushed[descriptor] = self._unflushed.get(descriptor, 0) + size
        if sum(self._unflushed.values()) >= _PIECE_BYTES:
            for written in self._unflushed:
                self._flush(written)
            self._unflushed.clear()

    def finish(self, descriptor: int) -> None:
        """Before a file is closed. Raises OSError."""
        self._unflushed.pop(descriptor, None)
        self._flush(descriptor)
        while self._pending:
            self._pending.popleft().result()

    def _flush(self, descriptor: int) -> None:
        self._pending.append(self._thread.submit(_to_disk, descriptor))
        while len(self._pending) > _PIECES_AHEAD:
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)


def _to_disk(descriptor: int) -> None:
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
