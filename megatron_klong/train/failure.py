"""The first failure among the processes of a run, told before the failures that only follow from it.

Where one process fails, the others lose their connection to it and fail as well, or wait for ever. Therefore

- a process that fails prints its traceback, then leaves it in the file that FIRST_END names: only the first one can
  create it (no clocks are compared), and slurm/sft.sh shows it in its log; for torchrun, it goes to its error file;
- one that has merely lost a connection waits for the cause to be told, and then says no more than that;
- both are gone at once: what tears down process groups at the end of a program may wait for the others.

What ends a process without Python's knowledge is written to the same file by slurm/task.sh, in the same form.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

FIRST_END = "KLONG_FIRST_END"  # the path; "rank 3 on n2: exit status 1", and why
ENDING = threading.Lock()  # taken for good by the thread that ends this process: its exit status counts
_FAILED = 1  # exit status, as Python's own
_CAUSE_SECONDS = 5.0


def tell_first_failure() -> None:
    """From now on an uncaught exception ends a process among others in the way described above."""
    faulthandler.enable()  # a crash in compiled code prints where Python was
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.excepthook = _end


def record_end(status: int, reason: str) -> None:
    """Leave word for the launcher, unless another process was first."""
    path = os.environ.get(FIRST_END)
    if path is None:
        return
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"{this_process()}: exit status {status}\n{reason}")
    except FileExistsError:
        return


def this_process() -> str:
    """As people look for it: rank and node."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"rank {os.environ.get('RANK', '0')} on {node}"


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, Exception):  # Ctrl-C
        sys.__excepthook__(kind, error, trace)
        return
    ENDING.acquire()
    cause = _wait_for_cause() if _is_lost_connection(error) else None
    reason = "".join(traceback.format_exception(kind, error, trace))
    said = f"lost its connections, after this: {cause}\n" if cause else f"failed:\n{reason}"
    # torch has put a hook around this one, in which sys.stderr is a string to be printed afterwards
    print(f"{this_process()} {said}", end="", file=sys.__stderr__, flush=True)
    record_end(_FAILED, reason)
    _tell_torchrun(error)
    sys.stdout.flush()
    os._exit(_FAILED)


def _is_lost_connection(error: BaseException) -> bool:
    """gloo raises a plain RuntimeError that names its own source file, NCCL and the store have classes of their own."""
    if "torch.distributed" not in sys.modules:
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _wait_for_cause() -> str | None:
    """Who failed first, if that is told in time. The launcher ends this process as soon as it sees that one's end."""
    path = os.environ.get(FIRST_END)
    deadline = time.monotonic() + _CAUSE_SECONDS
    while time.monotonic() < deadline:
        if path and Path(path).exists():
            return Path(path).read_text(encoding="utf-8").partition("\n")[0]
        time.sleep(0.1)
    return None


def _tell_torchrun(error: BaseException) -> None:
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:  # it formats the exception that is being handled
        raise error
    except type(error):
        get_error_handler().record_exception(error)
