"""Commands that run on while others come and go: servers, long trainings.

Each is a sandbox command of its own, with the files (and the network, where one is given) of its sandbox but with
its own processes: other commands neither see nor signal it. It counts towards the limits of its sandbox, prints to
a file there, and is dead when its sandbox is closed.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from megatron_klong.sandbox.process import Child
from megatron_klong.sandbox.results import CommandResult, Killed, SandboxUnavailable

START_SECONDS = 60.0


class BackgroundCommand:
    """A command that was started with `Sandbox.start`."""

    def __init__(
        self,
        *,
        id: str,
        command: Sequence[str],
        output_path: str,
        child: Child,
        result_of: Callable[[CommandResult], CommandResult],
        ended: Callable[[], None],
    ) -> None:
        self.id = id
        self.command = tuple(command)
        self.output_path = output_path
        self.result: CommandResult | None = None
        """How it ended, without what it printed; None while it runs, and when it was stopped."""
        self.error: SandboxUnavailable | None = None
        """Why it has no result."""
        self._child = child
        self._result_of = result_of
        self._ended = ended
        self._since = time.monotonic()
        self._seconds: float | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def running(self) -> bool:
        return self._seconds is None

    @property
    def returncode(self) -> int | None:
        """None while it runs; 137, as of a killed command, once it was stopped."""
        if self.running:
            return None
        return 137 if self.result is None else self.result.returncode

    @property
    def seconds(self) -> float:
        """For how long it has run, or ran."""
        return time.monotonic() - self._since if self._seconds is None else self._seconds

    async def wait(self) -> int:
        """Wait for its end; its returncode."""
        await asyncio.wait([self._task])
        assert self.returncode is not None, "the task is done"
        return self.returncode

    async def stop(self) -> None:
        """Kill it and all it started, and wait until they are dead. Does nothing more once it has ended."""
        self.abort()
        await self.wait()

    def abort(self) -> None:
        """Kill it without waiting."""
        if self.running:
            self._child.abort(SandboxUnavailable(f"{self.id} was stopped"))

    async def _run(self) -> None:
        try:
            self.result = self._result_of(await self._child.run())
        except Killed as killed:
            self.result = killed.result
        except SandboxUnavailable as error:  # it was stopped, or could not be set up
            self.error = error
        finally:
            self._seconds = time.monotonic() - self._since
            self._ended()
