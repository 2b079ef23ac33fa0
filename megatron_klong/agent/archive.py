"""Directories of a sandbox as one compressed tar on the host, and back; through commands inside, whoever provides it.

Always: what is written is whole or not there; a sandbox's files are never opened here, only what `tar` inside made of
them; a few archives are made at once, whatever the number of episodes, since each passes through memory.
"""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from inspect_ai.util import OutputLimitExceededError, SandboxEnvironment, SandboxUnavailableError

from megatron_klong.files import atomic_file
from megatron_klong.sandbox.provider import ProvidedSandbox
from megatron_klong.sandbox.results import OutputLimitExceeded, SandboxUnavailable

_AT_ONCE = 2
_TAR_SECONDS = 300
_TAR = "/tmp/.klong.tar"  # what other providers than ours move a file by

_slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


class ArchiveError(RuntimeError):
    """A directory that cannot be packed or unpacked, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A file `.tar.zst`, and what it must hold when it is opened."""

    file: str  # its name, in a folder the holder knows
    sha256: str  # of the tar
    tar_bytes: int


def provided(environment: SandboxEnvironment) -> ProvidedSandbox[Any, Any] | None:
    """What is behind Inspect's interface, if a provider of this package made it: archives, background commands, network
    log."""
    try:
        return environment.as_type(ProvidedSandbox)  # type: ignore[type-abstract]  # it only asks isinstance
    except TypeError:
        return None


@contextmanager
def unavailable_as_inspects() -> Iterator[None]:
    """Around what is asked of our own sandbox directly: that it failed is told as Inspect's interface tells it."""
    try:
        yield
    except SandboxUnavailable as error:
        raise SandboxUnavailableError(str(error)) from error


def archive_slot() -> asyncio.Semaphore:
    """What is held while a tar is in memory."""
    loop = asyncio.get_running_loop()
    return _slots.setdefault(loop, asyncio.Semaphore(_AT_ONCE))


async def read_tar(environment: SandboxEnvironment, directory: str, *, limit_bytes: int) -> bytes:
    """The content of a directory as a tar with names relative to it. Raises ArchiveError, SandboxUnavailableError."""
    if (ours := provided(environment)) is not None:
        try:
            with unavailable_as_inspects():
                tar: bytes = await ours.sandbox.read_archive(directory, limit_bytes=limit_bytes)
            return tar
        except OutputLimitExceeded:
            raise ArchiveError(f"{directory} is larger than {limit_bytes:,} bytes") from None
        except OSError as error:
            raise ArchiveError(f"{directory} could not be packed: {error}") from error
    command = ["tar", "-cf", _TAR, "--exclude", _TAR, "--ignore-failed-read", "-C", directory, "."]
    made = await environment.exec(command, timeout=_TAR_SECONDS, timeout_retry=False)
    if made.returncode > 1:  # 1: a file changed
        raise ArchiveError(f"{directory} could not be packed: {made.stderr.strip()}")
    try:
        tar = await environment.read_file(_TAR, text=False)
    except OutputLimitExceededError as error:
        raise ArchiveError(f"{directory} is larger than {error.limit_str}") from None
    finally:
        await environment.exec(["rm", "-f", _TAR])
    if len(tar) > limit_bytes:
        raise ArchiveError(f"{directory} has {len(tar):,} bytes as a tar; allowed are {limit_bytes:,}")
    return tar


async def write_tar(environment: SandboxEnvironment, directory: str, tar: bytes) -> None:
    """Make a directory's content that of a tar: what is not in it is removed.

    Raises ArchiveError, SandboxUnavailableError.
    """
    script = 'mkdir -p -- "$1" && cd -- "$1" && find . -mindepth 1 -delete'
    cleared = await environment.exec(["/bin/sh", "-c", script, "sh", directory], timeout_retry=False)
    if not cleared.success:
        raise ArchiveError(f"{directory} could not be cleared: {cleared.stderr.strip()}")
    if (ours := provided(environment)) is not None:
        try:
            with unavailable_as_inspects():
                await ours.sandbox.write_archive(directory, tar)
        except OSError as error:
            raise ArchiveError(f"{directory} could not be unpacked: {error}") from error
        return
    await environment.write_file(_TAR, tar)
    command = ["tar", "-xf", _TAR, "--no-same-owner", "-C", directory]
    made = await environment.exec(command, timeout=_TAR_SECONDS, timeout_retry=False)
    await environment.exec(["rm", "-f", _TAR])
    if not made.success:
        raise ArchiveError(f"{directory} could not be unpacked: {made.stderr.strip()}")


def write_compressed(tar: bytes, path: Path) -> Archive:
    """Write `tar` to a .tar.zst file."""
    with atomic_file(path) as file:
        file.write(zstandard.ZstdCompressor(level=3).compress(tar))
    return Archive(file=path.name, sha256=hashlib.sha256(tar).hexdigest(), tar_bytes=len(tar))


def read_compressed(archive: Archive, folder: Path) -> bytes:
    """The tar again. Raises ArchiveError for a file that is missing or not what was written."""
    path = folder / archive.file
    try:
        tar = zstandard.ZstdDecompressor().decompress(path.read_bytes(), max_output_size=archive.tar_bytes)
    except FileNotFoundError:
        raise ArchiveError(f"{path}: missing; the episode cannot be gone on with") from None
    except zstandard.ZstdError as error:
        raise ArchiveError(f"{path}: damaged ({error})") from error
    if hashlib.sha256(tar).hexdigest() != archive.sha256:
        raise ArchiveError(f"{path}: its content is not what was written (SHA-256 differs)")
    return tar
