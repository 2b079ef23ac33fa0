"""The SFT run from model to exported weights, on every process alike; to disk and to the screen only rank 0 writes.

What stands in the run folder is continued: the newest whole checkpoint says where, the configuration says how.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
from torch import distributed
from tqdm import tqdm

from megatron_klong.config import write_resolved
from megatron_klong.data.batch import PackedBatch
from megatron_klong.model.build import build_model
from megatron_klong.model.checkpoint_folder import find_checkpoint
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.model.load_megatron import load_megatron
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.train import checkpoint
from megatron_klong.train.checkpoint import Checkpoint, CheckpointError, Progress, Setting
from megatron_klong.train.config import SftConfig
from megatron_klong.train.export import export
from megatron_klong.train.loss import cross_entropy
from megatron_klong.train.metrics import RunLog
from megatron_klong.train.optimizer import Training, make_trainable
from megatron_klong.train.rows import TrainingRows
from megatron_klong.train.stall import Watchdog
from megatron_klong.train.step import StepResult, parts_of_this_process, train_step
from megatron_klong.train.stopping import StopRequest

EXPORT, INITIAL_EXPORT = "hugging_face", "initial_hugging_face"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One process's view of the run."""

    config: SftConfig
    rows: TrainingRows
    model_config: ModelConfig
    training: Training

    @property
    def folder(self) -> Path:
        return Path(self.config.run_folder)

    @property
    def setting(self) -> Setting:
        return Setting(
            model=self.model_config.model_dump(mode="json"),
            layout=self.config.layout.model_dump(mode="json"),
            processes=distributed.get_world_size(),
        )


def run_sft(
    config: SftConfig, model_config: ModelConfig, rows: TrainingRows, request: StopRequest, watchdog: Watchdog
) -> None:
    """The whole run. Raises CheckpointError, TrainingDiverged, StoppedOnRequest."""
    initialize(config.layout, seed=config.seed)
    run = start(config, model_config, rows)
    progress = resume(run)
    if config.export_initial and progress.step == 0:
        export_weights(run, INITIAL_EXPORT)
    watchdog.done("loading")
    with open_log(run, progress) as log:
        for step in steps_left(run, progress):
            started = time.monotonic()
            result = train_step(run.training, next_batches(run, progress), cross_entropy)
            progress = advance(run, progress)
            log.write(step, figures(result, seconds=time.monotonic() - started))
            watchdog.done(f"step {step}")
            stop = request.agree()
            if stop or step % config.save_every_steps == 0 or step == config.steps:
                save(run, progress)
                watchdog.done(f"the checkpoint of step {step}")
            if stop:
                break
    request.end_run(progress.step)
    if config.export_hugging_face:
        export_weights(run, EXPORT)
    say(f"trained to step {progress.step}; everything is in {run.folder}")
    destroy()


def start(config: SftConfig, model_config: ModelConfig, rows: TrainingRows) -> Run:
    """Build the model, fill it, make it trainable."""
    if distributed.get_rank() == 0:
        write_resolved(config, Path(config.run_folder) / "config.toml")
    model = build_model(model_config, config.layout, precision=config.precision, recompute=config.recompute)
    if config.hugging_face_init:
        load_hugging_face(model, model_config, Path(config.hugging_face_init))
    if config.megatron_init:
        load_megatron(model, model_config, find_checkpoint(Path(config.megatron_init)).folder)
    training = make_trainable(model, config.optimizer, steps=config.steps)
    return Run(config=config, rows=rows, model_config=model_config, training=training)


def resume(run: Run) -> Progress:
    """Load the newest whole checkpoint of the run folder, if there is one."""
    found = _agree_on_latest(run.config.checkpoints_folder)
    if found is None:
        return Progress(step=0, data_position=0, data_fingerprint=run.rows.fingerprint)
    if found.progress.data_fingerprint != run.rows.fingerprint:
        raise CheckpointError(
            f"{found.folder}: its run had other rows (shards, row_tokens or seed have changed); set them back, or use "
            "another run_folder"
        )
    checkpoint.load(found, run.training, run.setting)
    say(f"resumed from {found.folder}")
    return found.progress


def _agree_on_latest(folder: Path) -> Checkpoint | None:
    """What rank 0 finds: on a shared file system, processes may see different things for a while."""
    found: list[Checkpoint | None] = [None]
    if distributed.get_rank() == 0:
        found[0], passed_over = checkpoint.latest(folder)
        for reason in passed_over:
            say(f"passed over a checkpoint: {reason}")
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint."""
    folder, keep = run.config.checkpoints_folder, run.config.keep_checkpoints
    checkpoint.save(folder, run.training, progress, run.setting, keep=keep)


def next_batches(run: Run, progress: Progress) -> list[PackedBatch]:
    """This process's share of the global batch."""
    part, parts = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return parts_of_this_process(
        run.rows.batches(progress.data_position, run.config.global_batch_rows, part=part, parts=parts)
    )


def advance(run: Run, progress: Progress) -> Progress:
    """After one step."""
    return Progress(
        step=progress.step + 1,
        data_position=progress.data_position + run.config.global_batch_rows,
        data_fingerprint=progress.data_fingerprint,
    )


def open_log(run: Run, progress: Progress) -> RunLog:
    """Steps already trained are kept in the curves, later ones cut off."""
    return RunLog(
        run.folder,
        first_step=progress.step + 1,
        writes=distributed.get_rank() == 0,
        wandb=run.config.wandb,
        settings=run.config.model_dump(mode="json"),
    )


def steps_left(run: Run, progress: Progress) -> Iterator[int]:
    """Step numbers from 1, behind a progress bar if rank 0 has a terminal."""
    steps = range(progress.step + 1, run.config.steps + 1)
    hidden = None if distributed.get_rank() == 0 else True  # None: hidden unless on a terminal
    yield from tqdm(steps, desc="sft", unit="step", initial=progress.step, total=run.config.steps, disable=hidden)


def figures(result: StepResult, *, seconds: float) -> dict[str, float]:
    """A line of the curves."""
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "seconds": seconds,
        "tokens_per_second": result.tokens / seconds,
        **result.metrics,
    }


def export_weights(run: Run, name: str) -> None:
    """Write weights in Hugging Face format, with the shards' tokenizer if its file can still be found."""
    init = run.config.hugging_face_init
    tokenizer = run.rows.shards.find_tokenizer([Path(init)] if init else [])
    if tokenizer is None:
        say(f"{run.folder / name} has no tokenizer: the file the shards were made with was not found; copy it there")
    export(run.training.model, run.model_config, run.folder / name, tokenizer)


def give_up(reason: str) -> None:
    """End a run that every process must end: one line on rank 0's screen, and nothing left open."""
    if distributed.get_rank() == 0:
        print(reason, flush=True, file=sys.stderr)
    distributed.barrier()  # a launcher that sees one process fail kills the others, also one that has yet to say why
    destroy()


def say(text: str) -> None:
    """A line on rank 0's screen."""
    if distributed.get_rank() == 0:
        print(text, flush=True, file=sys.stdout)
