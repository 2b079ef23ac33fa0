"""Several evaluations -> episode records, each evaluation in a worker process, a bounded number at once.

    who waits       for whom             ended by
    collect         every worker         a worker that fails, or Ctrl-C: the others are interrupted, then killed
    a worker        its episodes         its episodes' deadlines
Always: every episode of every job is reported exactly once, or CollectError says which job fell short and where its
output is.
"""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_klong.agent.worker import FinishedEpisode, Job
from megatron_klong.processes import end_with_parent

_STOP_SECONDS = 10.0


class CollectError(RuntimeError):
    """A worker that failed; the message names its job and its output."""


def collect(
    jobs: Sequence[Job],
    *,
    workers: int,
    output_folder: Path,
    on_finished: Callable[[FinishedEpisode], None] = lambda finished: None,
) -> list[FinishedEpisode]:
    """Run the jobs, `workers` at once; what a worker prints goes to a file of its own in `output_folder`.

    on_finished is told of each episode as soon as its record is there; what it raises ends the collection.
    """
    output_folder.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_collect(jobs, workers, output_folder, on_finished))


async def _collect(
    jobs: Sequence[Job], workers: int, output_folder: Path, on_finished: Callable[[FinishedEpisode], None]
) -> list[FinishedEpisode]:
    slots = asyncio.Semaphore(workers)
    finished: list[FinishedEpisode] = []
    total = sum(len(job.episodes) for job in jobs)
    with tqdm(total=total, desc="episodes", unit="episode", delay=2, disable=None) as progress:

        async def play(job: Job) -> None:
            # closed here and now: left to the loop, a worker would be interrupted and neither awaited nor killed
            playing = contextlib.aclosing(_episodes(job, output_folder / f"{job.name}.txt"))
            async with slots, playing as episodes:
                async for episode in episodes:
                    on_finished(episode)
                    finished.append(episode)
                    progress.update()

        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(play(job))
        except* Exception as errors:  # the first fault is the cause, also of the interruption of the others
            raise errors.exceptions[0] from None
    return finished


async def _episodes(job: Job, output: Path) -> AsyncGenerator[FinishedEpisode]:
    """Start a worker and yield what it finishes."""
    expected = len(job.episodes)
    with output.open("wb") as printed:
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "megatron_klong.agent.worker",
            stdin=PIPE,
            stdout=PIPE,
            stderr=printed,
            start_new_session=True,  # Ctrl-C reaches it from here, once
            # not in the worker: its imports take seconds, in which we may be gone
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(job.model_dump_json().encode())
            worker.stdin.close()
            seen = 0
            async for line in worker.stdout:
                seen += 1
                yield FinishedEpisode.model_validate_json(line)
            code = await worker.wait()
        finally:
            await _stop(worker)
    if code or seen != expected:
        raise CollectError(
            f"worker {job.name} finished {seen} of {expected} episodes and exited with {code}; it printed to {output}: "
            f"{_last_line(output)}"
        )


async def _stop(worker: Process) -> None:
    """Let a worker that still runs clean up after an interrupt; kill it if it does not."""
    if worker.returncode is not None:
        return
    worker.send_signal(signal.SIGINT)
    try:
        await asyncio.wait_for(asyncio.shield(worker.wait()), _STOP_SECONDS)
    except TimeoutError:
        worker.kill()
        await worker.wait()


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"
