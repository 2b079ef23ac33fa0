"""What one can set about the sandboxes of a task."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.limits import SandboxLimits

# Absolute from the start: Inspect makes sandboxes from another directory than the one they were configured in.
type Image = Annotated[Path, AfterValidator(Path.absolute)]


class SandboxConfig(BaseModel):
    """What holds for each sandbox of a task, whatever makes it; what is not set is as `SandboxLimits` has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes: int | None = None
    processes: int | None = None
    cpus: float | None = None
    disk_bytes: int | None = None
    files: int | None = None
    file_bytes: int | None = None
    open_files: int | None = None
    cpu_seconds: int | None = None
    background_commands: int | None = None
    shared_memory_bytes: int | None = None
    environment: dict[str, str] = {}
    egress: EgressConfig = EgressConfig()
    """The network; what a task's own blacklist.txt forbids is added for its samples."""

    def __hash__(self) -> int:
        """Inspect keeps configurations in sets."""
        return hash(self.model_dump_json())

    def limits(self) -> SandboxLimits:
        """The limits that are set here, and the defaults of the others. ValueError."""
        names = {field.name for field in fields(SandboxLimits)}
        return SandboxLimits(**self.model_dump(exclude_none=True, include=names))


class BubblewrapConfig(SandboxConfig):
    """`SandboxEnvironmentSpec("bubblewrap", BubblewrapConfig(processes=100))`."""

    image: Image | None = None
    """The folder of an unpacked root file system, in place of the host's programs."""
    seccomp: bool = True
    """Whether system calls are filtered."""


class ApptainerConfig(SandboxConfig):
    """`SandboxEnvironmentSpec("apptainer", ApptainerConfig(image="/images/agent.sif"))`."""

    image: Image
    gpus: bool = False
    """The host's NVIDIA devices and driver inside."""
