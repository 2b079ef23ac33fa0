"""Files in and out of a sandbox, through programs that run inside it.

Never through its directory from outside: what lies there is the agent's choice, and a symbolic link planted there
would lead the runner anywhere. Inside, it leads to what the agent can reach anyway.
"""

import errno
import os
import signal

from megatron_klong.sandbox.results import CommandResult

TRANSFER_SECONDS = 300.0  # a file or an archive; longer means that it hangs, on a named pipe for instance

MISSING_TOOLS = 'for tool in cat mkdir rm tar tee; do command -v "$tool" >/dev/null || printf "%s " "$tool"; done'
WRITE_FILE = """parent=${1%/*}
[ -z "$parent" ] || mkdir -p -- "$parent" || exit 1
[ ! -p "$1" ] || { echo "sandbox: $1: Invalid argument" >&2; exit 1; }
exec tee -- "$1" >/dev/null"""
READ_FILE = """[ ! -p "$1" ] || { echo "sandbox: $1: Invalid argument" >&2; exit 1; }
exec cat -- "$1" """
WRITE_ARCHIVE = 'mkdir -p -- "$1" && exec tar --extract --no-same-owner --directory "$1" --file -'
READ_ARCHIVE = 'exec tar --create --ignore-failed-read --directory "$1" --file - .'


def succeeded(script: str, result: CommandResult) -> bool:
    """Whether the transfer was done; tar says 1 where a file changed while it was read."""
    return result.returncode == 0 or (script == READ_ARCHIVE and result.returncode == 1)


def os_error(result: CommandResult, path: str) -> OSError:
    """The error that the same call would raise here.

    The programs say `tee: path: Permission denied`: the end of their first line is the text of an errno.
    """
    too_large = result.returncode == 128 + signal.SIGXFSZ
    for met, met_code in (
        (result.out_of_disk or (too_large and result.notice), errno.ENOSPC),
        (too_large, errno.EFBIG),
        (result.out_of_memory, errno.ENOMEM),
    ):
        if met:
            return OSError(met_code, os.strerror(met_code), path)
    complaint = result.stderr.decode(errors="replace").strip() or f"ended with {result.returncode}"
    reason = complaint.splitlines()[0].rpartition(": ")[2]
    code = next((code for code in errno.errorcode if os.strerror(code) == reason), None)
    if code is None:
        return OSError(f"{path}: {complaint}")
    if code == errno.EROFS:  # the system is read-only for the agent as another user's file is
        return PermissionError(code, reason, path)
    return OSError(code, reason, path)
