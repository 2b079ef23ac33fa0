"""Sandboxes by Apptainer, for clusters where that is what there is, with images as Slurm sites build them (.sif).

Apptainer cannot be installed on the machines that these tests run on. Its exact command lines are tested, and whole
episodes through a stand-in of that name that understands them and runs the command under bubblewrap
(tests/integration/sandbox/test_apptainer.py). It was written against the command line of Apptainer 1.2 to 1.4.

The same as under bubblewrap: an own /home and /tmp, the first process and its limits, control groups where the runner
can make them, the watch on disk space, no network, no variables or processes of the host, no privileges.

Different:
- the image is the system, and must hold /bin/sh, env, cat, mkdir, rm, tar and tee;
- inside, the user has the runner's own uid, so root is refused: Apptainer makes an unprivileged user of nobody;
- there is no filter of system calls (--security takes one from root only), so `fallocate` can take disk space at once,
  and nested user namespaces are as open as the host leaves them;
- where control groups are Apptainer's to make (cgroups v2 with systemd), it is asked for the limits.

Always --userns, so that no program with set-uid bits is part of it, and a runner's death is the death of all it
started: `setpriv --pdeathsig` has the kernel kill Apptainer's process, which asks for the same on behalf of what is
inside (starter.c, set_parent_death_signal).
"""

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_klong.sandbox.backend import Launch, SandboxNetwork, SandboxSpec, checked_files
from megatron_klong.sandbox.bubblewrap import PROBE_SECONDS
from megatron_klong.sandbox.first_process import HOME, LOGIN, encoded
from megatron_klong.sandbox.limits import SandboxLimits
from megatron_klong.sandbox.place import Place, make_place
from megatron_klong.sandbox.results import SandboxUnavailable
from megatron_klong.sandbox.sandbox import Sandbox
from megatron_klong.sandbox.transfer import MISSING_TOOLS

_SYSTEMD_GROUPS = (Path("/run/systemd/system"), Path("/sys/fs/cgroup/cgroup.controllers"))

_found: dict[Path, "ApptainerTools | str"] = {}  # by image: what the probe found, or why it failed


@dataclass(frozen=True, kw_only=True, slots=True)
class ApptainerTools:
    """The programs of this machine, by absolute path, and what they can do."""

    apptainer: str
    setpriv: str
    limits: bool  # whether Apptainer can make control groups


class ApptainerBackend:
    """Apptainer, set up for one sandbox."""

    program = "apptainer"
    owner = None

    def __init__(self, *, tools: ApptainerTools, place: Place, spec: SandboxSpec, gpus: bool = False) -> None:
        """ValueError for files that cannot be shown."""
        assert spec.image is not None, "checked by create"
        self._network = spec.network
        own_groups = place.group is not None
        self._fixed = encoded(
            [
                *(tools.setpriv, "--pdeathsig", "KILL", "--no-new-privs"),
                *(tools.apptainer, "--silent", "exec"),
                *("--userns", "--containall", "--no-home", "--cleanenv", "--no-eval", "--no-init", "--no-privs"),
                *("--no-mount", "sys,hostfs,bind-paths", "--hostname", "sandbox"),
                *(["--net", "--network", "none"] if spec.network is None else []),
                *(["--nv"] if gpus else []),
                *(_limits(spec.limits) if tools.limits and not own_groups else []),
                *_binds(place.directory, spec.read_only_files),
                *("--pwd", "/", str(spec.image)),
            ]
        )

    @contextmanager
    def launch(self, command: Sequence[str], environment: Mapping[str, str], /) -> Iterator[Launch]:
        """See Backend. Variables are set inside: Apptainer's own options would split them at commas."""
        yield Launch(argv=[*self._argv(environment), *encoded(command)])

    def login(self, environment: Mapping[str, str], /) -> str:
        """See Backend."""
        return shlex.join(os.fsdecode(argument) for argument in [*self._argv(environment), *encoded(LOGIN)])

    def _argv(self, environment: Mapping[str, str]) -> list[bytes]:
        before = encoded(self._network.enter()) if self._network is not None else []
        variables = [f"{name}={value}" for name, value in environment.items()]
        return [*before, *self._fixed, *encoded(["/usr/bin/env", "-i", *variables])]


class Apptainer(Sandbox):
    """A sandbox made by Apptainer."""

    @classmethod
    async def create(
        cls,
        *,
        image: Path,
        limits: SandboxLimits | None = None,
        network: SandboxNetwork | None = None,
        environment: Mapping[str, str] | None = None,
        read_only_files: Mapping[str, Path] | None = None,
        gpus: bool = False,
        label: str = "sandbox",
    ) -> Self:
        """A new, empty sandbox.

        `image`: a .sif file or an unpacked image. `gpus`: the host's NVIDIA devices and driver inside. The rest as
        for `Bubblewrap.create`. Raises SandboxUnavailable, ValueError.
        """
        spec = SandboxSpec(
            limits=limits or SandboxLimits(),
            network=network,
            environment=environment or {},
            read_only_files=read_only_files or {},
            image=image.absolute(),
        )
        return await cls._create(await _available_tools(image.absolute()), spec, label, gpus=gpus)

    @classmethod
    async def _create(cls, tools: ApptainerTools, spec: SandboxSpec, label: str, *, gpus: bool = False) -> Self:
        place = await make_place(label, spec.limits)
        try:
            backend = ApptainerBackend(tools=tools, place=place, spec=spec, gpus=gpus)
            return cls(backend=backend, place=place, limits=spec.limits, environment=spec.environment)
        except BaseException:
            await place.remove()
            raise


async def check_available(image: Path) -> None:
    """Probe this machine and an image with a real sandbox, once a process. SandboxUnavailable says what to do."""
    await _available_tools(image.absolute())


async def _available_tools(image: Path) -> ApptainerTools:
    if image not in _found:
        try:
            _found[image] = await _probe(image)
        except SandboxUnavailable as error:
            _found[image] = str(error)
    found = _found[image]
    if isinstance(found, str):
        raise SandboxUnavailable(found)
    return found


async def _probe(image: Path) -> ApptainerTools:
    """Look for the programs, then run a sandbox exactly as commands will; without Apptainer's limits if need be."""
    if is_root():
        raise SandboxUnavailable(
            "root's Apptainer makes no unprivileged user: run as another user, or take the bubblewrap sandbox"
        )
    if not image.exists():
        raise SandboxUnavailable(f"the image {image} does not exist: build it with `apptainer build`")
    apptainer, setpriv = _program("apptainer"), _program("setpriv")
    systemd = all(path.exists() for path in _SYSTEMD_GROUPS)
    failures = []
    for limits in (True, False) if systemd else (False,):
        tools = ApptainerTools(apptainer=apptainer, setpriv=setpriv, limits=limits)
        async with await Apptainer._create(tools, SandboxSpec(image=image), "probe") as sandbox:
            try:
                result = await sandbox.run(["/bin/sh", "-c", MISSING_TOOLS], timeout_seconds=PROBE_SECONDS)
            except (SandboxUnavailable, TimeoutError) as error:
                failures.append(str(error))
                continue
        if result.returncode != 0 or result.stdout:
            missing = result.stdout.decode() or result.stderr.decode(errors="replace")
            raise SandboxUnavailable(f"the image {image} lacks programs that files move by: {missing}")
        return tools
    raise SandboxUnavailable(
        f"{failures[-1]}. Apptainer 1.2 or later must be able to run an image with --userns: it needs user namespaces "
        "(sysctl user.max_user_namespaces) and, for a .sif file, squashfuse; an unpacked image needs no squashfuse"
    )


def is_root() -> bool:
    """Whether what runs in a sandbox would be root on the host."""
    return os.geteuid() == 0


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SandboxUnavailable(f"{name} is not on the PATH: on a cluster it may need `module load {name}`")
    return os.path.abspath(path)


def _limits(limits: SandboxLimits) -> list[str]:
    """Swap counts as memory: the sum of both is what --memory-swap limits."""
    arguments = ["--memory", str(limits.memory_bytes), "--memory-swap", str(limits.memory_bytes)]
    arguments += ["--pids-limit", str(limits.processes)]
    return arguments + (["--cpus", f"{limits.cpus:g}"] if limits.cpus is not None else [])


def _binds(directory: Path, files: Mapping[str, Path]) -> list[str]:
    binds = [(directory / "home", HOME, "rw"), (directory / "tmp", "/tmp", "rw"), (directory / "tmp", "/var/tmp", "rw")]
    binds += [(outside, inside, "ro") for inside, outside in checked_files(files)]
    arguments: list[str] = []
    for source, target, mode in binds:
        if any(character in f"{source}{target}" for character in ",:\\"):
            raise ValueError(f"Apptainer cannot bind {source} to {target}: it takes no path with , : or \\")
        arguments += ["--bind", f"{source}:{target}:{mode}"]
    return arguments
