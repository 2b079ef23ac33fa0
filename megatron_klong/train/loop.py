"""The SFT run from model to exported weights, on every process alike; to disk and to the screen only rank 0 writes.

What stands in the run folder is continued: the newest whole checkpoint says where, the configuration says how.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
from torch import distributed
from tqdm import tqdm

from megatron_klong.config import write_resolved
from megatron_klong.data.mixture import Mixture
from megatron_klong.model.build import build_chunks
from megatron_klong.model.checkpoint_folder import find_checkpoint
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.flops import training_flops
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.model.load_megatron import load_megatron
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.train import checkpoint
from megatron_klong.train.checkpoint import Checkpoint, CheckpointError, Progress, Retention, Setting
from megatron_klong.train.checkpoint_writer import CheckpointWriter
from megatron_klong.train.config import SftConfig
from megatron_klong.train.export import export
from megatron_klong.train.feed import StepData, prefetched, step_data
from megatron_klong.train.figures import Figures, losses_by_group, step_figures
from megatron_klong.train.loss import LossFunction, cross_entropy_by_group
from megatron_klong.train.metrics import RunLog
from megatron_klong.train.optimizer import Training, make_trainable
from megatron_klong.train.stall import Watchdog
from megatron_klong.train.step import StepResult, evaluate, parts_of_this_process, train_step
from megatron_klong.train.stopping import StopRequest

EXPORT, INITIAL_EXPORT = "hugging_face", "initial_hugging_face"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One process's view of the run."""

    config: SftConfig
    data: Mixture
    model_config: ModelConfig
    training: Training
    checkpoints: CheckpointWriter
    steps: int

    @property
    def folder(self) -> Path:
        return Path(self.config.run_folder)

    @property
    def loss(self) -> LossFunction:
        return cross_entropy_by_group(self.data.train.group_count)

    @property
    def setting(self) -> Setting:
        return Setting(
            model=self.model_config.model_dump(mode="json"),
            layout=self.config.layout.model_dump(mode="json"),
            processes=distributed.get_world_size(),
        )


def run_sft(
    config: SftConfig, model_config: ModelConfig, data: Mixture, request: StopRequest, watchdog: Watchdog
) -> None:
    """The whole run. Raises CheckpointError, TrainingDiverged, StoppedOnRequest."""
    initialize(config.layout, seed=config.seed)
    run = start(config, model_config, data)
    progress = resume(run)
    if config.export_initial and progress.step == 0:
        export_weights(run, INITIAL_EXPORT)
    watchdog.done("loading")
    with open_log(run, progress) as log, run.checkpoints, feed(run, progress) as batches:
        if progress.step == 0 and run.data.validation:
            log.write(0, validation_figures(run))
        for step in steps_left(run, progress):
            started = time.monotonic()
            given, waited = next(batches)
            result = train_step(run.training, given.batches, run.loss)
            line = figures(run, given, result, seconds=time.monotonic() - started, waited=waited)
            progress = advance(run, progress)
            log.write(step, line | (validation_figures(run) if validates_after(run, step) else {}))
            watchdog.done(f"step {step}")
            run.checkpoints.poll()
            stop = request.agree()
            if stop or step % config.save_every_steps == 0 or step == run.steps:
                save(run, progress)
                watchdog.done(f"the checkpoint of step {step}")
            if stop:
                break
    request.end_run(progress.step)
    if config.export_hugging_face:
        export_weights(run, EXPORT)
    say(f"trained to step {progress.step}; everything is in {run.folder}")
    destroy()


def start(config: SftConfig, model_config: ModelConfig, data: Mixture) -> Run:
    """Build the model, fill it, make it trainable."""
    chunks = build_chunks(
        model_config, config.layout, precision=config.precision, fp8=config.fp8, recompute=config.recompute
    )
    if distributed.get_rank() == 0:
        write_resolved(config, Path(config.run_folder) / "config.toml")
    if config.hugging_face_init:
        load_hugging_face(chunks, model_config, Path(config.hugging_face_init))
    if config.megatron_init:
        load_megatron(chunks, model_config, find_checkpoint(Path(config.megatron_init)).folder)
    steps = config.steps_of(data.train)
    training = make_trainable(chunks, config.optimizer, steps=steps)
    retention = Retention(newest=config.keep_checkpoints, every_steps=config.keep_every_steps)
    checkpoints = CheckpointWriter(config.checkpoints_folder, config, retention, background=config.async_checkpoints)
    return Run(
        config=config,
        data=data,
        model_config=model_config,
        training=training,
        checkpoints=checkpoints,
        steps=steps,
    )


def resume(run: Run) -> Progress:
    """Load the newest whole checkpoint of the run folder, if there is one."""
    found = _agree_on_latest(run.config.checkpoints_folder)
    if found is None:
        return Progress(step=0, data_position=0, data_fingerprint=run.data.train.fingerprint)
    if found.progress.data_fingerprint != run.data.train.fingerprint:
        raise CheckpointError(
            f"{found.folder}: its run had other rows (sources, weights, validation_share, row_tokens, seed or "
            "what windows are padded to, window_multiple and 2 * layout.context_parallel, have changed); set them "
            "back, or use another run_folder"
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
    """Begin to write a checkpoint."""
    run.checkpoints.save(run.training, progress, run.setting)


@contextmanager
def feed(run: Run, progress: Progress) -> Iterator[Iterator[tuple[StepData, float]]]:
    """The data of each step left, with the seconds it was waited for."""
    rows, part, parts = run.config.global_batch_rows, *data_parallel()
    left = run.steps - progress.step

    def make(step: int) -> StepData:
        first = progress.data_position + step * rows
        chosen = [run.data.train.row_at(position) for position in range(first, first + rows)]
        return step_data(run.data.train, chosen, part=part, parts=parts)

    with prefetched(make, range(left)) as made:
        yield ((replace(given, batches=parts_of_this_process(given.batches)), waited) for given, waited in made)


def data_parallel() -> tuple[int, int]:
    """Rank and size: which of how many shares of a batch is this process's."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def validates_after(run: Run, step: int) -> bool:
    """Whether the loss on what is held out is measured."""
    every = run.config.validate_every_steps
    return run.data.validation is not None and (step == run.steps or (every is not None and step % every == 0))


def validation_figures(run: Run) -> Figures:
    """Losses on what is held out."""
    blend, (part, parts) = run.data.validation, data_parallel()
    assert blend is not None
    rows = blend.rows_of(0)[: run.config.validation_rows]
    rows += [()] * (-len(rows) % parts)
    size = min(len(rows), run.config.global_batch_rows)
    portions = (
        parts_of_this_process(blend.batches(rows[first : first + size], part=part, parts=parts))
        for first in range(0, len(rows), size)
    )
    means = evaluate(run.training, portions, cross_entropy_by_group(blend.group_count))
    names = [source.name for source in blend.parts]
    return {"validation_loss": means["loss"], **losses_by_group(means, names, prefix="validation_loss")}


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
    steps = range(progress.step + 1, run.steps + 1)
    hidden = None if distributed.get_rank() == 0 else True  # None: hidden unless on a terminal
    yield from tqdm(steps, desc="sft", unit="step", initial=progress.step, total=run.steps, disable=hidden)


def figures(run: Run, given: StepData, result: StepResult, *, seconds: float, waited: float) -> Figures:
    """A line of the curves."""
    flops = training_flops(run.model_config, given.window_tokens)
    return {
        **step_figures(result, seconds=seconds),
        **losses_by_group(result.metrics, [source.name for source in run.data.train.parts]),
        "pad_share": 1 - result.tokens / (run.config.global_batch_rows * run.config.row_tokens),
        "prefix_share": given.prefix_tokens / result.tokens,
        "tflops_per_device": flops / seconds / distributed.get_world_size() / 1e12,
        "data_wait_seconds": waited,
    }


def export_weights(run: Run, name: str) -> None:
    """Write weights in Hugging Face format, with the shards' tokenizer if its file can still be found."""
    init = run.config.hugging_face_init
    tokenizer = run.data.find_tokenizer([Path(init)] if init else [])
    if tokenizer is None:
        say(f"{run.folder / name} has no tokenizer: the file the shards were made with was not found; copy it there")
    export(run.training.chunks, run.model_config, run.folder / name, tokenizer)


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
