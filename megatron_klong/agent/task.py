"""The Inspect AI task `megatron_klong/paper_replication`: folders in PaperBench's layout, played by the scaffold."""

import math
import os
import shlex
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser
from inspect_ai.util import SandboxEnvironmentSpec

import megatron_klong.sandbox.provider  # noqa: F401  # registers the sandbox `bubblewrap`
from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.paper_task import PaperTask, load_tasks, read_split
from megatron_klong.agent.scaffold import klong_scaffold
from megatron_klong.agent.scoring import rubric_score
from megatron_klong.agent.tools import SUBMISSION
from megatron_klong.config import load_config

INSTRUCTIONS = """\
Replicate the paper in /home/paper. Read paper.md whole, then addendum.md if there is need. Work in /home/submission: \
do what the paper reports, write down its results, and leave a reproduce.sh that reproduces them. \
Call submit when the work is done."""


@task
def paper_replication(
    tasks: str,
    tokenizer: str | None = None,
    split: str | None = None,
    config: str | None = None,
    freeze_folder: str | None = None,
    artifacts: str | None = None,
    **overrides: Any,
) -> Task:
    """Play every task of a folder.

    Args:
        tasks: folder of task folders, or one of them
        tokenizer: the file whose tokens the context policy counts; not needed for a model klong/...
        split: file with the ids to play
        config: TOML file of episode settings
        freeze_folder: where episodes are frozen, and gone on with if one is there already
        artifacts: folder for what each episode leaves: its submission as .tar.zst, its network log
        overrides: single settings by dotted name, such as timeout=2h or context.max_tokens=2048
    """
    flags = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    settings = load_config(EpisodeConfig, [config] if config else [], flags)
    chosen = load_tasks(Path(tasks), read_split(Path(split)) if split else None)
    samples = [sample(paper_task) for paper_task in chosen]
    return episode_task(samples, settings, tokenizer, freeze_folder=freeze_folder, go_on=True, artifacts=artifacts)


def episode_task(
    samples: list[Sample],
    settings: EpisodeConfig,
    tokenizer: str | None,
    name: str | None = None,
    *,
    freeze_folder: str | None = None,
    go_on: bool = False,
    artifacts: str | None = None,
) -> Task:
    """The same from samples and checked settings.

    freeze_folder: where episodes are frozen.  go_on: from what is there, also where a sample names no state.
    artifacts: folder for what each leaves.
    """
    return Task(
        dataset=samples,
        solver=klong_scaffold(settings, tokenizer, freeze_folder, go_on=go_on),
        scorer=rubric_score(settings.submission_bytes, artifacts, freeze_folder),
        sandbox=SandboxEnvironmentSpec("bubblewrap", settings.bubblewrap)
        if settings.apptainer is None
        else SandboxEnvironmentSpec("apptainer", settings.apptainer),
        time_limit=math.ceil(settings.hard_timeout.in_seconds),
        fail_on_error=False,
        name=name,
    )


def sample(paper_task: PaperTask, rollout: int | None = None, frozen: str | None = None) -> Sample:
    """A task to be played; rollout: which attempt at it, where Inspect's epochs do not count them.

    frozen: the state to go on from, whose files take the place of the task's.
    """
    files = {} if frozen else paper_task.shown_files()
    programs = [shlex.quote(target) for target, file in files.items() if os.access(file, os.X_OK)]
    return Sample(
        id=paper_task.id if rollout is None else f"{paper_task.id}.{rollout}",
        input=[ChatMessageUser(content=INSTRUCTIONS)],
        files={target: str(file.resolve()) for target, file in files.items()},
        # Inspect copies contents, not modes.
        setup=None if frozen else "\n".join([f"mkdir -p {SUBMISSION}", *(f"chmod +x {name}" for name in programs)]),
        metadata={
            "task": paper_task.id,
            "rollout": rollout,
            "title": paper_task.title,
            "folder": str(paper_task.folder.resolve()),
            "frozen": frozen,
        },
    )
