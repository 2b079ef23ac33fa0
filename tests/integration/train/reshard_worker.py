"""One process of runs in one layout after another: `reshard_worker.py FOLDER SHARD WORK LAYOUTS-AS-JSON`.

LAYOUTS: {"<name>": [its fields, [the names of those it reads]]}. WORK is `write`, `read` or both with a comma. write:
each layout trains, saves into FOLDER/<its name> and trains on. read: each layout takes up the checkpoints of those it
reads, saves what it has loaded into FOLDER/again/<writer> <reader>, and trains on. FOLDER/losses.json gets the losses
of the steps behind a checkpoint, {"<writer> <reader>": [...]}, with the reader `undisturbed` for the writer's own.
"""

import json
import sys
from pathlib import Path

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.parallel import destroy, initialize, initialize_groups
from megatron_klong.model.presets import tiny

# isort: split
from megatron.core import parallel_state
from torch import distributed

from megatron_klong.train.checkpoint import Progress, Retention, Setting, latest, load
from megatron_klong.train.checkpoint_writer import CheckpointWriter
from megatron_klong.train.config import OptimizerConfig
from megatron_klong.train.loss import cross_entropy
from megatron_klong.train.optimizer import Training, make_trainable
from megatron_klong.train.rows import Shards, TrainingRows
from megatron_klong.train.step import parts_of_this_process, train_step
from tests.unit.train.builders import ROW_TOKENS

BEFORE, BEHIND = range(3), range(3, 7)  # steps, seen from the checkpoint
ROWS = 4


class Runs:
    """Runs in one layout, all of the same rows."""

    def __init__(self, folder: Path, shard: Path, layout: LayoutConfig) -> None:
        parallel_state.destroy_model_parallel()
        initialize_groups(layout, seed=1)
        self._folder = folder
        # every layout's rows are padded as context parallelism needs it: they are the same
        self._rows = TrainingRows(Shards([shard]), row_tokens=ROW_TOKENS, seed=0, window_multiple=4)
        self._model = tiny(self._rows.shards.vocabulary_size)
        self._layout = layout

    @property
    def _setting(self) -> Setting:
        model, layout = (made.model_dump(mode="json") for made in (self._model, self._layout))
        return Setting(model=model, layout=layout, processes=distributed.get_world_size())

    def training(self) -> Training:
        model = build_model(self._model, self._layout)
        return make_trainable(model, OptimizerConfig(learning_rate=1e-2, warmup_steps=2), steps=10)

    def train(self, training: Training, steps: range, writer: CheckpointWriter | None = None) -> list[float]:
        part, parts = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        losses = []
        for step in steps:
            batches = parts_of_this_process(self._rows.batches(step * ROWS, ROWS, part=part, parts=parts))
            losses.append(train_step(training, batches, cross_entropy).loss)
            if writer:
                writer.poll()
        return losses

    def writer(self, name: str, *, background: bool) -> CheckpointWriter:
        return CheckpointWriter(self._folder / name, self._layout, Retention(newest=1), background=background)

    def save(self, writer: CheckpointWriter, training: Training) -> None:
        writer.save(training, Progress(step=3, data_position=12, data_fingerprint=""), self._setting)

    def load(self, name: str, training: Training) -> None:
        found, _ = latest(self._folder / name)
        assert found is not None
        load(found, training, self._setting)


def write(runs: Runs, name: str, losses: dict[str, list[float]]) -> None:
    training = runs.training()
    runs.train(training, BEFORE)
    with runs.writer(name, background=True) as writer:
        runs.save(writer, training)
        losses[f"{name} undisturbed"] = runs.train(training, BEHIND, writer)


def read(runs: Runs, name: str, writers: list[str], losses: dict[str, list[float]]) -> None:
    training = runs.training()
    for writer in writers:
        runs.load(writer, training)
        runs.save(runs.writer(f"again/{writer} {name}", background=False), training)
        losses[f"{writer} {name}"] = runs.train(training, BEHIND)


def main(folder: Path, shard: Path, work: str, layouts: dict[str, tuple[dict[str, int], list[str]]]) -> None:
    file = folder / "losses.json"
    losses: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    initialize(LayoutConfig(), seed=1)  # once: processes that have met do not find each other a second time
    for part in work.split(","):
        for name, (layout, writers) in layouts.items():
            runs = Runs(folder, shard, LayoutConfig(**layout))
            if part == "write":
                write(runs, name, losses)
            else:
                read(runs, name, writers, losses)
    if distributed.get_rank() == 0:
        file.write_text(json.dumps(losses))
    destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
