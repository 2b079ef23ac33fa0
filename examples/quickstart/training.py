"""The training side of the quickstart: SFT, stages of RL, and what each model scores, by the programs a user starts.

Each program runs as a child, its output in a file. It reads its own TOML file, and what this run decides on top.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.quickstart.folder import Run
from megatron_klong import processes
from megatron_klong.agent.collect import collect
from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.worker import POLICY, Job, Played
from megatron_klong.config import Config, load_config, write_resolved
from megatron_klong.evaluate.training import TrainingRun
from megatron_klong.rl.config import RlConfig
from megatron_klong.rl.experience import read_lesson
from megatron_klong.rl.folders import RunFolder
from megatron_klong.serve.launch import serving
from megatron_klong.train.metrics import read_metrics
from megatron_klong.trajectory.episode import EpisodeRecord, read_episode

SFT_CONFIG, RL_CONFIG = (Path(__file__).parent / name for name in ("sft.toml", "rl.toml"))
UNTRAINED, SFT = "untrained", "sft"
SFT_PROCESSES = 2
_STOP_SECONDS = 20.0


class _EpisodeLayer(Config):
    episode: EpisodeConfig


class ProgramFailed(RuntimeError):
    """A program of the recipe did not end with 0; the message names its output."""


def train_sft(run: Run) -> None:
    """Two data-parallel processes, from random weights."""
    shards = [*([run.demonstration_shard] if run.config.demonstrations.count else []), run.shard]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SFT_PROCESSES)]
    settings = {
        "shards": json.dumps([str(prefix) for prefix in shards]),
        "run_folder": str(run.sft),
        "seed": str(run.config.seed),
    }
    start_program(run, "sft", [*torchrun, "-m", "megatron_klong.train.sft", str(SFT_CONFIG)], settings)


def train_rl_stage(run: Run, stage: str) -> None:
    """One stage, from where the last one ended."""
    program = ["-m", "megatron_klong.rl", str(RL_CONFIG), str(episode_file(run)), "--stage", stage]
    start_program(run, f"rl-{stage}", program, rl_settings(run))


def rl_settings(run: Run) -> dict[str, str]:
    """What this run decides about RL."""
    return {
        "weights": str(run.sft / "hugging_face"),
        "tokenizer": str(run.tokenizer),
        "tasks": str(run.papers),
        "split": str(run.split("train")),
        "run_folder": str(run.rl),
        "episode.turn_limit": str(run.config.evaluation.turn_limit),
        "seed": str(run.config.seed),
    }


def rl_config(run: Run) -> RlConfig:
    """The configuration that the stages of RL will resolve."""
    flags = [part for name, value in rl_settings(run).items() for part in (f"--{name}", value)]
    return load_config(RlConfig, [RL_CONFIG, episode_file(run)], flags)


def episode_file(run: Run) -> Path:
    """This run's episode settings as a layer over rl.toml."""
    path = run.folder / "episode.toml"
    if not path.exists():
        write_resolved(_EpisodeLayer(episode=run.config.episode), path)
    return path


def start_program(run: Run, name: str, program: Sequence[str], settings: dict[str, str]) -> None:
    """Run it to its end. Raises ProgramFailed."""
    output = run.output / f"{name}.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    flags = [part for key, value in settings.items() for part in (f"--{key}", value)]
    print(f"  to watch it: tail -f {output}", flush=True)
    with output.open("wb") as printed:
        command = [sys.executable, *program, *flags]
        status = processes.run(command, output=printed, environment=run.environment, stop_seconds=_STOP_SECONDS)
    if status:
        lines = output.read_text(errors="replace").strip().splitlines()
        raise ProgramFailed(f"{name} exited with {status}; it printed to {output}: {lines[-1:]}")


def evaluate(run: Run, model: str, weights: Path, heldout: Sequence[str]) -> list[EpisodeRecord]:
    """The held-out episodes of one model; they are recorded under its name."""
    evaluation, engine = run.config.evaluation, rl_config(run).engine
    rollouts = range(1, evaluation.rollouts_per_task + 1)
    planned = [(run.task_folder(task), rollout) for rollout in rollouts for task in heldout]
    with serving(weights, engine, run.output / f"engine-{model}.txt", seed=run.config.seed) as server:
        job = Job(
            name=model,
            episodes=[Played(task_folder=str(folder), rollout=rollout) for folder, rollout in planned],
            model=f"{POLICY}{model}",
            base_url=server.url,
            temperature=evaluation.temperature,
            tokenizer=str(run.tokenizer),
            settings=run.config.episode.model_copy(update={"turn_limit": evaluation.turn_limit}),
            max_episodes=engine.max_requests,
            log_folder=str(run.folder / "episodes"),
            record_folder=str(run.records),
        )
        finished = collect([job], workers=1, output_folder=run.output)
    return [read_episode(Path(episode.record)) for episode in sorted(finished, key=lambda episode: episode.record)]


def weights_after(run: Run) -> Path:
    """Those of the newest checkpoint of RL; before the first update, those it began with."""
    folder = RunFolder(run.rl)
    found, _ = folder.latest_checkpoint()
    return folder.weights(found.progress.step) if found else run.sft / "hugging_face"


def training_run(run: Run, models: Sequence[str]) -> TrainingRun:
    """What the report is to show of the training."""
    folder = RunFolder(run.rl)
    return TrainingRun(
        models=tuple(models),
        sft=read_metrics(run.sft),
        rl=read_metrics(run.rl),
        iterations=[_iteration(folder_of_iteration) for folder_of_iteration in folder.lessons()],
        phases=list(phases(run)),
    )


def _iteration(folder: Path) -> dict[str, object]:
    lesson = read_lesson(folder)
    fields = lesson.model_dump(mode="json", exclude={"iteration", "first_step", "updates"})
    iteration = lesson.iteration
    return {**fields, "stage": iteration.stage, "iteration": iteration.number, "updates": len(lesson.updates)}


def phases(run: Run) -> list[tuple[str, float]]:
    """Seconds by phase; those of RL as its loop noted them, the rest of its stages as start-up."""
    rl = RunFolder(run.rl).phases()
    found = []
    for name, seconds in run.seconds.items():
        if not name.startswith("rl "):
            found.append((name, seconds))
            continue
        parts = [line for line in rl if line["stage"] == name.removeprefix("rl ")]
        found += [(f"rl {line['phase']}", line["seconds"]) for line in parts]
        found.append(("rl start-up", max(0.0, seconds - sum(line["seconds"] for line in parts))))
    return found
