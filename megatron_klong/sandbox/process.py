"""One host process -> its result, in bounded memory and time, and nothing of it left afterwards.

Always: no output stream grows past its limit plus one byte; when `Child.run` returns or raises, for whatever
reason, the process and its children are dead, it has been reaped and its file descriptors are closed. Nothing
waits for the end of a pipe, so a descriptor that leaked elsewhere cannot hold a caller.

Who waits for what, in `Child`:
    run       waits for _outcome, set by the exit of the process, an output over its limit, or `abort`;
              then for _exited, set when the process is reaped: deaf to cancellation, REAP_SECONDS at most
    told      waits for _told, set when stderr holds a mark so often or the process has ended
    the loop  watches stdout and stderr (readable), stdin (writable), the process (its pidfd: readable = dead)

A Child is started by the thread that runs the event loop, never by a helper thread: Linux delivers a
parent-death signal when the *thread* that started the child ends, and a pool thread ends early.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from megatron_klong.sandbox.results import CommandResult, CommandTimeout, OutputLimitExceeded

CHUNK_BYTES = 64 * 1024
REAP_SECONDS = 2.0
HOST_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}  # the runner's own holds secrets

logger = logging.getLogger(__name__)


class _Output:
    """What the child has printed to one stream so far."""

    def __init__(self, *, name: str, descriptor: int, limit_bytes: int) -> None:
        self.name = name
        self.descriptor = descriptor
        self.limit_bytes = limit_bytes
        self.data = bytearray()
        self.ended = False

    def read(self) -> bool:
        """Read one chunk if there is one; False when there is none (now, or ever: `ended`)."""
        wanted = min(CHUNK_BYTES, self.limit_bytes + 1 - len(self.data))
        try:
            chunk = os.read(self.descriptor, wanted)
        except BlockingIOError:
            return False
        self.data += chunk
        self.ended = not chunk
        if len(self.data) > self.limit_bytes:
            partial = bytes(memoryview(self.data)[: self.limit_bytes])
            raise OutputLimitExceeded(stream=self.name, limit_bytes=self.limit_bytes, partial=partial)
        return not self.ended


class Child:
    """A running process. Make it and `run` it in the same step: until then nobody limits it."""

    def __init__(
        self,
        argv: Sequence[str | bytes],
        *,
        input: bytes | None = None,
        handshake: tuple[bytes, bytes] | None = None,
        stdout_bytes: int,
        stderr_bytes: int,
        owner: int | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Start `argv`, which inherits `descriptors` under their numbers. OSError when it cannot be started.

        `handshake` is (awaited, answer): nothing is sent until `awaited` was read from stderr, then `answer`
        is, and then the input.

        `owner` is the uid that the pipes are given to, without which it could not open /dev/stdout.
        """
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[None] = self._loop.create_future()
        self._exited: asyncio.Future[None] = self._loop.create_future()
        self._told: asyncio.Future[None] = self._loop.create_future()
        self._awaited: tuple[bytes, int] | None = None
        self._handshake = handshake
        self._unsent = memoryview(input or b"")
        self._started = time.monotonic()
        with contextlib.ExitStack() as on_error, contextlib.ExitStack() as theirs:
            stdin, stdin_end = None, None
            if input is not None or handshake is not None:
                stdin, stdin_end = _pipe(owner, on_error, theirs, child_reads=True)
            stdout, stdout_end = _pipe(owner, on_error, theirs, child_reads=False)
            stderr, stderr_end = _pipe(owner, on_error, theirs, child_reads=False)
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL if stdin_end is None else stdin_end,
                stdout=stdout_end,
                stderr=stderr_end,
                cwd="/",
                env=HOST_ENVIRONMENT,
                umask=0o022,
                pass_fds=descriptors,
                start_new_session=True,  # its process group can be killed without touching ours
            )
            on_error.callback(self._process.wait)
            on_error.callback(self._process.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            on_error.pop_all()
        self._stdin = stdin
        self._stdout = _Output(name="stdout", descriptor=stdout, limit_bytes=stdout_bytes)
        self._stderr = _Output(name="stderr", descriptor=stderr, limit_bytes=stderr_bytes)
        self._watch()

    async def run(self, *, timeout_seconds: float | None = None) -> CommandResult:
        """Wait for the end. CommandTimeout, OutputLimitExceeded, or what `abort` was given."""
        try:
            await asyncio.wait([self._outcome], timeout=timeout_seconds)
            if not self._outcome.done():
                raise self._timeout(timeout_seconds)
            self._outcome.result()
            return self._result(self._process.returncode)
        except GeneratorExit:  # the loop is gone, and nothing may be awaited: `destroy` below does it all
            raise
        except BaseException:
            await self._end()
            raise
        finally:
            self.destroy()

    @property
    def pid(self) -> int:
        """Of the process itself; what runs in the sandbox are its descendants."""
        return self._process.pid

    @property
    def stderr(self) -> bytes:
        """What it has printed there so far; nothing once `run` has returned."""
        return bytes(self._stderr.data)

    def result_if_killed(self) -> CommandResult:
        """What it would come to if it were killed now."""
        return self._result(128 + signal.SIGKILL)

    async def told(self, mark: bytes, times: int) -> None:
        """Wait until the process has printed `mark` so often to stderr, among other things, or has ended."""
        self._awaited = (mark, times)
        self._tell()
        await asyncio.wait([self._told])

    def abort(self, error: Exception) -> None:
        """Kill the process; `run` raises `error`."""
        if not self._outcome.done():
            self._outcome.set_exception(error)
        self._kill()

    async def gone(self) -> None:
        """Wait until an aborted process is dead and reaped, for REAP_SECONDS at most."""
        await outlast_cancellation(self._exited, timeout_seconds=REAP_SECONDS)

    def destroy(self) -> None:
        """Without a loop to wait on: kill, reap, close. Does nothing more when that was done."""
        if not self._exited.done() and self._process.poll() is None:
            self._kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(REAP_SECONDS)
        if self._outcome.done():
            self._outcome.exception()  # seen, should the caller have been cancelled before it could look
        self._close()

    async def _end(self) -> None:
        """Kill and wait; the kernel tears a sandbox down within milliseconds."""
        for kill in (self._kill, self._kill_group):
            if not self._exited.done():
                kill()
                await outlast_cancellation(self._exited, timeout_seconds=REAP_SECONDS)
        if not self._exited.done():
            logger.error("process %d does not die of SIGKILL: it hangs in the kernel", self._process.pid)

    def _kill(self) -> None:
        """Kill the child's children, so that it reaps them and ends by itself; without any, its process group.

        bwrap has one child, the first process of the sandbox, whose death is the death of all that is inside.
        Killing bwrap first would leave that one to the reaper of the machine, which may be slow.
        """
        if self._exited.done():
            return
        children = _children_of(self._process.pid)
        for pid in children:
            _kill_child(pid, parent=self._process.pid)
        if not children:
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _result(self, returncode: int) -> CommandResult:
        return CommandResult(
            returncode=returncode,
            stdout=bytes(self._stdout.data),
            stderr=bytes(self._stderr.data),
            seconds=time.monotonic() - self._started,
        )

    def _timeout(self, timeout_seconds: float | None) -> CommandTimeout:
        assert timeout_seconds is not None, "without a timeout, only an outcome ends the wait"
        return CommandTimeout(
            timeout_seconds=timeout_seconds, stdout=bytes(self._stdout.data), stderr=bytes(self._stderr.data)
        )

    def _watch(self) -> None:
        self._loop.add_reader(self._pidfd, self._on_exit)
        for output in (self._stdout, self._stderr):
            os.set_blocking(output.descriptor, False)
            self._loop.add_reader(output.descriptor, self._on_output, output)
        if self._stdin is not None:
            os.set_blocking(self._stdin, False)
            if self._handshake is None:
                self._loop.add_writer(self._stdin, self._on_stdin)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._process.wait()
        self._exited.set_result(None)
        self._tell()
        if self._outcome.done():
            return
        try:  # every writer is dead, so what is still to be read is in the pipes now
            while self._stdout.read() or self._stderr.read():
                pass
            self._outcome.set_result(None)
        except OutputLimitExceeded as error:
            self._outcome.set_exception(error)

    def _on_output(self, output: _Output) -> None:
        if self._outcome.done():
            self._loop.remove_reader(output.descriptor)
            return
        try:
            output.read()
            self._answer()
            self._tell()
        except OutputLimitExceeded as error:
            self._outcome.set_exception(error)
        if output.ended:
            self._loop.remove_reader(output.descriptor)

    def _tell(self) -> None:
        if not self._told.done() and (
            self._exited.done()
            or (self._awaited is not None and self._stderr.data.count(self._awaited[0]) >= self._awaited[1])
        ):
            self._told.set_result(None)

    def _answer(self) -> None:
        if self._handshake is None or self._stdin is None or self._handshake[0] not in self._stderr.data:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._stdin, self._handshake[1])  # a few bytes into an empty pipe: never short
        self._handshake = None
        self._loop.add_writer(self._stdin, self._on_stdin)

    def _on_stdin(self) -> None:
        assert self._stdin is not None, "watched only while open"
        try:
            written = os.write(self._stdin, self._unsent[:CHUNK_BYTES])
        except BlockingIOError:
            return
        except BrokenPipeError:  # the command does not read its input: its own affair
            written = len(self._unsent)
        self._unsent = self._unsent[written:]
        if not self._unsent:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = None

    def _close(self) -> None:
        if self._pidfd < 0:
            return
        if self._stdin is not None:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = None
        for descriptor in (self._pidfd, self._stdout.descriptor, self._stderr.descriptor):
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._pidfd = -1
        self._unsent = memoryview(b"")
        for output in (self._stdout, self._stderr):
            output.data = bytearray()  # an exception's traceback may keep this object for long


async def outlast_cancellation(future: "asyncio.Future[Any]", *, timeout_seconds: float | None) -> None:
    """Wait for `future` even when this task is cancelled meanwhile; the cancellation is raised afterwards.

    A cancelled anyio scope cancels each further await at each turn of the loop: one shield is not enough.
    """
    loop = asyncio.get_running_loop()
    deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
    cancellation: asyncio.CancelledError | None = None
    while not future.done():
        left = None if deadline is None else deadline - loop.time()
        if left is not None and left <= 0:
            break
        try:
            await asyncio.wait([future], timeout=left)
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        raise cancellation


def _pipe(
    owner: int | None, on_error: contextlib.ExitStack, theirs: contextlib.ExitStack, *, child_reads: bool
) -> tuple[int, int]:
    """(our end, the child's end)."""
    read_end, write_end = os.pipe()
    ours, child = (write_end, read_end) if child_reads else (read_end, write_end)
    on_error.callback(os.close, ours)
    theirs.callback(os.close, child)
    if owner is not None:
        os.fchown(child, owner, owner)
    return ours, child


def _children_of(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return []


def _kill_child(pid: int, *, parent: int) -> None:
    """Kill `pid` if it is a child of `parent`. The pidfd pins the process, so a reused pid is never hit."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with open(f"/proc/{pid}/stat") as file:
            stat = file.read()
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return
    finally:
        os.close(pidfd)
