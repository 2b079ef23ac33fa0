"""The first process inside every sandbox: a shell that says it is there, waits for leave, and runs the command.

Whatever set the sandbox up (bubblewrap, apptainer), the same happens inside, by any POSIX shell:
    1  limit itself and so all it starts (`ulimit`); not from outside, where RLIMIT_NPROC would count all sandboxes
    2  print STARTED to stderr: all before it was set-up, and a fault of that is the provider's
    3  read GO or GO_WITH_INPUT from stdin; without an answer nothing runs
    4  run the command, and end as it ended

It is ours, and not the provider's own, for an order of events: when the command ends, process 1 ends, the kernel
kills whatever else is inside and only then lets the provider see the end. bwrap's own would let it see the end at
once, while daemons still die.

STARTED is answered because bwrap asks the kernel to die with its parent only late in its set-up, so a runner killed
before that would leave a command that nobody ends. Here that request is in force: if the runner is dead there will
be no answer, and if it is alive its death will be ours.
"""

import os
import resource
from collections.abc import Sequence

from megatron_klong.sandbox.limits import KIB, SandboxLimits

HOME = "/home"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": HOME,
    "LANG": "C.UTF-8",
}
LOGIN = ("/bin/sh", "-c", "cd && exec /bin/sh -l")  # in its place, for people
SHELL_NAME = "sandbox"  # what process 1 calls itself in its messages: "sandbox: 1: exec: ...: not found"
STARTED = b"\0"  # the first byte on stderr, when all is set up; what comes before it is a fault of the set-up
GO_WITH_INPUT, GO = b"given\n", b"none\n"  # the answer to it on stdin: does input follow, or is it /dev/null?
ULIMIT_BLOCK = 512

# The shell's own stderr is closed at the end: it would remark on a killed command ("Killed"), which is ours to say.
# What it would rightly remark on, that it cannot fork, is said by a trap.
_WAIT = r"""printf '\000' >&2
read -r klong_stdin || exit 125
[ "$klong_stdin" = given ] || exec </dev/null
cd -- "$1" || exit 126
"""
# STARTED once more on stderr: from here on all goes to the file.
_TO_FILE = r"""mkdir -p -- "${2%/*}/" || exit 126
[ ! -p "$2" ] || { echo "sandbox: $2: Invalid argument" >&2; exit 126; }
true >"$2" || exit 126
exec 4>&2 >"$2" 2>&1
printf '\000' >&4
exec 4>&-
shift
"""
_RUN = """shift
unset OLDPWD klong_stdin
exec 3>&2 2>/dev/null
trap 'echo "sandbox: cannot fork" >&3; exit 126' EXIT
(exec "$@" 2>&3 3>&-)
set -- $?
trap - EXIT
exit $1"""


def first_process(limits: SandboxLimits, *, address_space: bool, full: bool, output_to_file: bool = False) -> list[str]:
    """The arguments that start it; to follow are a directory, with `output_to_file` a file, and the command.

    `address_space`: whether each process is limited to `memory_bytes` of it, for want of a better limit of memory.
    `full`: no file may grow.
    """
    script = (
        _ulimits(limits, address_space=address_space, full=full) + _WAIT + (_TO_FILE if output_to_file else "") + _RUN
    )
    return ["/bin/sh", "-c", script, SHELL_NAME]


def inside(directory: str | None) -> str:
    """A directory as the first process takes it: relative ones are those of /home."""
    return os.path.join(HOME, directory or "")


def encoded(arguments: Sequence[str]) -> list[bytes]:
    """As a process is given them. ValueError."""
    # A model may write half of a surrogate pair, which no strict encoding takes.
    result = [argument.encode("utf-8", "surrogatepass") for argument in arguments]
    if any(b"\0" in argument for argument in result):
        raise ValueError("an argument holds a NUL byte")
    return result


def _ulimits(limits: SandboxLimits, *, address_space: bool, full: bool) -> str:
    file_bytes = 0 if full else _allowed(resource.RLIMIT_FSIZE, min(limits.file_bytes, limits.disk_bytes))
    processes = _allowed(resource.RLIMIT_NPROC, limits.processes)
    wanted = [
        "ulimit -c 0",
        f"ulimit -n {_allowed(resource.RLIMIT_NOFILE, limits.open_files)}",
        f"ulimit -f {file_bytes // ULIMIT_BLOCK}",
        f"{{ ulimit -u {processes} 2>/dev/null || ulimit -p {processes}; }}",  # bash || dash, busybox
    ]
    if address_space:
        wanted.append(f"ulimit -v {_allowed(resource.RLIMIT_AS, limits.memory_bytes) // KIB}")
    if limits.cpu_seconds is not None:
        wanted.append(f"ulimit -t {_allowed(resource.RLIMIT_CPU, limits.cpu_seconds)}")
    return " && ".join(wanted) + " || exit 125\n"


def _allowed(kind: int, wanted: int) -> int:
    """No process may raise a hard limit, so what the runner itself may not have, the sandbox cannot get."""
    _, hard = resource.getrlimit(kind)
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
