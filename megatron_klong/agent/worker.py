"""One Inspect AI evaluation in a process of its own: a job on stdin, a JSON line on stdout for every finished episode.

Inspect allows one evaluation a process, so a collector runs several of these. Always: the record of an episode is on
disk before its line is printed; ended by its parent's death, it takes its sandboxes along.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from inspect_ai import eval as inspect_eval
from inspect_ai.hooks import Hooks, SampleEnd, hooks
from inspect_ai.model import GenerateConfig, Model, get_model

from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.paper_task import load_task
from megatron_klong.agent.records import record_of
from megatron_klong.agent.task import episode_task, sample
from megatron_klong.config import Config
from megatron_klong.serve.provider import KlongAPI
from megatron_klong.serve.turns import write_turns
from megatron_klong.trajectory.episode import EPISODE_SUFFIX, write_episode

POLICY = "klong/"
# Messages and events of hours are held in memory, and hardly anything goes in cycles: looking for those at Python's own
# intervals takes a sixth of a turn.
_COLLECT = (50_000, 20, 50)
_TRACE = 13  # Inspect's level below INFO: a file with each action, which takes 7 % of a turn


class Played(Config):
    """One episode to be played. rollout: which attempt at the task, from 1."""

    task_folder: str
    rollout: int = 1
    frozen: str | None = None
    """A state to go on from (agent/frozen.py)."""


class Job(Config):
    """One evaluation: which episodes, played by which model, under which settings."""

    name: str
    episodes: list[Played]
    model: str
    """An Inspect AI model name; `klong/...` is a policy of our own, behind `base_url`."""
    base_url: str | None = None
    temperature: float | None = None
    """Of sampling; without it, the model's own default."""
    tokenizer: str
    settings: EpisodeConfig
    max_episodes: int = 16
    """Episodes at once."""
    log_folder: str
    record_folder: str
    freeze_folder: str | None = None
    """Where episodes are frozen, when a file FREEZE there asks for it or every so many turns."""
    artifact_folder: str | None = None
    """Keeps what each episode leaves: its submission as .tar.zst, its requests to the network."""


def sampled_file(record: Path) -> Path:
    """What a policy of our own sampled in an episode: ids and log-probabilities by turn, beside the record."""
    return record.with_name(record.name.removesuffix(EPISODE_SUFFIX) + ".turns.jsonl")


class FinishedEpisode(Config):
    """The line that is printed for an episode."""

    job: str
    record: str
    ending: str
    score: float | None
    turns: int


def main() -> int:
    # Inherited as ignored when the whole run was started in the background; then Inspect could not clean up.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What libraries print must not come between the lines.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(_TRACE)
    gc.set_threshold(*_COLLECT)
    _let_nobody_watch()
    job = Job.model_validate_json(sys.stdin.buffer.read())
    model = load_model(job)
    turns = model.api.turns if isinstance(model.api, KlongAPI) else None

    @hooks(name="klong_records", description="Writes a record for every finished episode.")
    class Records(Hooks):
        async def on_sample_end(self, data: SampleEnd) -> None:
            record = record_of(data.sample, job.model, job.name, turns)
            if turns is not None:
                sampled = turns.take(turn.key for turn in record.turns if turn.key)
                write_turns(sampled, sampled_file(Path(job.record_folder) / record.file_name))
            path = write_episode(record, Path(job.record_folder))
            finished = FinishedEpisode(
                job=job.name, record=str(path), ending=record.ending, score=record.score, turns=len(record.turns)
            )
            lines.write(finished.model_dump_json() + "\n")

    run(job, model)
    return 0


def _let_nobody_watch() -> None:
    """Leave out Inspect's Agent Client Protocol: it makes of each event what a client would be sent, which takes 7 % of
    a turn, and here no client can be. Inspect has no setting for it."""
    with contextlib.suppress(ImportError):  # another version names it otherwise: then it takes its time
        from inspect_ai.agent._acp.transport import _acp_live_active

        _acp_live_active.set(True)


def load_model(job: Job) -> Model:
    """The job's model as Inspect AI knows it."""
    policy: dict[str, Any] = {}
    if job.model.startswith(POLICY):
        # of all its episodes, also of those that never end; on disk before a reply is acted on
        turns = Path(job.record_folder) / f"{job.name}.sampling.jsonl"
        policy = {"tokenizer": job.tokenizer, "turns": str(turns)}
    return get_model(
        job.model,
        base_url=job.base_url,
        api_key="unused" if job.base_url else None,
        config=GenerateConfig(temperature=job.temperature),
        **policy,
    )


def run(job: Job, model: Model) -> None:
    """Play the job's episodes, logs into its log folder."""
    samples = [sample(load_task(Path(played.task_folder)), played.rollout, played.frozen) for played in job.episodes]
    logs = inspect_eval(
        episode_task(
            samples,
            job.settings,
            job.tokenizer,
            job.name,
            freeze_folder=job.freeze_folder,
            artifacts=job.artifact_folder,
        ),
        model=model,
        max_samples=job.max_episodes,
        max_connections=job.max_episodes,
        max_subprocesses=job.max_episodes,
        max_sandboxes=job.max_episodes,
        log_dir=job.log_folder,
        log_format="eval",
        log_buffer=1,
        log_realtime=False,
        log_model_api=False,
        display="none",
        ctl_server=False,
    )
    if logs[0].status != "success":
        reason = logs[0].error.message if logs[0].error else logs[0].status
        raise SystemExit(f"evaluation {job.name} ended as {logs[0].status}: {reason}; its log is {logs[0].location}")


if __name__ == "__main__":
    sys.exit(main())
