"""Limits on a sandbox as a whole, by control groups: memory, processes and CPU time of all that runs in it.

    <the runner's own group>/klong-<pid>-<start time>/<label>-xxxxxxxx      v1: once in each hierarchy; v2: once

Groups are made inside the runner's own, so that a job's limits go on holding for its sandboxes. A process joins by
itself before it becomes the sandbox (`Group.join`): it writes 0, "me", which on v1 takes none of the kernel's global
locks, where moving another process waits for an RCU grace period (10 ms here) and would hold up the event loop.

v1 and v2 are served controller by controller, by what this user may write. On v2 a group that hands controllers down
may hold no processes itself, so the runner, with all that shares its group, is moved to a leaf of it, klong-runners.
Where nothing may be written `find` says why, and the caller limits single processes instead. v2 is tested against a
folder that stands in for its file system; v1 for real.

A runner notes its groups in its directory, so that whoever clears that away (see `directories`) removes them too.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.sandbox.limits import SandboxLimits

CONTROLLERS = ("memory", "pids", "cpu")
RUNNERS = "klong-runners"
CPU_PERIOD_MICROSECONDS = 100_000
OWN_PROCESSES = 2  # of each command, beside the agent's: bwrap and the first process
REMOVE_SECONDS = 2.0

logger = logging.getLogger(__name__)


class CgroupsUnavailable(Exception):
    """No control group can be made here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The control groups of one sandbox: one directory for each controller, on v2 the same one."""

    directories: Mapping[str, Path]
    join: tuple[bytes, ...]
    """What to put in front of a command so that it, and all that it starts, counts here."""
    memory_events: str | None
    """The file in which the kernel counts what it killed."""

    def memory_kills(self) -> int:
        """How many processes were killed so far because the sandbox's memory was used up; 0 once it is removed."""
        if self.memory_events is None:
            return 0
        try:
            with open(self.memory_events) as file:
                events = file.read()
        except FileNotFoundError:
            return 0
        return int(events.rpartition("oom_kill ")[2].split()[0])

    def full(self) -> bool:
        """Whether it has as many processes as it may have, or nearly so."""
        directory = self.directories.get("pids")
        if directory is None:
            return False
        most, now = (int((directory / name).read_text()) for name in ("pids.max", "pids.current"))
        return now > most - 2 * OWN_PROCESSES

    def kill(self) -> None:
        """Kill all that is in it. It may take a moment to be gone."""
        for directory in dict.fromkeys(self.directories.values()):
            with contextlib.suppress(FileNotFoundError):
                _kill(directory)

    def remove(self) -> bool:
        """Whether it is gone: not while a process is in it."""
        return _all_removed(dict.fromkeys(self.directories.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cgroups:
    """The groups of this runner, in which it makes one for each sandbox."""

    parents: Mapping[str, Path]
    """By controller: the directory of this runner."""
    v2: frozenset[str]
    """Which of the controllers are those of v2."""

    @property
    def controllers(self) -> frozenset[str]:
        return frozenset(self.parents)

    def make(self, name: str, limits: SandboxLimits) -> Group:
        """A group with these limits, as far as the controllers go. OSError."""
        directories = {controller: parent / name for controller, parent in self.parents.items()}
        distinct = list(dict.fromkeys(directories.values()))
        for directory in distinct:
            directory.mkdir()
        try:
            for controller, directory in directories.items():
                for file, value in _settings(controller, limits, directory, controller in self.v2):
                    with open(directory / file, "w") as setting:
                        setting.write(value)
        except OSError:
            _all_removed(distinct)
            raise
        memory = directories.get("memory")
        events = "memory.events" if "memory" in self.v2 else "memory.oom_control"
        return Group(
            directories=directories,
            join=_join(distinct, [self.parents[controller] for controller in self.v2]),
            memory_events=None if memory is None else f"{memory}/{events}",
        )

    def remove(self) -> bool:
        """Remove the runner's groups with what is left in them, waiting REMOVE_SECONDS at most; whether it worked."""
        gone = [remove_tree(parent) for parent in dict.fromkeys(self.parents.values())]
        return all(gone)


def find(runner: str, *, proc: Path = Path("/proc/self")) -> Cgroups:
    """Make the runner's groups; `runner` is their name without klong-. CgroupsUnavailable."""
    mounts, own = _mounts((proc / "mountinfo").read_text()), _memberships((proc / "cgroup").read_text())
    parents, reasons = {}, []
    for controller in CONTROLLERS:
        try:
            base = _base(controller, mounts, own)
            parent = base / f"klong-{runner}"
            parent.mkdir(exist_ok=True)
            if _is_v2(parent):
                _hand_down(controller, parent)
            parents[controller] = parent
        except (CgroupsUnavailable, OSError) as error:
            reasons.append(f"{controller}: {error}")
    if not parents:
        raise CgroupsUnavailable("; ".join(reasons))
    for reason in reasons:
        logger.info("sandboxes are not limited as a whole in %s", reason)
    v2 = frozenset(controller for controller, parent in parents.items() if _is_v2(parent))
    found = Cgroups(parents=parents, v2=v2)
    _try_out(found)
    return found


def _try_out(cgroups: Cgroups) -> None:
    """Have a process join a group: on v2 that takes more than the right to make one. CgroupsUnavailable."""
    try:
        group = cgroups.make("probe", SandboxLimits())
        tried = subprocess.run(
            [*group.join, b"/bin/true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        cgroups.remove()
        raise CgroupsUnavailable(f"groups for runners can be made, but none in them: {error}") from error
    if tried.returncode != 0:
        cgroups.remove()
        raise CgroupsUnavailable(f"groups can be made but not joined: {tried.stderr.strip()}")
    deadline = time.monotonic() + REMOVE_SECONDS
    while not group.remove():  # the process is reaped, but the kernel may be at it still
        if time.monotonic() > deadline:
            cgroups.remove()
            raise CgroupsUnavailable(f"groups can be made but not removed: {group}")
        time.sleep(0.001)


def planned(runner: str, *, proc: Path = Path("/proc/self")) -> list[Path]:
    """The directories that `find` may make, to be noted before it does."""
    mounts, own = _mounts((proc / "mountinfo").read_text()), _memberships((proc / "cgroup").read_text())
    found: dict[Path, None] = {}
    for controller in CONTROLLERS:
        with contextlib.suppress(CgroupsUnavailable):
            found[_place(controller, mounts, own)[0] / f"klong-{runner}"] = None
    return list(found)


def remove_tree(parent: Path) -> bool:
    """Kill what is in a group, a runner's with its sandboxes' or a sandbox's, and remove it; whether it is gone."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            groups = [entry for entry in parent.iterdir() if entry.is_dir()]
        except FileNotFoundError:
            return True
        if _all_removed([*groups, parent]):
            return True
        for group in [*groups, parent]:
            with contextlib.suppress(FileNotFoundError):
                _kill(group)
        if time.monotonic() > deadline:
            logger.error("the control group %s is left behind", parent)
            return False
        time.sleep(0.01)


def _join(directories: Sequence[Path], v2: Sequence[Path]) -> tuple[bytes, ...]:
    files = [directory / ("cgroup.procs" if directory.parent in v2 else "tasks") for directory in directories]
    joins = " && ".join(f'echo 0 >"${number}"' for number, _ in enumerate(files, start=1))
    script = f'{joins} || exit 125; shift {len(files)}; exec "$@"'
    return (b"/bin/sh", b"-c", script.encode(), b"sandbox", *(os.fsencode(file) for file in files))


def _settings(controller: str, limits: SandboxLimits, directory: Path, v2: bool) -> list[tuple[str, str]]:
    """(file, value) of one controller. Swap counts as memory, else a sandbox would be slow in place of ended."""
    if controller == "memory":
        memory, swap = ("memory.max", "memory.swap.max") if v2 else (_V1_MEMORY, "memory.memsw.limit_in_bytes")
        settings = [(memory, str(limits.memory_bytes))]
        if (directory / swap).exists():
            settings.append((swap, "0" if v2 else str(limits.memory_bytes)))
        return settings
    if controller == "pids":
        return [("pids.max", str(limits.processes + OWN_PROCESSES * (1 + limits.background_commands)))]
    if limits.cpus is None:
        return []
    quota = max(1000, round(limits.cpus * CPU_PERIOD_MICROSECONDS))
    if v2:
        return [("cpu.max", f"{quota} {CPU_PERIOD_MICROSECONDS}")]
    return [("cpu.cfs_period_us", str(CPU_PERIOD_MICROSECONDS)), ("cpu.cfs_quota_us", str(quota))]


_V1_MEMORY = "memory.limit_in_bytes"


# --- where groups can be made ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mount:
    """A mounted hierarchy: its root within the hierarchy, where that is mounted, and its v1 controllers."""

    root: str
    point: Path
    controllers: frozenset[str]
    v2: bool


def _mounts(mountinfo: str) -> list[_Mount]:
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            root, point = (_unescaped(field) for field in before.split(" ")[3:5])
            controllers = frozenset(options.split(",")) & frozenset(CONTROLLERS)
            found.append(_Mount(root=root, point=Path(point), controllers=controllers, v2=kind == "cgroup2"))
    return found


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _memberships(cgroup: str) -> dict[str, str]:
    """By controller, and by "" for v2: the group of this process."""
    found = {}
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _place(controller: str, mounts: Sequence[_Mount], own: Mapping[str, str]) -> tuple[Path, bool]:
    """(the runner's own group for a controller, whether it is v2). CgroupsUnavailable."""
    mount = next((mount for mount in mounts if controller in mount.controllers), None)
    if mount is None:
        mount = next((mount for mount in mounts if mount.v2), None)
    path = own.get("" if mount is None or mount.v2 else controller)
    if mount is None or path is None:
        raise CgroupsUnavailable("no such hierarchy is mounted")
    inside = os.path.relpath(path, mount.root)
    group = mount.point if inside.startswith("..") else mount.point / inside  # .. : the root of a container's view
    return (group.parent if mount.v2 and group.name == RUNNERS else group), mount.v2


def _base(controller: str, mounts: Sequence[_Mount], own: Mapping[str, str]) -> Path:
    """The group in which the runner's may be made, with the controller handed down to it. CgroupsUnavailable."""
    base, v2 = _place(controller, mounts, own)
    if v2:
        if controller not in (base / "cgroup.controllers").read_text().split():
            raise CgroupsUnavailable(f"{base} is not given this controller")
        if controller not in (base / "cgroup.subtree_control").read_text().split():
            _hand_down(controller, base)
    return base


def _hand_down(controller: str, group: Path) -> None:
    """Let the children of a v2 group have a controller. Its own processes are moved to a leaf if they must be."""
    control = group / "cgroup.subtree_control"
    try:
        control.write_text(f"+{controller}")
        return
    except OSError as error:
        reason = error
    leaf = group / RUNNERS
    leaf.mkdir(exist_ok=True)
    for _ in range(10):  # they may be forking meanwhile
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)
        try:
            control.write_text(f"+{controller}")
            return
        except OSError as error:
            reason = error
    raise CgroupsUnavailable(f"{group} cannot hand it down: {reason}")


def _is_v2(directory: Path) -> bool:
    return (directory / "cgroup.controllers").exists()


# --- the end of a group ---------------------------------------------------------------------------


def _kill(directory: Path) -> None:
    if (directory / "cgroup.kill").exists():
        (directory / "cgroup.kill").write_text("1")
        return
    if (directory / "pids.max").exists():
        (directory / "pids.max").write_text("0")  # so that nobody forks on
    listed = _processes(directory)
    pidfds = {}
    for pid in listed:
        with contextlib.suppress(ProcessLookupError):
            pidfds[pid] = os.pidfd_open(pid)
    still = _processes(directory)  # a pid that was reused between the two is in the group, or is not killed
    for pid, pidfd in pidfds.items():
        if pid in still:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def _processes(directory: Path) -> set[int]:
    return {int(pid) for pid in (directory / "cgroup.procs").read_text().split()} - {0}


def _all_removed(directories: Iterable[Path]) -> bool:
    removed = [_removed(directory) for directory in directories]  # all are tried, also after one that is not gone
    return all(removed)


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # a process is in it still
        return False
    return True
