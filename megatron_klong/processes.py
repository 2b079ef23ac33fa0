"""Child processes that do not outlive their parent."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


ANCESTOR = "KLONG_ANCESTOR"  # process id, on this machine, without which a program has no reason to run


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it is gone, however that happens.

    parent: its process id. Without that, a parent that went before this was called is not noticed; where ANCESTOR is
    set, its end is.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
    ancestor = os.environ.get(ANCESTOR)
    if ancestor and not os.path.exists(f"/proc/{ancestor}"):
        os._exit(1)


def end_with_launcher() -> None:
    """The same where another program started this one for its own purposes; on its own a program runs on."""
    if ANCESTOR in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def start(
    command: Sequence[str], *, output: int | IO[bytes], errors: int | IO[bytes], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own: Ctrl-C reaches it through its parent, which ends it with `stop`."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=partial(end_with_parent, os.getpid()),
    )


def run(command: Sequence[str], *, output: IO[bytes], environment: Mapping[str, str], stop_seconds: float) -> int:
    """Run a program to its end, all it prints into `output`; its exit status. Interrupted, it takes it along."""
    process = start(command, output=output, errors=subprocess.STDOUT, environment=environment)
    try:
        return process.wait()
    finally:
        stop(process, seconds=stop_seconds)


def stop(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    """End it and all it started: first politely, then, after so many seconds, by force."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
