"""What one sandbox may use: a frozen record of limits, checked when it is made.

Each says for what it holds: a process, a command, or the sandbox as a whole. Limits of bytes read hold for the
caller's own memory. Knows nothing of how a sandbox applies them.
"""

from dataclasses import dataclass, fields

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

SMALLEST_MEMORY = 64 * MIB  # below this the dynamic linker of an ordinary program already fails


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """Limits of one sandbox. A value above the host's own hard limit is lowered to it."""

    memory_bytes: int = 8 * GIB
    """Memory of all processes of the sandbox together, with what the kernel keeps of their files, /dev/shm and swap.
    Without control groups: the address space of each process (RLIMIT_AS), which counts reserved memory too, so that
    node or a large torch need more than they use."""
    processes: int = 512
    """Processes and threads at once: of the whole sandbox by control groups, and in any case of one command and all
    it starts (RLIMIT_NPROC)."""
    cpus: float | None = None
    """CPU seconds a second, of all processes of the sandbox together; None for no limit, which is also what there is
    without control groups."""
    disk_bytes: int = 20 * GIB
    """What /home and /tmp may hold together. A command that exceeds it is killed soon after (see `disk`)."""
    files: int = 1_000_000
    """Files and directories that /home and /tmp may hold together."""
    file_bytes: int = 4 * GIB
    """The largest file a process may write (RLIMIT_FSIZE); at most `disk_bytes`."""
    open_files: int = 4096
    """File descriptors of each process (RLIMIT_NOFILE)."""
    cpu_seconds: int | None = None
    """CPU time of each process (RLIMIT_CPU); None leaves it to the command's timeout."""
    background_commands: int = 16
    """Background commands that run at once."""
    shared_memory_bytes: int = 256 * MIB
    """Size of /dev/shm, which lives in memory and lasts for one command."""
    output_bytes: int = 10 * MIB
    """Bytes of stdout, and of stderr, that a command may print before it is killed."""
    read_bytes: int = 100 * MIB
    """The largest file that `read_file` returns."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ValueError(f"SandboxLimits.{field.name} must be positive, not {value}")
        if self.memory_bytes < SMALLEST_MEMORY:
            raise ValueError(
                f"SandboxLimits.memory_bytes is {self.memory_bytes}; programs need {SMALLEST_MEMORY} to start"
            )
        if self.processes < 4:
            raise ValueError(f"SandboxLimits.processes is {self.processes}; a shell and a pipe already need 4")


def size(bytes: int) -> str:
    """As people read it: 8 GiB, 1.5 GiB, 64 MiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if bytes >= unit:
            return f"{bytes / unit:.3g} {name}"
    return f"{bytes} bytes"
