"""What a process that ran a sandbox's command came to: a result of the command, or a fault of the provider.

What the agent's own commands use up (memory, processes, disk) is theirs: a result that says so. That bwrap could not
set a sandbox up for any other reason is SandboxUnavailable.
"""

import errno
import os
import signal
from dataclasses import dataclass, replace

from megatron_klong.sandbox.cgroups import Group
from megatron_klong.sandbox.disk import DiskWatch
from megatron_klong.sandbox.first_process import SHELL_NAME, STARTED
from megatron_klong.sandbox.limits import SandboxLimits, size
from megatron_klong.sandbox.results import CommandResult, Killed, SandboxUnavailable

KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Judges how the commands of one sandbox ended."""

    sandbox: str
    program: str
    limits: SandboxLimits
    group: Group | None
    disk: DiskWatch

    def memory_kills(self) -> int:
        """How many processes were killed so far for want of memory."""
        return 0 if self.group is None else self.group.memory_kills()

    def result_of(self, ended: CommandResult, kills_before: int) -> CommandResult:
        """The command's result, where `ended` is the process's. SandboxUnavailable."""
        set_up, started, stderr = ended.stderr.partition(STARTED)
        killed = self.memory_kills() > kills_before
        if started and (killed or ended.returncode >= 0):
            return replace(
                ended,
                returncode=ended.returncode if ended.returncode >= 0 else KILLED,
                stderr=stderr,
                out_of_memory=killed,
                notice=self._memory_notice if killed else self._disk_notice if self.disk.full else "",
            )
        reason = set_up.decode(errors="replace").strip() or f"{self.program} ended with {ended.returncode}"
        if killed or (self.group is not None and reason.endswith(os.strerror(errno.ENOMEM))):
            return replace(ended, returncode=KILLED, stderr=b"", out_of_memory=True, notice=self._memory_notice)
        if self.group is not None and reason.endswith(os.strerror(errno.EAGAIN)) and self.group.full():
            return not_started(f"cannot fork: the sandbox has the {self.limits.processes} processes that it may have")
        if reason.endswith(os.strerror(errno.E2BIG)):
            return not_started(os.strerror(errno.E2BIG))
        raise SandboxUnavailable(f"the sandbox {self.sandbox} failed: {reason}")

    def killed_for_disk(self, ended: CommandResult) -> Killed:
        """What ends a command because of what the files of its sandbox take."""
        notice = f"Killed: {self._disk_notice}"
        return Killed(replace(ended, stderr=after_start(ended.stderr), out_of_disk=True, notice=notice))

    @property
    def _disk_notice(self) -> str:
        held, limits = self.disk.usage, self.limits
        return (
            f"/home and /tmp hold {size(held.bytes)} in {held.files} files, and may hold {size(limits.disk_bytes)} in "
            f"{limits.files}. No file can grow until some are deleted"
        )

    @property
    def _memory_notice(self) -> str:
        return f"Killed: out of memory. All processes together may use {size(self.limits.memory_bytes)}"


def not_started(reason: str) -> CommandResult:
    """The result of a command that could not be started."""
    return CommandResult(returncode=126, stdout=b"", stderr=f"{SHELL_NAME}: {reason}\n".encode(), seconds=0.0)


def after_start(stderr: bytes) -> bytes:
    """What the command itself printed."""
    return stderr.partition(STARTED)[2]
