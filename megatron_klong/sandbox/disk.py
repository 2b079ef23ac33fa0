"""How much a sandbox's files take, and the end of commands that take more than they may.

Neither a quota nor a file system of its own can be had without privileges, so commands are watched: every
WATCH_SECONDS the free space of the file system is looked at, which is cheap, and when that fell by half of what is
left to the sandbox, from the most that there was since its files were last counted, they are counted again, in a
thread. What others delete just then hides what is written, so they are also counted when nothing seems to happen: as
often as that costs a five-hundredth of the time, after LEAST_SECONDS at the soonest and MOST_SECONDS at the latest.
That is how long a command can write unseen where others delete as fast; elsewhere it exceeds the limit by what it
writes in WATCH_SECONDS and in the time that counting takes. `fallocate`, which would take all at once, is refused by
the filter of system calls.

What counts: blocks, not lengths (a sparse file is as small as it is), a file with several names once, each directory
entry towards the number of files, and files that were deleted but are still open in one of the sandbox's processes.
Not seen are deleted files that only a memory mapping or a message in a socket holds.

The count walks an agent's files from outside. It opens nothing but directories, by descriptor and never through a
link, and compares what `..` leads back to with where it came from. An agent that moves its directories about can make
a count incomplete: then all that the file system has lost, from the most it had since the last complete one, is taken
for its own.
"""

import asyncio
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

WATCH_SECONDS = 0.25
BLOCK_BYTES = 512  # of st_blocks, on every file system
ATTEMPTS = 3
COUNT_SHARE = 4  # counting takes at most a fifth of the time, unless what is left may be used up already
IDLE_SHARE, LEAST_SECONDS, MOST_SECONDS = 500, 1.0, 30.0  # and a five-hundredth where nothing seems to be written
MOST_COUNTED = 4  # times the limit: beyond it, how much more does not matter
SLACK_BYTES = 1024**2  # that a command in a full sandbox may add, in directories for instance


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What files take. `complete` is False where counting was led astray, so that there may be more."""

    bytes: int
    files: int
    complete: bool = True


class DiskWatch:
    """What the files of one sandbox take, as far as that is known, and when to count them again."""

    def __init__(self, directory: Path, names: Sequence[str], *, most_bytes: int, most_files: int) -> None:
        """The files are those below `names` in `directory`; there are none yet."""
        self._directory = directory
        self._names = names
        self._most = Usage(bytes=most_bytes, files=most_files)
        self._allowed = self._most
        self._usage = Usage(bytes=0, files=0)
        self._complete = self._usage  # the last count that was, and the most that the file system had left since
        self._free = free(directory)
        self._counted_at = time.monotonic()
        self._count_seconds = 0.0

    @property
    def full(self) -> bool:
        """Whether there was more than there may be when it was counted last, or there may have been."""
        return self._usage.bytes > self._most.bytes or self._usage.files > self._most.files

    @property
    def usage(self) -> Usage:
        """As it was counted last; what was not counted is taken to be as large as it can be."""
        return self._usage

    async def before_command(self, pids: Callable[[], Iterable[int]]) -> None:
        """Count if need be. What is there already may stay, so that a command can delete some of it."""
        if self.full or self._is_time():
            await self._count(pids)
            if not self._usage.complete:
                return
            slack = SLACK_BYTES if self.full else 0
            self._allowed = Usage(
                bytes=max(self._most.bytes, self._usage.bytes + slack), files=max(self._most.files, self._usage.files)
            )

    async def exceeded(self, pids: Callable[[], Iterable[int]]) -> bool:
        """Count if need be; whether there is more than allowed, or may be, where it could not be counted."""
        if not self._is_time():
            return False
        await self._count(pids)
        return self._usage.bytes > self._allowed.bytes or self._usage.files > self._allowed.files

    def _is_time(self) -> bool:
        """Whether so much was written, by whomever, that this sandbox may be near its limit; or it is long ago."""
        age = time.monotonic() - self._counted_at
        bytes_left, files_left = free(self._directory)
        self._free = max(self._free[0], bytes_left), max(self._free[1], files_left)
        bytes_gone, files_gone = self._free[0] - bytes_left, self._free[1] - files_left
        bytes_room = self._allowed.bytes - self._complete.bytes
        files_room = self._allowed.files - self._complete.files
        if bytes_gone > bytes_room or files_gone > files_room:
            return True
        if age < COUNT_SHARE * self._count_seconds:
            return False
        idle = min(max(IDLE_SHARE * self._count_seconds, LEAST_SECONDS), MOST_SECONDS)
        return age > idle or bytes_gone > bytes_room / 2 or files_gone > files_room / 2

    async def _count(self, pids: Callable[[], Iterable[int]]) -> None:
        def counted() -> Usage:
            most_bytes, most_files = MOST_COUNTED * self._most.bytes, MOST_COUNTED * self._most.files
            return count(self._directory, self._names, pids(), most_bytes=most_bytes, most_files=most_files)

        started, left = time.monotonic(), free(self._directory)
        found = await asyncio.to_thread(counted)
        if found.complete:
            self._complete, self._free = found, left
        else:
            bytes_gone, files_gone = (max(0, before - now) for before, now in zip(self._free, left, strict=True))
            found = replace(
                found,
                bytes=max(found.bytes, self._complete.bytes + bytes_gone),
                files=max(found.files, self._complete.files + files_gone),
            )
        self._usage = found
        self._counted_at = time.monotonic()
        self._count_seconds = self._counted_at - started


class _LedAstray(Exception):
    """A directory was moved while it was read: `..` is not where we came from."""


@dataclass(kw_only=True, slots=True)
class _Count:
    """A count under way."""

    most_bytes: int
    most_files: int
    bytes: int = 0
    files: int = 0
    devices: set[int] = field(default_factory=set)
    seen: set[tuple[int, int]] = field(default_factory=set)  # of files with several names: (device, inode)

    def add(self, found: os.stat_result) -> None:
        self.files += 1
        if found.st_nlink != 1 and not stat.S_ISDIR(found.st_mode):
            if (found.st_dev, found.st_ino) in self.seen:
                return
            self.seen.add((found.st_dev, found.st_ino))
        self.bytes += found.st_blocks * BLOCK_BYTES

    @property
    def enough(self) -> bool:
        return self.bytes > self.most_bytes or self.files > self.most_files


def count(directory: Path, names: Sequence[str], pids: Iterable[int], *, most_bytes: int, most_files: int) -> Usage:
    """Count the files below `names` in `directory` (which is ours), and deleted ones that these processes hold open.

    Stops above either limit.
    """
    counted, complete = _Count(most_bytes=most_bytes, most_files=most_files), True
    for name in names:
        for _ in range(ATTEMPTS):
            attempt = replace(counted, devices=set(counted.devices), seen=set(counted.seen))
            try:
                _count_tree(directory, name, attempt)
                break
            except _LedAstray:
                continue
        else:  # what was found so far counts, and the next count has its attempts too
            complete = False
        counted = attempt
    for found in _deleted_but_open(pids):
        if found.st_dev in counted.devices and not counted.enough:
            counted.add(found)
    return Usage(bytes=counted.bytes, files=counted.files, complete=complete)


def free(path: Path) -> tuple[int, int]:
    """(bytes, files) that the file system has left; files are 0 where it does not count them, both once it is gone."""
    try:
        found = os.statvfs(path)
    except FileNotFoundError:
        return 0, 0
    return found.f_bfree * found.f_frsize, found.f_ffree


def descendants(pid: int) -> Iterator[int]:
    """All processes below one."""
    parents = [pid]  # no recursion: the agent decides how deep they are
    while parents:
        parent = parents.pop()
        with suppress(FileNotFoundError, ProcessLookupError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    children = [int(child) for child in file.read().split()]
                yield from children
                parents += children


def _count_tree(directory: Path, name: str, counted: _Count) -> None:
    """Count all below directory/name, holding two descriptors at any depth. _LedAstray."""
    try:
        ours = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # the sandbox was closed
        return
    try:
        current = _open_directory(name, ours)
    finally:
        os.close(ours)
    if current is None:
        return
    try:
        place = _place(current)
        counted.devices.add(place[0])
        inner = _entries(current, counted)
        above: list[tuple[tuple[int, int], list[str]]] = []  # by level: (the directory, those in it still to enter)
        while not counted.enough and (inner or above):
            if inner:
                entered = _open_directory(inner.pop(), current)
                if entered is None:
                    continue
                os.close(current)
                current = entered
                above.append((place, inner))
                place, inner = _place(current), _entries(current, counted)
            else:
                place, inner = above.pop()
                left = _open_directory("..", current)
                if left is None:
                    raise _LedAstray
                os.close(current)
                current = left
                if _place(current) != place:
                    raise _LedAstray
    finally:
        os.close(current)


def _place(directory: int) -> tuple[int, int]:
    found = os.fstat(directory)
    return found.st_dev, found.st_ino


def _entries(directory: int, counted: _Count) -> list[str]:
    """Count what is in a directory; the names of the directories among it."""
    inner = []
    with suppress(OSError), os.scandir(directory) as entries:  # removed meanwhile
        for entry in entries:
            with suppress(OSError):
                counted.add(entry.stat(follow_symlinks=False))
                if entry.is_dir(follow_symlinks=False):
                    inner.append(entry.name)
            if counted.enough:
                break
    return inner


def _open_directory(name: str, parent: int) -> int | None:
    """A descriptor; None when it is gone, or no directory any more.

    One that its owner made unreadable, to itself and so to a runner without privileges, is made readable to it.
    """
    flags = os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(name, os.O_RDONLY | flags, dir_fd=parent)
    except PermissionError:  # never for root
        pass
    except OSError:
        return None
    try:
        handle = os.open(name, os.O_PATH | flags, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IMODE(os.fstat(handle).st_mode) | stat.S_IRUSR | stat.S_IXUSR)
        finally:
            os.close(handle)
        return os.open(name, os.O_RDONLY | flags, dir_fd=parent)
    except OSError:
        return None


def _deleted_but_open(pids: Iterable[int]) -> Iterator[os.stat_result]:
    for pid in pids:
        with suppress(OSError):  # it ended
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    found = os.stat(f"/proc/{pid}/fd/{descriptor}")
                    if found.st_nlink == 0 and stat.S_ISREG(found.st_mode):
                        yield found
