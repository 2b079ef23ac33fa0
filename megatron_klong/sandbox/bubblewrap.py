"""Sandboxes by bubblewrap: nothing outside them can be read or changed, and no privilege is needed to make them.

Always (see also `sandbox`):
- inside there is a read-only system (the host's, or an unpacked image's), an own /home and /tmp that last as long
  as the sandbox, no network but one that was given, no process, environment or other file of the host, and no
  privilege: not root, not even outside;
- whatever bubblewrap cannot do here is found out by a probe, a real sandbox, before the first one is made.

Needs bubblewrap 0.8. Tested in tests/unit/sandbox/ and attacked in tests/integration/sandbox/.
"""

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from megatron_klong.sandbox.backend import SandboxNetwork, SandboxSpec
from megatron_klong.sandbox.command_line import BubblewrapBackend, Tools
from megatron_klong.sandbox.directories import reap_stale
from megatron_klong.sandbox.limits import SandboxLimits
from megatron_klong.sandbox.place import make_place
from megatron_klong.sandbox.results import (
    CommandResult,
    CommandTimeout,
    OutputLimitExceeded,
    SandboxUnavailable,
)
from megatron_klong.sandbox.sandbox import Sandbox, close_all
from megatron_klong.sandbox.transfer import MISSING_TOOLS

__all__ = [
    "Bubblewrap",
    "CommandResult",
    "CommandTimeout",
    "OutputLimitExceeded",
    "SandboxUnavailable",
    "check_available",
    "close_all",
    "reap_stale",
]

PROBE_SECONDS = 20.0

_found: dict[bool, Tools | str] = {}  # by seccomp: what the probe found, or why it failed


async def check_available(*, seccomp: bool = True, image: Path | None = None) -> None:
    """Probe this machine by running a real sandbox, once per process, and an image. SandboxUnavailable says what to
    do."""
    tools = await _available_tools(seccomp=seccomp)
    if image is not None:
        await _try_image(tools, SandboxSpec(image=image.absolute(), seccomp=seccomp))


class Bubblewrap(Sandbox):
    """A sandbox made by bubblewrap."""

    @classmethod
    async def create(
        cls,
        *,
        limits: SandboxLimits | None = None,
        network: SandboxNetwork | None = None,
        environment: Mapping[str, str] | None = None,
        read_only_files: Mapping[str, Path] | None = None,
        image: Path | None = None,
        seccomp: bool = True,
        label: str = "sandbox",
    ) -> Self:
        """A new, empty sandbox.

        `network`: its namespace, for all commands of the sandbox; without one each command has an empty one.
        `environment`: variables of every command. `read_only_files`: {absolute path inside: file or directory of
        the host}. `image`: an unpacked root file system, in place of the host's programs. `seccomp`: refuse
        system calls that it has no use for (see `seccomp`). `label` shows in the names of its directory and
        control groups. Raises SandboxUnavailable, ValueError.
        """
        spec = SandboxSpec(
            limits=limits or SandboxLimits(),
            network=network,
            environment=environment or {},
            read_only_files=read_only_files or {},
            image=None if image is None else image.absolute(),
            seccomp=seccomp,
        )
        return await cls._create(await _available_tools(seccomp=seccomp), spec, label)

    @classmethod
    async def _create(cls, tools: Tools, spec: SandboxSpec, label: str) -> Self:
        place = await make_place(label, spec.limits)
        try:
            backend = BubblewrapBackend(tools=tools, directory=place.directory, spec=spec)
            return cls(backend=backend, place=place, limits=spec.limits, environment=spec.environment)
        except BaseException:
            await place.remove()
            raise


async def _available_tools(*, seccomp: bool) -> Tools:
    if seccomp not in _found:
        try:
            _found[seccomp] = await _probe(seccomp=seccomp)
        except SandboxUnavailable as error:
            _found[seccomp] = str(error)
    found = _found[seccomp]
    if isinstance(found, str):
        raise SandboxUnavailable(found)
    return found


async def _probe(*, seccomp: bool) -> Tools:
    """Look for the programs, then run a sandbox exactly as commands will; without --disable-userns if need
    be."""
    if not hasattr(os, "pidfd_open"):
        raise SandboxUnavailable("sandboxes need Linux, with Python built against pidfd_open")
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise SandboxUnavailable("sandboxes need asyncio: unset INSPECT_ASYNC_BACKEND (it asks for trio)") from error
    bwrap = _program("bwrap", "bubblewrap")
    unshare = _program("unshare", "util-linux") if os.geteuid() == 0 else None
    attempts = [Tools(bwrap=bwrap, unshare=unshare, disable_userns=disable_userns) for disable_userns in (True, False)]
    failures = []
    for tools in attempts:
        async with await Bubblewrap._create(tools, SandboxSpec(seccomp=seccomp), "probe") as sandbox:
            try:
                result = await sandbox.run(["/bin/sh", "-c", MISSING_TOOLS], timeout_seconds=PROBE_SECONDS)
            except (SandboxUnavailable, TimeoutError) as error:
                failures.append(str(error))
                continue
        if result.returncode != 0 or result.stdout:
            missing = result.stdout.decode() or result.stderr.decode(errors="replace")
            raise SandboxUnavailable(f"the sandbox lacks programs that files move by: {missing}; install them in /usr")
        return tools
    raise SandboxUnavailable(_cure(failures[-1]))


async def _try_image(tools: Tools, spec: SandboxSpec) -> None:
    """Run a sandbox of an image. SandboxUnavailable."""
    try:
        async with await Bubblewrap._create(tools, spec, "probe") as sandbox:
            result = await sandbox.run(["/bin/sh", "-c", MISSING_TOOLS], timeout_seconds=PROBE_SECONDS)
        missing = result.stdout.decode(errors="replace") or result.stderr.decode(errors="replace")
        fault = f"it lacks programs that files move by: {missing}" if result.returncode != 0 or missing else ""
    except (SandboxUnavailable, OSError, ValueError) as error:
        fault = str(error)
    if fault:
        raise SandboxUnavailable(
            f"bubblewrap.image cannot be {spec.image}: {fault.strip()}. It must be the folder of an unpacked image "
            "(apptainer build --sandbox FOLDER IMAGE.sif) that every user can read, with /bin/sh, cat, mkdir, rm, tar "
            "and tee"
        )


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SandboxUnavailable(
            f"{name} is not on the PATH: install it (apt-get install {package}, or dnf install {package})"
        )
    return os.path.abspath(path)


def _cure(failure: str) -> str:
    if "Permission denied" in failure and "source path" in failure:
        return f"{failure}. Set TMPDIR to a directory that every user can reach: the sandbox is run by another"
    return (
        f"{failure}. bubblewrap must be able to make user namespaces and mount /proc in them. On a host: "
        "sysctl -w kernel.unprivileged_userns_clone=1 (Debian), user.max_user_namespaces=10000, "
        "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04). In a container: docker run "
        "--security-opt seccomp=unconfined --security-opt apparmor=unconfined "
        "--security-opt systempaths=unconfined, or what your runtime calls these"
    )
