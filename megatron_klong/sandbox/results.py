"""What a command in a sandbox comes to: a result, or one of a few named faults.

A fault of the command itself (not found, killed, exit code 1) is a result. `SandboxUnavailable` is a fault of
the provider, and must never be shown to a model as if its command had printed it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandResult:
    """How a command ended. As in a shell, 126 and 127 mean that it could not be started, 128 + n death by
    signal n."""

    returncode: int
    stdout: bytes
    stderr: bytes
    seconds: float
    out_of_memory: bool = False
    """Whether the kernel killed some process meanwhile because the sandbox's memory was used up."""
    out_of_disk: bool = False
    """Whether it was killed because /home and /tmp held more than they may."""
    notice: str = ""
    """What to tell an agent beside the output: which limit was met, and what to do."""


class SandboxUnavailable(RuntimeError):
    """The sandbox could not be provided; the message says what to install or to do."""


class Killed(Exception):
    """Ends a command from within the provider, with this as its result."""

    def __init__(self, result: CommandResult) -> None:
        super().__init__(result.notice)
        self.result = result


class TooManyCommands(RuntimeError):
    """As many background commands run already as a sandbox may have."""


class CommandTimeout(TimeoutError):
    """The command ran out of time and was killed; `stdout` and `stderr` are what it had printed."""

    def __init__(self, *, timeout_seconds: float, stdout: bytes, stderr: bytes) -> None:
        super().__init__(f"the command was killed after {timeout_seconds:g} seconds")
        self.timeout_seconds = timeout_seconds
        self.stdout = stdout
        self.stderr = stderr


class OutputLimitExceeded(RuntimeError):
    """The command printed more than it may, and was killed; `partial` is the first `limit_bytes` of
    `stream`."""

    def __init__(self, *, stream: str, limit_bytes: int, partial: bytes) -> None:
        super().__init__(f"the command was killed: it printed more than {limit_bytes} bytes to {stream}")
        self.stream = stream
        self.limit_bytes = limit_bytes
        self.partial = partial
