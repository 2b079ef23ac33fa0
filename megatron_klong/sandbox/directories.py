"""Where sandboxes keep their files on the host, and how what a dead runner left there is cleared away.

    $TMPDIR/klong-sandboxes-<uid>/           0711, ours
      <pid>-<start time>/                    one runner (this process), locked with flock while it lives
        cgroups                              the control groups that it made, one a line
        filter.bpf                           the filter of system calls, once a sandbox has wanted it
        etc/                                 the /etc that every sandbox is shown: own users, no keys, no settings
        <label>-xxxxxxxx/home, tmp           one sandbox: its /home and /tmp, owned by the uid it runs as

A runner's directory is stale, and is removed by the next runner, when its process is gone (pid *and* start
time, since pids are reused) and its lock is free. The lock is for runners in other containers or hosts that
share $TMPDIR, whose pids mean nothing here; it also keeps systemd-tmpfiles from clearing the directory of a
runner that lives for weeks.

A sandbox's files are never opened here: what they are is the agent's choice. A few are unlinked; many are removed by
`rm`, which follows no symbolic link and copes with any depth.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.sandbox import cgroups
from megatron_klong.sandbox.cgroups import Cgroups
from megatron_klong.sandbox.results import SandboxUnavailable
from megatron_klong.sandbox.seccomp import filter_program

SANDBOX_USER = "agent"
SANDBOX_UID = 1000  # inside
ROOT_RUNS_AS_UID = 64001  # outside, when started by root: an id of Debian's reserved range, which owns nothing
PARTS = ("home", "tmp")  # of a sandbox's directory, that it can write
REMOVE_SECONDS = 120.0
SMALL = 100  # files, that are removed without starting a program for it
_GROUPS, _FILTER = "cgroups", "filter.bpf"

logger = logging.getLogger(__name__)

_ETC = {
    "passwd": (
        "root:x:0:0:root:/:/usr/sbin/nologin\n"
        f"{SANDBOX_USER}:x:{SANDBOX_UID}:{SANDBOX_UID}::/home:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
    ),
    "group": f"root:x:0:\n{SANDBOX_USER}:x:{SANDBOX_UID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}

# What programs need of the host's /etc. Not the rest: it holds the host's users, keys and settings.
_FROM_ETC = (
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "pki/ca-trust/extracted",
    "pki/tls/cert.pem",
    "pki/tls/certs",
    "pki/tls/openssl.cnf",
    "ssl/certs",
    "ssl/openssl.cnf",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Runner:
    """The directory of this process, and the descriptor that holds its lock."""

    directory: Path
    lock: int
    cgroups: Cgroups | None  # None: there can be none here


_runner: _Runner | None = None


def outside_uid() -> int:
    """The uid that the sandboxes of this process have on the host."""
    return os.geteuid() or ROOT_RUNS_AS_UID


def runner_directory() -> Path:
    """The directory of this process, made and locked at the first call."""
    global _runner
    if _runner is None:
        _runner = _make_runner()
    return _runner.directory


def runner_cgroups() -> Cgroups | None:
    """The control groups of this process; None where there can be none."""
    runner_directory()
    assert _runner is not None, "made just now"
    return _runner.cgroups


def filter_file() -> Path:
    """The file with the filter of system calls. SandboxUnavailable."""
    file = runner_directory() / _FILTER
    if not file.exists():
        file.write_bytes(filter_program())
        file.chmod(0o644)
    return file


def make_sandbox_directory(label: str) -> Path:
    """A new directory for one sandbox, with `home` and `tmp` that belong to its uid."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", label).strip("-.")[:40] or "sandbox"
    directory = Path(tempfile.mkdtemp(prefix=f"{safe}-", dir=runner_directory()))
    directory.chmod(0o711)
    for name in PARTS:
        part = directory / name
        part.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(part, ROOT_RUNS_AS_UID, ROOT_RUNS_AS_UID)
    return directory


def remove_if_small(directory: Path) -> bool:
    """Remove a sandbox's directory here and now if there is little in it; whether it is gone. Opens no file."""
    try:
        for name in PARTS:
            part = os.open(directory / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                for entry in os.listdir(part)[:SMALL]:
                    os.unlink(entry, dir_fd=part)
            finally:
                os.close(part)
            os.rmdir(directory / name)
        os.rmdir(directory)
    except OSError:  # more in it than that, or a directory: a case for `rm`
        return False
    return True


def remove_command(directory: Path) -> list[str]:
    """The command that removes a sandbox's or a runner's directory whatever is in it, and fails if it cannot."""
    script = 'test "$2" = 0 || chmod -R u+rwX -- "$1" 2>/dev/null; exec rm -rf -- "$1"'
    return ["/bin/sh", "-c", script, "sh", str(directory), str(os.geteuid())]


def remove(directory: Path) -> None:
    """Remove a directory and wait for it."""
    try:
        command = remove_command(directory)
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=REMOVE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        logger.error("%s could not be removed in %g seconds; it is left behind", directory, REMOVE_SECONDS)


def remove_runner_directory() -> None:
    """Remove what this process has on disk; a later call of `runner_directory` starts anew."""
    global _runner
    if _runner is not None:
        if _runner.cgroups is not None:
            _runner.cgroups.remove()
        remove(_runner.directory)
        os.close(_runner.lock)
        _runner = None


def reap_stale() -> list[Path]:
    """Remove the directories of runners that are gone; those that were removed."""
    directories = stale_directories()
    for directory in directories:
        remove(directory)
    return directories


def stale_directories() -> list[Path]:
    """The directories of runners that are gone, whose last processes are killed; the caller removes them."""
    stale = []
    for directory in _base_directory().iterdir():
        match = re.fullmatch(r"(\d+)-(\d+)", directory.name)
        if match is None or start_time(int(match[1])) == int(match[2]) or not _lock_is_free(directory):
            continue
        _kill_unborn_sandboxes(directory)
        _remove_groups(directory)
        stale.append(directory)
    return stale


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _make_runner() -> _Runner:
    directory = _base_directory() / f"{os.getpid()}-{start_time(os.getpid())}"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o711)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SandboxUnavailable(
                f"cannot lock {directory}: {error.strerror}; set TMPDIR to a file system local to this machine"
            ) from error
        _make_etc(directory / "etc")
        return _Runner(directory=directory, lock=lock, cgroups=_make_groups(directory))
    except BaseException:  # else the next try would find its own lock
        os.close(lock)
        raise


def _make_etc(etc: Path) -> None:
    """One directory to mount, in place of a mount for each file."""
    etc.mkdir(exist_ok=True)
    for name, text in _ETC.items():
        (etc / name).write_text(text)
    for name in _FROM_ETC:
        source, target = Path("/etc", name), etc / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, shutil.Error):  # not there, or in part not for this user to read
            if source.is_dir() and not source.is_symlink():
                shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target, follow_symlinks=False)
    subprocess.run(["/bin/chmod", "-R", "u=rwX,go=rX", str(etc)], check=True)


def _make_groups(runner: Path) -> Cgroups | None:
    (runner / _GROUPS).write_text("".join(f"{group}\n" for group in cgroups.planned(runner.name)))
    try:
        return cgroups.find(runner.name)
    except cgroups.CgroupsUnavailable as error:
        logger.info(
            "no control groups, so limits hold for single processes only (run the program under `systemd-run --user "
            "--scope -p Delegate=yes`, or in a container whose /sys/fs/cgroup it may write): %s",
            error,
        )
        return None


def _remove_groups(runner: Path) -> None:
    """Those that a dead runner noted, with what still runs in them."""
    with contextlib.suppress(FileNotFoundError):
        for line in (runner / _GROUPS).read_text().splitlines():
            if Path(line).name == f"klong-{runner.name}":
                cgroups.remove_tree(Path(line))


def _base_directory() -> Path:
    """The directory of all runners of this user. /tmp is everyone's: one that another user made is refused."""
    base = Path(tempfile.gettempdir()) / f"klong-sandboxes-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        base.mkdir(mode=0o711)
        base.chmod(0o711)  # mkdir's mode is cut by the umask
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise SandboxUnavailable(
            f"{base} is not a directory that only this user can write (owner {found.st_uid}, "
            f"mode {stat.filemode(found.st_mode)}); remove it, or set TMPDIR elsewhere"
        )
    return base


def _lock_is_free(directory: Path) -> bool:
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # another runner reaped it just now
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _kill_unborn_sandboxes(runner: Path) -> None:
    """Kill bwrap processes of a dead runner that still wait for their parent.

    bwrap's first process waits for a word from its parent before it asks to die with it. A runner that is
    killed in that fraction of a millisecond leaves one such process, which runs nothing and would wait for
    ever. It is known by its name and by the runner's directory in its arguments.
    """
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            if (process / "comm").read_bytes() != b"bwrap\n":
                continue
            if f"{runner}/".encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or is another user's
            continue


def _forget_after_fork() -> None:
    """A forked worker is not the runner: it must neither remove its parent's sandboxes nor hold its lock."""
    global _runner
    if _runner is not None:
        os.close(_runner.lock)
        _runner = None


os.register_at_fork(after_in_child=_forget_after_fork)
