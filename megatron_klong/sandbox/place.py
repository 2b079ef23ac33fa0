"""Where a sandbox is on the host, a directory and control groups, from its making to its end.

Always: a place that was made is removed by `remove`, else at the exit of this process, else (kill -9) by the next
process that makes one.
"""

import asyncio
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.sandbox.cgroups import Group, remove_tree
from megatron_klong.sandbox.directories import (
    REMOVE_SECONDS,
    make_sandbox_directory,
    remove,
    remove_command,
    remove_if_small,
    runner_cgroups,
    stale_directories,
)
from megatron_klong.sandbox.limits import KIB, SandboxLimits
from megatron_klong.sandbox.process import Child
from megatron_klong.sandbox.results import SandboxUnavailable

GROUP_ATTEMPTS, GROUP_SECONDS = 100, 0.01

logger = logging.getLogger(__name__)

_stale_reaped = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A sandbox's directory and control groups; None where there can be none."""

    directory: Path
    group: Group | None

    @property
    def memory_is_limited(self) -> bool:
        """Whether the sandbox's memory is limited as a whole."""
        return self.group is not None and "memory" in self.group.directories

    async def remove(self) -> bool:
        """Whether all of it is gone. A failure is only logged: its episode is worth more."""
        removed = remove_if_small(self.directory) or await _remove_directory(self.directory)
        return (self.group is None or await _remove_group(self.group)) and removed

    def remove_now(self) -> None:
        """The same without an event loop."""
        remove(self.directory)
        if self.group is not None:
            for directory in self.group.directories.values():
                remove_tree(directory)


async def make_place(label: str, limits: SandboxLimits) -> Place:
    """A new place; the first one also clears away what dead runners left. SandboxUnavailable."""
    global _stale_reaped
    if not _stale_reaped:
        _stale_reaped = True
        for directory in stale_directories():
            await _remove_directory(directory)
    try:
        directory = make_sandbox_directory(label)
    except OSError as error:
        raise SandboxUnavailable(f"cannot make the sandbox's directory: {error}; free it or set TMPDIR") from error
    cgroups = runner_cgroups()
    try:
        group = None if cgroups is None else cgroups.make(directory.name, limits)
    except OSError as error:
        shutil.rmtree(directory)
        raise SandboxUnavailable(f"cannot make the sandbox's control group: {error}") from error
    return Place(directory=directory, group=group)


async def _remove_directory(directory: Path) -> bool:
    try:
        removal = Child(remove_command(directory), stdout_bytes=64 * KIB, stderr_bytes=64 * KIB)
        result = await removal.run(timeout_seconds=REMOVE_SECONDS)
    except OSError as error:  # too slow, or no process to be had
        logger.error("%s is not removed yet, and will be at exit: %s", directory, error)
        return False
    if result.returncode != 0:
        logger.error("%s is left behind: %s", directory, result.stderr.decode(errors="replace").strip())
    return True


async def _remove_group(group: Group) -> bool:
    for _ in range(GROUP_ATTEMPTS):
        if group.remove():
            return True
        await asyncio.sleep(GROUP_SECONDS)  # what was killed is in it for a moment
        group.kill()
    logger.error("a control group is not removed yet, and will be at exit: %s", group)
    return False
