"""What one sandbox may use: a frozen record of limits, checked when it is made.

Limits of memory, file size, open files and CPU time hold for each process; the number of processes holds for
one sandbox command with everything it starts. Limits of bytes read hold for the caller's own memory. Knows
nothing of how a sandbox applies them.
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
    """Address space of each process (RLIMIT_AS). It counts reserved memory too: runtimes such as node or a
    large torch need more than they use."""
    processes: int = 512
    """Processes and threads at once, within one command and all it starts (RLIMIT_NPROC)."""
    file_bytes: int = 4 * GIB
    """The largest file a process may write (RLIMIT_FSIZE). The sum over all files is not limited."""
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
