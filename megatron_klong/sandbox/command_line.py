"""A command -> the argument list that runs it under bubblewrap.

The chain of programs, outermost first:
    nsenter..  only with a network: what the network puts in front, so that bwrap starts in its namespace
    setpriv    only for root: becomes an unprivileged uid, so that nothing inside is root outside
    bwrap      makes the namespaces and mounts, and waits
    sh         process 1 of the sandbox (see `first_process`)
    command

All wrappers are launched by absolute path. What does not change from command to command is built once a sandbox.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_klong.sandbox.backend import Launch, SandboxSpec
from megatron_klong.sandbox.directories import ROOT_RUNS_AS_UID, SANDBOX_UID, filter_file
from megatron_klong.sandbox.first_process import HOME, encoded
from megatron_klong.sandbox.limits import MIB, SandboxLimits

# What programs need of the host's /etc. Not the rest: it holds the host's users, keys and settings.
_FROM_ETC = (
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "pki/ca-trust/extracted",
    "pki/tls/cert.pem",
    "pki/tls/certs",
    "pki/tls/openssl.cnf",
    "ssl/certs",
    "ssl/openssl.cnf",
)
_OWN_ETC = ("passwd", "group", "hosts", "nsswitch.conf")
_NOT_OF_AN_IMAGE = ("dev", "home", "proc", "run", "sys", "tmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """The programs of this machine, by absolute path, and what they can do."""

    bwrap: str
    setpriv: str | None  # None: not root, not needed
    disable_userns: bool  # whether bwrap can forbid user namespaces inside


class BubblewrapBackend:
    """bubblewrap, set up for one sandbox."""

    program = "bwrap"

    def __init__(self, *, tools: Tools, directory: Path, spec: SandboxSpec) -> None:
        """ValueError for an image or files that cannot be shown, SandboxUnavailable without a filter."""
        self.owner = ROOT_RUNS_AS_UID if tools.setpriv is not None else None
        self._network = spec.network
        self._filter = filter_file() if spec.seccomp else None
        image = spec.image
        privileges: list[str] = []
        if tools.setpriv is not None:
            ids = f"{ROOT_RUNS_AS_UID}"
            privileges = [tools.setpriv, "--reuid", ids, "--regid", ids, "--clear-groups", "--no-new-privs"]
        self._fixed = encoded(
            [
                *privileges,
                tools.bwrap,
                *_namespaces(tools, own_network=spec.network is None),
                *(_system() if image is None else _system_of(image)),
                *_own(directory, spec.limits, None if image is None else image / "etc"),
                *_shown(spec.read_only_files),
                *("--remount-ro", "/", "--chdir", "/"),
            ]
        )

    @contextmanager
    def launch(self, command: Sequence[str], environment: Mapping[str, str], /) -> Iterator[Launch]:
        """See Backend."""
        variables = [word for name, value in environment.items() for word in ("--setenv", name, value)]
        before = encoded(self._network.enter()) if self._network is not None else []
        argv = [*before, *self._fixed, *encoded(variables)]
        if self._filter is None:
            yield Launch(argv=[*argv, *encoded(command)])
            return
        descriptor = os.open(self._filter, os.O_RDONLY | os.O_CLOEXEC)  # opened anew: bwrap reads it from where it is
        try:
            argv += [b"--seccomp", str(descriptor).encode()]
            yield Launch(argv=[*argv, *encoded(command)], descriptors=(descriptor,))
        finally:
            os.close(descriptor)


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
    """The read-only system of the host: programs, libraries and the little of /etc that they need."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            arguments += ["--ro-bind", name, name]
    arguments += ["--perms", "0755", "--dir", "/etc"]
    for name in _FROM_ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    return (*arguments, "--dir", "/var", "--symlink", "../tmp", "/var/tmp")


def _system_of(image: Path) -> list[str]:
    """The directories of an unpacked image, read-only; its root itself is ours, so that mount points can be made."""
    if not (image / "bin" / "sh").exists() and not (image / "usr" / "bin" / "sh").exists():
        raise ValueError(f"{image} is no unpacked root file system: it has no /bin/sh")
    arguments: list[str] = []
    for entry in sorted(image.iterdir()):
        inside = f"/{entry.name}"
        if entry.is_symlink():
            arguments += ["--symlink", os.readlink(entry), inside]
        elif entry.is_dir() and entry.name not in _NOT_OF_AN_IMAGE:
            arguments += ["--ro-bind", str(entry), inside]
    return arguments


def _own(directory: Path, limits: SandboxLimits, image_etc: Path | None) -> list[str]:
    """What belongs to the sandbox. File systems in memory are closed or small.

    An image's /etc is read-only, so of ours only those files appear there that it has too.
    """
    arguments = ["--proc", "/proc", "--dev", "/dev"]
    arguments += ["--perms", "1777", "--size", str(limits.shared_memory_bytes), "--tmpfs", "/dev/shm"]
    arguments += ["--remount-ro", "/dev"]
    arguments += ["--perms", "0755", "--size", str(16 * MIB), "--tmpfs", "/run"]
    arguments += ["--bind", f"{directory}/home", HOME, "--bind", f"{directory}/tmp", "/tmp"]
    if image_etc is not None and (image_etc.parent / "var" / "tmp").is_dir():
        arguments += ["--bind", f"{directory}/tmp", "/var/tmp"]
    for name in _OWN_ETC:
        if image_etc is None or ((image_etc / name).is_file() and not (image_etc / name).is_symlink()):
            arguments += ["--ro-bind", f"{directory.parent}/etc/{name}", f"/etc/{name}"]
    return arguments


def _shown(files: Mapping[str, Path]) -> list[str]:
    """Single files or directories of the host, at other places inside."""
    arguments: list[str] = []
    for inside, outside in files.items():
        if not inside.startswith("/") or ".." in inside.split("/"):
            raise ValueError(f"{inside!r} is no absolute path inside a sandbox")
        if not outside.exists():
            raise ValueError(f"{outside}, to be shown as {inside}, does not exist")
        arguments += ["--ro-bind", str(outside.resolve()), inside]
    return arguments
