"""One iteration of RL in the trainer, on every process alike; to disk only rank 0 writes."""

import time
from dataclasses import dataclass
from pathlib import Path

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
from torch import distributed

from megatron_klong.data.batch import PackedBatch
from megatron_klong.model.build import build_chunks
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.rl.config import RlConfig
from megatron_klong.rl.folders import RunFolder
from megatron_klong.rl.objective import largest_mismatch, objective, tempered, with_old_log_probs
from megatron_klong.rl.rows import ExperienceRows
from megatron_klong.train import checkpoint
from megatron_klong.train.checkpoint import CheckpointError, Progress, Retention, Setting
from megatron_klong.train.checkpoint_writer import CheckpointWriter
from megatron_klong.train.config import OptimizerConfig
from megatron_klong.train.export import export
from megatron_klong.train.figures import step_figures
from megatron_klong.train.metrics import RunLog
from megatron_klong.train.optimizer import Training, make_trainable
from megatron_klong.train.step import parts_of_this_process, train_step
from megatron_klong.trajectory.tokenizer import load_tokenizer

_DATA = "bank"  # which rows are in the weights is said by the bank's markers, not by a position in a checkpoint


def train_iteration(config: RlConfig, iteration_folder: Path) -> None:
    """All updates of the iteration, and the checkpoint behind them. Raises CheckpointError, TrainingDiverged."""
    initialize(config.trainer.layout, seed=config.seed)
    folder = RunFolder(config.folder)
    rows = ExperienceRows(
        folder.bank,
        iteration_folder,
        row_tokens=config.trainer.row_tokens,
        window_multiple=config.trainer.layout.window_multiple,
    )
    trainee = load_trainee(config, folder, rows)
    with tempered(trainee.training.chunks, config.stage(rows.lesson.iteration.stage).temperature):
        updates = [with_old_log_probs(trainee.training, batches) for batches in shares(rows)]
        with open_log(config, folder, rows) as log:
            for step, batches in enumerate(updates, start=rows.lesson.first_step + 1):
                mismatch = largest_mismatch(batches, trainee.training.device)
                started = time.monotonic()
                result = train_step(trainee.training, batches, objective(config.loss))
                line = step_figures(result, seconds=time.monotonic() - started)
                iteration = rows.lesson.iteration
                log.write(
                    step, {"stage": iteration.stage, "iteration": iteration.number, "mismatch_max": mismatch, **line}
                )
    tokenizer = load_tokenizer(config.tokenizer_path)
    export(trainee.training.chunks, trainee.model_config, folder.weights(rows.lesson.last_step), tokenizer)
    save(config, trainee, folder, rows.lesson.last_step)
    destroy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainee:
    """The model in training, and what its checkpoints say of it."""

    training: Training
    model_config: ModelConfig
    setting: Setting


def load_trainee(config: RlConfig, folder: RunFolder, rows: ExperienceRows) -> Trainee:
    """The model with the weights that the iteration was sampled from. Raises CheckpointError."""
    step = rows.lesson.first_step
    found, _ = folder.latest_checkpoint()
    if (found.progress.step if found else 0) != step:
        raise CheckpointError(f"{folder.checkpoints}: no checkpoint of step {step}, which the lesson begins with")
    # the policy loss is that of the next token; a layer that predicts the one after it stays as it is
    model_config = ModelConfig.from_hugging_face(config.weights).model_copy(update={"mtp_loss_weight": 0.0})
    trainer = config.trainer
    chunks = build_chunks(model_config, trainer.layout, precision=trainer.precision, recompute=trainer.recompute)
    if found is None:
        load_hugging_face(chunks, model_config, Path(config.weights))
    rate = config.stage(rows.lesson.iteration.stage).learning_rate
    optimizer = config.trainer.optimizer.model_copy(
        update={"learning_rate": rate, "min_learning_rate": rate, "schedule": "constant", "warmup_steps": 0}
    )
    training = make_trainable(chunks, OptimizerConfig.model_validate(optimizer.model_dump()), steps=1)
    setting = Setting(
        model=model_config.model_dump(mode="json"),
        layout=config.trainer.layout.model_dump(mode="json"),
        processes=distributed.get_world_size(),
    )
    if found is not None:
        checkpoint.load(found, training, setting)
    return Trainee(training=training, model_config=model_config, setting=setting)


def shares(rows: ExperienceRows) -> list[list[PackedBatch]]:
    """What this process trains on, by update."""
    part, parts = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [parts_of_this_process(rows.batches(update, part=part, parts=parts)) for update in rows.lesson.updates]


def open_log(config: RlConfig, folder: RunFolder, rows: ExperienceRows) -> RunLog:
    """The curves; lines of updates that were rolled back are cut off."""
    return RunLog(
        folder.path,
        first_step=rows.lesson.first_step + 1,
        writes=distributed.get_rank() == 0,
        wandb=config.trainer.wandb,
        settings=config.model_dump(mode="json"),
    )


def save(config: RlConfig, trainee: Trainee, folder: RunFolder, step: int) -> None:
    """Write the checkpoint, and delete what has become old."""
    progress = Progress(step=step, data_position=0, data_fingerprint=_DATA)
    retention = Retention(newest=config.trainer.keep_checkpoints)
    writer = CheckpointWriter(folder.checkpoints, config, retention, background=False)  # nothing is left to train
    writer.save(trainee.training, progress, trainee.setting)
    if distributed.get_rank() == 0:
        folder.delete_weights_without_checkpoint()
