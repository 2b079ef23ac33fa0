"""A command -> the argument list that runs it under bubblewrap.

The chain of programs, outermost first:
    nsenter..  only with a network: what the network puts in front, so that bwrap starts in its namespace
    unshare    only for root: becomes an unprivileged uid, so that nothing inside is root outside; quicker than setpriv
    bwrap      makes the namespaces and mounts, and waits
    sh         process 1 of the sandbox (see `first_process`)
    command

All wrappers are launched by absolute path. What does not change from command to command is built once a sandbox.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_klong.sandbox.backend import Launch, SandboxSpec, checked_files
from megatron_klong.sandbox.directories import ROOT_RUNS_AS_UID, SANDBOX_UID, filter_file
from megatron_klong.sandbox.first_process import HOME, LOGIN, encoded
from megatron_klong.sandbox.limits import MIB, SandboxLimits

_OWN_ETC = ("passwd", "group", "hosts", "nsswitch.conf")
_MOST_LINKS = 40  # in one path, as the kernel has it
_NOT_OF_AN_IMAGE = ("dev", "home", "proc", "run", "sys", "tmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """The programs of this machine, by absolute path, and what they can do."""

    bwrap: str
    unshare: str | None  # None: not root, not needed
    disable_userns: bool  # whether bwrap can forbid user namespaces inside


class BubblewrapBackend:
    """bubblewrap, set up for one sandbox."""

    program = "bwrap"

    def __init__(self, *, tools: Tools, directory: Path, spec: SandboxSpec) -> None:
        """ValueError for an image or files that cannot be shown, SandboxUnavailable without a filter."""
        self.owner = ROOT_RUNS_AS_UID if tools.unshare is not None else None
        self._network = spec.network
        self._filter = filter_file() if spec.seccomp else None
        image = spec.image
        privileges: list[str] = []
        if tools.unshare is not None:  # --setgid also drops all other groups
            privileges = [tools.unshare, "--setgid", f"{ROOT_RUNS_AS_UID}", "--setuid", f"{ROOT_RUNS_AS_UID}"]
        self._fixed = encoded(
            [
                *privileges,
                tools.bwrap,
                *_namespaces(tools, own_network=spec.network is None),
                *(_system() if image is None else _system_of(image)),
                *_etc(directory.parent / "etc", image, spec.read_only_files),
                *_own(directory, spec.limits),
                *_var_tmp(directory, image),
                *_shown(spec.read_only_files),
                *("--remount-ro", "/", "--chdir", "/"),
            ]
        )

    @contextmanager
    def launch(self, command: Sequence[str], environment: Mapping[str, str], /) -> Iterator[Launch]:
        """See Backend."""
        argv = self._argv(environment)
        if self._filter is None:
            yield Launch(argv=[*argv, *encoded(command)])
            return
        descriptor = os.open(self._filter, os.O_RDONLY | os.O_CLOEXEC)  # opened anew: bwrap reads it from where it is
        try:
            argv += [b"--seccomp", str(descriptor).encode()]
            yield Launch(argv=[*argv, *encoded(command)], descriptors=(descriptor,))
        finally:
            os.close(descriptor)

    def login(self, environment: Mapping[str, str], /) -> str:
        """See Backend."""
        argv = [*self._argv(environment), *([b"--seccomp", b"9"] if self._filter else []), *encoded(LOGIN)]
        shown = shlex.join(os.fsdecode(argument) for argument in argv)
        return f"{shown} 9<{shlex.quote(str(self._filter))}" if self._filter else shown

    def _argv(self, environment: Mapping[str, str]) -> list[bytes]:
        variables = [word for name, value in environment.items() for word in ("--setenv", name, value)]
        before = encoded(self._network.enter()) if self._network is not None else []
        return [*before, *self._fixed, *encoded(variables)]


def _namespaces(tools: Tools, *, own_network: bool) -> list[str]:
    uid = str(SANDBOX_UID)
    return [
        *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try"),
        *(["--unshare-net"] if own_network else []),
        *("--uid", uid, "--gid", uid, "--hostname", "sandbox"),
        *(["--disable-userns"] if tools.disable_userns else []),
        *("--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--clearenv"),
    ]


@cache
def _system() -> tuple[str, ...]:
    """The read-only system of the host: programs and libraries."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            arguments += ["--ro-bind", name, name]
    return tuple(arguments)


def _system_of(image: Path) -> list[str]:
    """The directories of an unpacked image, read-only; its root itself is ours, so that mount points can be made."""
    if not _in_image(image, "bin/sh").exists():
        raise ValueError(f"{image} is no unpacked root file system: it has no /bin/sh")
    arguments: list[str] = []
    for entry in sorted(image.iterdir()):
        inside = f"/{entry.name}"
        if entry.is_symlink():
            arguments += ["--symlink", os.readlink(entry), inside]
        elif entry.is_dir() and entry.name not in _NOT_OF_AN_IMAGE:
            arguments += ["--ro-bind", str(entry), inside]
    return arguments


def _in_image(image: Path, path: str) -> Path:
    """Where a path inside is on the host. Links are followed as they are inside: absolute ones start at the image."""
    here: list[str] = []
    parts, links = path.split("/"), 0
    while parts:
        part = parts.pop(0)
        if part == "..":
            here = here[:-1]
        elif part not in ("", "."):
            here.append(part)
            link = image.joinpath(*here)
            if links < _MOST_LINKS and link.is_symlink():
                links += 1
                target = os.readlink(link)
                here = [] if target.startswith("/") else here[:-1]
                parts = [*target.split("/"), *parts]
    return image.joinpath(*here)


def _etc(ours: Path, image: Path | None, shown: Mapping[str, Path]) -> list[str]:
    """/etc: ours, or an image's with our users in it. As a whole, or where a file is to be added by its entries.

    Mounted as a whole it is read-only, so nothing can appear there that it has not.
    """
    base = ours if image is None else image / "etc"
    root = base.parent
    if any(inside.startswith("/etc/") and not _in_image(root, inside).exists() for inside in shown):
        arguments = ["--perms", "0755", "--dir", "/etc"]
        for entry in sorted(base.iterdir()) if base.is_dir() else ():
            if entry.is_symlink():
                arguments += ["--symlink", os.readlink(entry), f"/etc/{entry.name}"]
            elif entry.name not in _OWN_ETC:
                arguments += ["--ro-bind-try", str(entry), f"/etc/{entry.name}"]
        own: Sequence[str] = _OWN_ETC
    else:
        arguments = ["--ro-bind", str(base), "/etc"] if base.is_dir() else []
        own = [] if image is None else [name for name in _OWN_ETC if (base / name).is_file()]
    for name in own:
        if not (base / name).is_symlink():
            arguments += ["--ro-bind", str(ours / name), f"/etc/{name}"]
    return arguments


def _own(directory: Path, limits: SandboxLimits) -> list[str]:
    """What belongs to the sandbox. File systems in memory are closed or small."""
    arguments = ["--proc", "/proc", "--dev", "/dev"]
    arguments += ["--perms", "1777", "--size", str(limits.shared_memory_bytes), "--tmpfs", "/dev/shm"]
    arguments += ["--remount-ro", "/dev"]
    arguments += ["--perms", "0755", "--size", str(16 * MIB), "--tmpfs", "/run"]
    arguments += ["--bind", f"{directory}/home", HOME, "--bind", f"{directory}/tmp", "/tmp"]
    return arguments


def _var_tmp(directory: Path, image: Path | None) -> list[str]:
    """The same directory as /tmp, where an image has a place for it."""
    if image is None:
        return ["--dir", "/var", "--symlink", "../tmp", "/var/tmp"]
    place = image / "var" / "tmp"
    has_place = place.is_dir() and _in_image(image, "var/tmp") == place  # no mount can be made on a link
    return ["--bind", f"{directory}/tmp", "/var/tmp"] if has_place else []


def _shown(files: Mapping[str, Path]) -> list[str]:
    """Single files or directories of the host, at other places inside."""
    return [word for inside, outside in checked_files(files) for word in ("--ro-bind", str(outside), inside)]
