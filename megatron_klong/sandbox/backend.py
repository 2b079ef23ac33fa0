"""What a sandbox is made of: the program that builds it around a command, and the network it may be given.

`Sandbox` knows how commands are run, limited and ended, and how files move; a `Backend` knows only how one program
(bubblewrap, apptainer) is asked for namespaces, mounts and variables. There is one for each sandbox.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_klong.sandbox.limits import SandboxLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A process to start: its arguments, and the descriptors that it must inherit under their numbers."""

    argv: list[bytes]
    descriptors: tuple[int, ...] = ()


class SandboxNetwork(Protocol):
    """A network namespace that outlives single commands; what can be reached from it is its maker's affair."""

    def enter(self) -> Sequence[str]:
        """What to put in front of a command line so that it runs in that namespace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSpec:
    """What one sandbox shall be; `create` of the backends says what each part means."""

    limits: SandboxLimits = field(default_factory=SandboxLimits)
    network: SandboxNetwork | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    read_only_files: Mapping[str, Path] = field(default_factory=dict)
    image: Path | None = None
    seccomp: bool = True


class Backend(Protocol):
    """One program that makes sandboxes, set up for one of them."""

    @property
    def program(self) -> str:
        """Its name, for messages."""

    @property
    def owner(self) -> int | None:
        """The uid on the host that pipes must be given to, so that the command can open /dev/stdout."""

    def launch(self, command: Sequence[str], environment: Mapping[str, str], /) -> AbstractContextManager[Launch]:
        """How to run `command` (that of the first process) with these variables and no others.

        The descriptors are open until the end of the `with` block, in which the process is started. ValueError for
        arguments that no process can be given.
        """

    def login(self, environment: Mapping[str, str], /) -> str:
        """A shell command that opens a login shell inside, for people."""


def checked_files(files: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """(path inside, file or directory of the host, without links). ValueError."""
    for inside, outside in files.items():
        if not inside.startswith("/") or ".." in inside.split("/"):
            raise ValueError(f"{inside!r} is no absolute path inside a sandbox")
        if not outside.exists():
            raise ValueError(f"{outside}, to be shown as {inside}, does not exist")
    return [(inside, outside.resolve()) for inside, outside in files.items()]
