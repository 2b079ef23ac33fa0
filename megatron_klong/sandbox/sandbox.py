"""One sandbox: a directory of its own, in which each command runs in namespaces of its own. Made by its subclasses.

Always:
- files last from command to command, processes do not: whatever a command started is dead when `run` returns
  or raises, also after a timeout, a cancellation, too much output, or kill -9 of this process. What is to run on
  is started with `start`, and is dead when the sandbox is closed;
- files move in and out through commands run inside, so that a symbolic link leads nowhere else;
- when this cannot be had, everything raises SandboxUnavailable; nothing ever runs outside of a sandbox.

Needs Linux 5.14 and an asyncio event loop. Tested in tests/unit/sandbox/.
"""

import asyncio
import atexit
import errno
import logging
import os
import posixpath
import shlex
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from megatron_klong.sandbox import transfer
from megatron_klong.sandbox.backend import Backend
from megatron_klong.sandbox.background import START_SECONDS, BackgroundCommand
from megatron_klong.sandbox.directories import PARTS, remove_runner_directory
from megatron_klong.sandbox.disk import WATCH_SECONDS, DiskWatch, descendants
from megatron_klong.sandbox.first_process import (
    ENVIRONMENT,
    GO,
    GO_WITH_INPUT,
    HOME,
    SHELL_NAME,
    STARTED,
    first_process,
    inside,
)
from megatron_klong.sandbox.limits import KIB, MIB, SandboxLimits
from megatron_klong.sandbox.outcomes import Outcomes, after_start, not_started
from megatron_klong.sandbox.place import Place
from megatron_klong.sandbox.process import Child, outlast_cancellation
from megatron_klong.sandbox.results import (
    CommandResult,
    CommandTimeout,
    Killed,
    OutputLimitExceeded,
    SandboxUnavailable,
    TooManyCommands,
)

logger = logging.getLogger(__name__)

_open: set["Sandbox"] = set()


class Sandbox:
    """A sandbox; make it with `create` of a subclass, and `close` it, or use it as `async with`."""

    def __init__(
        self, *, backend: Backend, place: Place, limits: SandboxLimits, environment: Mapping[str, str] | None = None
    ) -> None:
        self._backend = backend
        self._place = place
        self._limits = limits
        self._environment = ENVIRONMENT | _checked(environment)
        self._join = () if place.group is None else place.group.join
        self._disk = DiskWatch(place.directory, PARTS, most_bytes=limits.disk_bytes, most_files=limits.files)
        self._outcomes = Outcomes(
            sandbox=place.directory.name, program=backend.program, limits=limits, group=place.group, disk=self._disk
        )
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.Task[None] | None = None
        self._running: set[Child] = set()
        self._background: dict[str, BackgroundCommand] = {}
        self._started = 0
        self._closing: asyncio.Task[None] | None = None
        _open.add(self)

    @property
    def closed(self) -> bool:
        """Whether it is, or is being closed."""
        return self._closing is not None

    @property
    def background(self) -> Sequence[BackgroundCommand]:
        """All that `start` started, in that order, also what has ended."""
        return tuple(self._background.values())

    async def run(
        self,
        command: Sequence[str],
        *,
        input: bytes | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        output_bytes: int | None = None,
    ) -> CommandResult:
        """Run a command to its end and kill all that it leaves running.

        `cwd` is taken from /home; `env` is added to PATH, HOME, LANG and the sandbox's own `environment`;
        `output_bytes` replaces the limit of the sandbox for this command. Raises TimeoutError (CommandTimeout,
        with what was printed), OutputLimitExceeded, SandboxUnavailable. A command that cannot be started is a
        result with returncode 126 or 127.
        """
        limit_bytes = output_bytes or self._limits.output_bytes
        return await self._run(
            command,
            input=input,
            cwd=cwd,
            env=env,
            timeout_seconds=timeout_seconds,
            stdout_bytes=limit_bytes,
            stderr_bytes=limit_bytes,
        )

    async def start(
        self,
        command: Sequence[str],
        *,
        output_path: str,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> BackgroundCommand:
        """Start a command that runs on until it ends, is stopped, or the sandbox is closed.

        It reads nothing and prints to `output_path`, a file inside that is made anew, with its parents. `cwd` and
        `env` as for `run`. A program that is not found is a background command that has ended with 127. Raises
        TooManyCommands, OSError for the file or the directory, TimeoutError, SandboxUnavailable, and ValueError for
        what no command can be.
        """
        if any("\0" in argument for argument in (*command, output_path)):
            raise ValueError("an argument holds a NUL byte")
        output = posixpath.join(HOME, output_path)
        first, kills = await self._prepared(output_to_file=True), self._outcomes.memory_kills()
        if sum(other.running for other in self.background) >= self._limits.background_commands:
            raise TooManyCommands(
                f"{self._limits.background_commands} background commands run already; stop one of them first"
            )
        child = self._start([*first, inside(cwd), output, *_checked_command(command)], env=env, stderr_bytes=MIB)
        self._started += 1
        background = BackgroundCommand(
            id=f"background-{self._started}",
            command=command,
            output_path=output,
            child=child,
            result_of=lambda ended: self._outcomes.result_of(ended, kills),
            ended=lambda: self._running.discard(child),
        )
        self._background[background.id] = background
        try:
            async with asyncio.timeout(START_SECONDS):
                await child.told(STARTED, 2)  # whatever else the set-up prints: warnings, of a locale for instance
                if child.stderr.count(STARTED) < 2:  # it has ended
                    await background.wait()
        except BaseException as failure:
            del self._background[background.id]
            background.abort()
            if isinstance(failure, TimeoutError):
                raise TimeoutError(f"the command did not start within {START_SECONDS:g} seconds") from failure
            raise
        result: CommandResult | None = background.result
        error: Exception | None = background.error
        if error is None and result is not None and STARTED not in result.stderr:
            error = transfer.os_error(result, output)
        if error is not None:
            del self._background[background.id]
            raise error
        return background

    def login(self) -> str:
        """A shell command by which the user of this process gets a shell inside, while the sandbox is open."""
        joined = shlex.join(os.fsdecode(argument) for argument in self._join)
        return f"{joined} {self._backend.login(self._environment)}".strip()

    async def write_file(self, path: str, contents: bytes) -> None:
        """Write a file, making its parents. IsADirectoryError, PermissionError or another OSError; as `run`."""
        if path.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        await self._transfer(transfer.WRITE_FILE, path, input=contents)

    async def read_file(self, path: str, *, limit_bytes: int | None = None) -> bytes:
        """A file's content. FileNotFoundError, IsADirectoryError, PermissionError or another OSError; as `run`."""
        return await self._transfer(transfer.READ_FILE, path, output_bytes=limit_bytes or self._limits.read_bytes)

    async def write_archive(self, directory: str, tar: bytes) -> None:
        """Unpack a tar, plain or compressed, into a directory, which is made if missing. OSError; as `run`."""
        await self._transfer(transfer.WRITE_ARCHIVE, directory, input=tar)

    async def read_archive(self, directory: str, *, limit_bytes: int) -> bytes:
        """The content of a directory as a tar with names relative to it. OSError; as `run`.

        What the agent made unreadable for itself is left out and logged: it must not spoil the snapshot of
        the rest.
        """
        return await self._transfer(transfer.READ_ARCHIVE, directory, output_bytes=limit_bytes)

    async def close(self) -> None:
        """Kill what runs and remove the files, even while this task is being cancelled. May be called again."""
        if self._loop.is_closed():  # the one it was made in: no task of it will ever go on
            self._destroy()
            _open.discard(self)
            return
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await outlast_cancellation(self._closing, timeout_seconds=None)
        if not self._closing.cancelled():
            self._closing.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(
        self,
        command: Sequence[str],
        *,
        input: bytes | None,
        cwd: str | None,
        env: Mapping[str, str] | None,
        timeout_seconds: float | None,
        stdout_bytes: int,
        stderr_bytes: int,
    ) -> CommandResult:
        if any("\0" in argument for argument in command):
            return not_started("an argument holds a NUL byte")
        first, kills = await self._prepared(output_to_file=False), self._outcomes.memory_kills()
        arguments = [*first, inside(cwd), *_checked_command(command)]
        try:
            child = self._start(arguments, input=input, env=env, stdout_bytes=stdout_bytes, stderr_bytes=stderr_bytes)
        except _TooLong:
            return not_started(os.strerror(errno.E2BIG))
        try:
            return self._outcomes.result_of(await child.run(timeout_seconds=timeout_seconds), kills)
        except Killed as killed:
            return killed.result
        except CommandTimeout as error:
            error.stderr = after_start(error.stderr)
            raise
        except OutputLimitExceeded as error:
            if error.stream == "stderr":
                raise OutputLimitExceeded(
                    stream="stderr", limit_bytes=stderr_bytes, partial=after_start(error.partial)
                ) from error
            raise
        finally:
            self._running.discard(child)

    def _start(
        self,
        arguments: Sequence[str],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None,
        stdout_bytes: int = KIB,
        stderr_bytes: int,
    ) -> Child:
        """Start the first process. _TooLong, SandboxUnavailable, ValueError."""
        if self._closing is not None:
            raise SandboxUnavailable("the sandbox is closed")
        with self._backend.launch(arguments, self._environment | _checked(env)) as launch:
            try:
                child = Child(
                    [*self._join, *launch.argv],
                    input=input,
                    handshake=(STARTED, GO if input is None else GO_WITH_INPUT),
                    stdout_bytes=stdout_bytes,
                    stderr_bytes=stderr_bytes + len(STARTED),
                    owner=self._backend.owner,
                    descriptors=launch.descriptors,
                )
            except OSError as error:
                if error.errno == errno.E2BIG:
                    raise _TooLong(errno.E2BIG, os.strerror(errno.E2BIG)) from error
                raise SandboxUnavailable(f"cannot start {self._backend.program}: {error}") from error
        self._running.add(child)
        if self._watch is None or self._watch.done():
            self._watch = self._loop.create_task(self._watch_disk())
        return child

    async def _prepared(self, *, output_to_file: bool) -> list[str]:
        """The first process of the next command, as things stand on the disk."""
        await self._disk.before_command(self._pids)
        return first_process(
            self._limits,
            address_space=not self._place.memory_is_limited,
            full=self._disk.full,
            output_to_file=output_to_file,
        )

    async def _watch_disk(self) -> None:
        """While commands run, kill them all when the files have become too large."""
        while self._running:
            await asyncio.sleep(WATCH_SECONDS)
            if await self._disk.exceeded(self._pids):
                for child in tuple(self._running):
                    child.abort(self._outcomes.killed_for_disk(child.result_if_killed()))

    def _pids(self) -> Iterator[int]:
        for child in tuple(self._running):
            yield from descendants(child.pid)

    async def _transfer(self, script: str, path: str, *, input: bytes | None = None, output_bytes: int = KIB) -> bytes:
        """Run a script inside on a path. Its complaint becomes the OSError that the same call would raise here."""
        if "\0" in path:
            raise ValueError(f"{path!r} holds a NUL byte")
        result = await self._run(
            ["/bin/sh", "-c", script, SHELL_NAME, posixpath.join(HOME, path)],
            input=input,
            cwd="/",
            env=None,
            timeout_seconds=transfer.TRANSFER_SECONDS,
            stdout_bytes=output_bytes,
            stderr_bytes=MIB,
        )
        if transfer.succeeded(script, result):
            if result.stderr:
                logger.warning("%s: %s", path, result.stderr.decode(errors="replace").strip())
            return result.stdout
        raise transfer.os_error(result, path)

    async def _close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        children = tuple(self._running)
        for child in children:
            child.abort(SandboxUnavailable("the sandbox was closed while the command ran"))
        for child in children:
            await child.gone()
        for background in self.background:
            await background.wait()
        if await self._place.remove():
            _open.discard(self)

    def _destroy(self) -> None:
        """Without an event loop."""
        for child in self._running:
            child.destroy()
        self._place.remove_now()


class _TooLong(OSError):
    """Arguments and environment are more than the kernel passes on."""


def close_all() -> None:
    """Kill and remove all sandboxes of this process, without an event loop; runs at exit by itself."""
    for sandbox in tuple(_open):
        sandbox._destroy()
    _open.clear()
    remove_runner_directory()


def _checked(environment: Mapping[str, str] | None) -> dict[str, str]:
    for name in environment or {}:
        if not name or "=" in name:
            raise ValueError(f"{name!r} cannot be the name of an environment variable")
    return dict(environment or {})


def _checked_command(command: Sequence[str]) -> Sequence[str]:
    if not command:
        raise ValueError("the command is empty")
    return command


def _forget_after_fork() -> None:
    _open.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
atexit.register(close_all)
