"""The folder of a run that is not finished: its parts, and who is at work in it.

    PREFIX.parts/        parts by name: see megatron_klong.data.parts
    PREFIX.parts/run     what the run is made of, as a digest: a run of other settings or input is another run
    PREFIX.parts/lock    held by the process that makes the shard, or shared by the tasks of a job array

Always: the folder goes when the shard stands; until then a run that is started again with the same arguments goes on.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_klong.data.shard_files import MANIFEST, PARTS, ShardError, check_prefix, shard_file
from megatron_klong.files import write_atomically

SUFFIX = ".parts"
_WAIT_SECONDS = 5.0  # a lock of a process that was killed is gone at once, but maybe not on another machine


@contextmanager
def work_folder(prefix: Path, run: str, *, overwrite: bool, shared: bool) -> Iterator[Path]:
    """The folder of this run, locked. Raises ShardError if the output is there already or another run is at work."""
    check_prefix(prefix, overwrite=True)
    folder = shard_file(prefix, SUFFIX)
    if not overwrite and not _is_ours(folder, run):
        check_prefix(prefix, overwrite=False)
    with _locked(folder, shared=shared):
        if not _is_ours(folder, run):
            if not overwrite:  # again: another run may have finished while this one waited for the lock
                check_prefix(prefix, overwrite=False)
            write_atomically(folder / "run", run)
        if not shared:
            _remove_leftovers(prefix)
        yield folder


def discard(folder: Path) -> None:
    """Remove a folder whose parts are of no more use; if that is cut short, no run takes the rest for its own."""
    (folder / "run").unlink()
    shutil.rmtree(folder)


def _is_ours(folder: Path, run: str) -> bool:
    """Whether an interrupted run of the same settings and input worked here: then half an output is its own."""
    file = folder / "run"
    return file.exists() and file.read_text() == run


@contextmanager
def _locked(folder: Path, *, shared: bool) -> Iterator[None]:
    """Make the folder, and hold its lock: that of the folder which is there, not of one that its run has removed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / "lock").open("ab")
        except FileNotFoundError:  # removed meanwhile
            continue
        with lock:
            _lock(lock.fileno(), folder, shared=shared)
            if os.fstat(lock.fileno()).st_nlink:
                yield
                return


def _lock(descriptor: int, folder: Path, *, shared: bool) -> None:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise ShardError(
                    f"{folder}: another run is at work here; wait for it, or choose another output prefix"
                ) from error
            time.sleep(0.1)
        else:
            return


def _remove_leftovers(prefix: Path) -> None:
    """Temporary files of a process that was killed while it wrote the output."""
    for suffix in (*PARTS, MANIFEST):
        for file in prefix.parent.glob(f".{prefix.name}{suffix}.*.tmp"):
            os.unlink(file)
