"""Commands that an episode leaves running: started, listed and stopped by number.

In the sandboxes of this package each is a command of its own (sandbox/background.py). Other providers keep processes
from call to call, so there a plain `nohup ... &` does it, and the agent is told so.
"""

from inspect_ai.util import sandbox

from megatron_klong.agent.archive import provided, unavailable_as_inspects
from megatron_klong.agent.deadline import readable_seconds
from megatron_klong.sandbox.background import BackgroundCommand
from megatron_klong.sandbox.results import TooManyCommands

_ELSEWHERE = "Error: this sandbox keeps processes by itself; start it in the shell with `nohup COMMAND > FILE 2>&1 &`"


class Jobs:
    """The background commands of one episode, numbered on from those it had before it was frozen."""

    def __init__(self) -> None:
        self._jobs: list[BackgroundCommand] = []
        self.before = 0

    @property
    def started(self) -> int:
        """How many there have been."""
        return self.before + len(self._jobs)

    @property
    def running(self) -> list[str]:
        """The commands that run, as they were written."""
        return [job.command[-1] for job in self._jobs if job.running]

    async def start(self, cmd: str, cwd: str) -> str:
        """Start one; the text for the agent."""
        ours = provided(sandbox())
        if ours is None:
            return _ELSEWHERE
        output = f"/tmp/jobs/{self.started + 1}.txt"
        try:
            with unavailable_as_inspects():
                job = await ours.sandbox.start(["bash", "-c", cmd], output_path=output, cwd=cwd)
        except (TooManyCommands, OSError, ValueError) as error:  # ValueError: a command that cannot be one
            return f"Error: {error}"
        self._jobs.append(job)
        return f"Job {self.started} runs; what it prints goes to {output}."

    async def stop(self, number: int) -> str:
        """Stop one; the text for the agent."""
        if not self.before < number <= self.started:
            return f"Error: there is no job {number}."
        await self._jobs[number - self.before - 1].stop()
        return self.listing()

    async def stop_all(self) -> None:
        for job in self._jobs:
            await job.stop()

    def listing(self) -> str:
        """All of them, for the agent."""
        if not self._jobs:
            return "There are no jobs."
        return "\n".join(_line(number, job) for number, job in enumerate(self._jobs, self.before + 1))


def _line(number: int, job: BackgroundCommand) -> str:
    command = job.command[-1].strip().splitlines() or [""]
    shown = command[0] if len(command) == 1 and len(command[0]) <= 100 else f"{command[0][:100]} ..."
    state = "runs since" if job.running else f"ended with exit code {job.returncode} after"
    return f"{number}: {state} {readable_seconds(job.seconds)}, output in {job.output_path}: {shown}"
