"""Progressive RL: what is on disk decides what comes next, until every stage is in the weights.

    who waits           for whom                              ended by
    the loop            the engine to come up                 its end, which is reported
    collect             a worker's episodes                   their deadlines; the end of the engine fails the run
    the loop            the trainer                           its end

One process writes the bank. Killed at any moment, the run is continued by the same command: episodes that are in the
bank are not played again, an iteration that is in the weights is not trained again (megatron_klong.rl.stages).
"""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.agent.collect import collect
from megatron_klong.agent.ending import Ending
from megatron_klong.agent.paper_task import PaperTask
from megatron_klong.agent.worker import POLICY, FinishedEpisode, Job, Played, sampled_file
from megatron_klong.config import write_resolved
from megatron_klong.rl.bank import BankWriter
from megatron_klong.rl.bank_index import Iteration
from megatron_klong.rl.config import RlConfig
from megatron_klong.rl.experience import Lesson, prepare
from megatron_klong.rl.folders import RunFolder
from megatron_klong.rl.launch import Launcher
from megatron_klong.rl.sampled_turns import by_segment
from megatron_klong.rl.stages import Phase, PlannedIteration, Work, next_work
from megatron_klong.serve.launch import Server, serving
from megatron_klong.serve.turns import TurnStore
from megatron_klong.trajectory.episode import read_episode
from megatron_klong.trajectory.glm import GlmRenderer

# What a machine did to an episode. While the engine is gone it says nothing, not even for the metrics.
_NO_FAULT_OF_THE_POLICY = (Ending.ENGINE_FAILED, Ending.SANDBOX_FAILED, Ending.AGENT_FAILED)


class RlError(RuntimeError):
    """The run cannot go on; the message says why, and what is kept."""


@dataclass(kw_only=True)
class Loop:
    """One run, continued."""

    config: RlConfig
    tasks: dict[str, PaperTask]
    plan: Sequence[PlannedIteration]
    launcher: Launcher
    renderer: GlmRenderer
    bank: BankWriter
    step: int
    engine: ExitStack
    server: Server | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.folder)


def run(
    config: RlConfig,
    tasks: Sequence[PaperTask],
    plan: Sequence[PlannedIteration],
    launcher: Launcher,
    renderer: GlmRenderer,
) -> None:
    """Everything in `plan` that is not in the weights yet. Raises RlError, BankError, TrainerFailed, ServerFailed."""
    folder = RunFolder(config.folder)
    write_resolved(config, folder.path / "config.toml")
    step = checkpoint_step(folder)
    with BankWriter(folder.bank, checkpoint_step=step) as bank, ExitStack() as engine:
        loop = Loop(
            config=config,
            tasks={task.id: task for task in tasks},
            plan=plan,
            launcher=launcher,
            renderer=renderer,
            bank=bank,
            step=step,
            engine=engine,
        )
        while work := what_is_next(loop):
            say(work)
            with folder.phase(str(work.phase), work.iteration):
                PHASES[work.phase](loop, work)


def what_is_next(loop: Loop) -> Work | None:
    """The next phase, None if there is none."""
    return next_work(
        loop.plan,
        loop.bank.contents,
        checkpoint_step=loop.step,
        served_step=loop.step if loop.server else None,
    )


def refit(loop: Loop, work: Work) -> None:
    """Serve the weights of the checkpoint."""
    loop.server = loop.engine.enter_context(
        serving(
            loop.folder.weights(loop.step) if loop.step else Path(loop.config.weights),
            loop.config.engine,
            loop.folder.output / f"engine-{loop.step:08d}.txt",
            policy_epoch=loop.step,
            seed=engine_seed(loop, work.iteration),
            host=loop.launcher.engine_host,
            prefix=loop.launcher.engine_prefix,
        )
    )


def engine_seed(loop: Loop, iteration: Iteration) -> int:
    """Another one whenever the engine starts anew, so that no episode is a copy of one that was finished before."""
    banked = len(loop.bank.contents.episodes.get(iteration, ()))
    digest = hashlib.sha256(f"{loop.config.seed}/{iteration}/{loop.step}/{banked}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def roll_out(loop: Loop, work: Work) -> None:
    """Play the missing episodes; each is in the bank as soon as it is finished and judged."""
    assert loop.server is not None
    stage = loop.config.stage(work.iteration.stage)
    missing = len(loop.bank.contents.episodes.get(work.iteration, ()))
    job = Job(
        # a name of its own for every attempt: what a killed one left is not mixed in
        name=f"{stage.name}-{work.iteration.number:04d}-from-{missing}",
        episodes=[
            Played(task_folder=str(loop.tasks[rollout.task].folder), rollout=rollout.rollout)
            for rollout in work.rollouts
        ],
        model=f"{POLICY}policy",
        base_url=loop.server.url,
        temperature=stage.temperature,
        tokenizer=str(loop.config.tokenizer_path),
        settings=stage.episode(loop.config.episode),
        max_episodes=loop.config.max_episodes,
        log_folder=str(loop.folder.episodes),
        record_folder=str(loop.folder.records / f"{stage.name}-{work.iteration.number:04d}"),
    )
    collect([job], workers=1, output_folder=loop.folder.output, on_finished=lambda episode: bank(loop, work, episode))


def bank(loop: Loop, work: Work, finished: FinishedEpisode) -> None:
    """Put one finished episode into the bank. Raises ServerFailed if it says nothing because the engine is gone."""
    assert loop.server is not None
    if finished.ending in _NO_FAULT_OF_THE_POLICY:
        loop.server.check()
    path = Path(finished.record)
    record = read_episode(path)
    loop.bank.add(work.iteration, record, by_segment(record, TurnStore(sampled_file(path)), loop.renderer))


def judge(loop: Loop, work: Work) -> None:
    """Workers judge an episode before they report it, so there is never one without a verdict."""
    raise RlError(f"{work.episodes[0].id} is in the bank without a verdict; this program judges episodes as they end")


def train(loop: Loop, work: Work) -> None:
    """Marker, updates, checkpoint; while the trainer runs there is no engine beside it."""
    loop.engine.close()
    loop.server = None
    folder = loop.folder.iteration(work.iteration)
    lesson = prepare(loop.folder.bank, work.episodes, folder, loop.renderer, loop.config, step=loop.step)
    loop.bank.mark_consumed(work.iteration, step=lesson.last_step)
    report(lesson)
    if not lesson.updates:
        return
    output = loop.folder.output / f"trainer-{lesson.last_step:08d}.txt"
    loop.launcher.train([str(loop.folder.path / "config.toml"), str(folder)], output)
    loop.step = checkpoint_step(loop.folder)
    if loop.step != lesson.last_step:
        raise RlError(f"the trainer left no checkpoint of step {lesson.last_step}; see {output}")


PHASES = {Phase.REFIT: refit, Phase.ROLLOUT: roll_out, Phase.JUDGE: judge, Phase.TRAIN: train}


def checkpoint_step(folder: RunFolder) -> int:
    """Of the newest whole checkpoint; 0 for the weights a run begins with."""
    found, passed_over = folder.latest_checkpoint()
    for reason in passed_over:
        print(f"passed over a checkpoint: {reason}", flush=True)
    return found.progress.step if found else 0


def say(work: Work) -> None:
    """A line for the phase that begins."""
    what = f", {len(work.rollouts)} episodes" if work.rollouts else ""
    print(f"{work.iteration}: {work.phase}{what}", flush=True)


def report(lesson: Lesson) -> None:
    """A line for what the rollouts scored."""
    score = "no scores" if lesson.mean_score is None else f"mean score {lesson.mean_score:.3f}"
    error = "" if lesson.standard_error is None else f" ± {lesson.standard_error:.3f}"
    left_out = ", ".join(f"{count} left out: {reason}" for reason, count in lesson.left_out.items())
    taught = f"{len(lesson.updates)} updates on {lesson.trained_tokens:,} sampled tokens"
    print(
        f"{lesson.iteration}: {score}{error} (n = {lesson.scored}), {lesson.windows} windows, {taught}"
        f"{'; ' + left_out if left_out else ''}",
        flush=True,
    )
