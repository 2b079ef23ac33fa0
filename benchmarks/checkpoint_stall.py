"""How long training stands still for a checkpoint that is written while it goes on, against one that it waits for.

    stall_over_sync_save    seconds that the steps wait (the copy to memory and the plan; the publishing once all is
                            written) / seconds of a save in which training waits for the files
    lost_over_sync_save     all that the save costs, slower steps beside the writer included: seconds from the save's
                            begin to its end, less those that as many steps take alone / the same
    copy_over_sync_save     of the first, the part before training goes on / the same

One process, the same state, the same disk; both kinds take turns; a ratio is the median over the rounds. Steps go on
until the file is written; as each of them takes turns with the thread for the cores, the second ratio depends on how
many are free. Files are flushed to disk in both. The last line is JSON.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from megatron_klong.model.build import build_model  # noqa: E402
from megatron_klong.model.config import LayoutConfig, ModelConfig  # noqa: E402
from megatron_klong.model.parallel import destroy, initialize  # noqa: E402
from megatron_klong.model.presets import tiny  # noqa: E402

# isort: split
import torch  # noqa: E402

from megatron_klong.data.batch import PackedBatch  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402
from megatron_klong.train.checkpoint import Progress, Retention, Setting  # noqa: E402
from megatron_klong.train.checkpoint_writer import CheckpointWriter  # noqa: E402
from megatron_klong.train.config import OptimizerConfig  # noqa: E402
from megatron_klong.train.loss import cross_entropy  # noqa: E402
from megatron_klong.train.optimizer import Training, make_trainable  # noqa: E402
from megatron_klong.train.step import train_step  # noqa: E402

SETTING = Setting(model={}, layout={}, processes=1)


def random_batch(config: ModelConfig, tokens: int) -> PackedBatch:
    """One window that fills its row."""
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    return PackedBatch(
        ids=ids,
        positions=torch.arange(tokens)[None],
        labels=ids.roll(-1),
        groups=torch.zeros_like(ids),
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        padding_mask=torch.zeros_like(ids, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        longest_window_tokens=tokens,
    )


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Saves:
    """Of one run, each under a number of its own; the files of the one before are deleted and out of the disk's way."""

    def __init__(self, folder: Path, training: Training, batch: PackedBatch) -> None:
        self._folder = folder
        self._training = training
        self._batch = batch
        self._number = 0

    def step(self) -> None:
        train_step(self._training, [self._batch], cross_entropy)

    def _writer(self, *, background: bool) -> tuple[CheckpointWriter, Progress]:
        os.sync()
        self._number += 1
        writer = CheckpointWriter(self._folder, LayoutConfig(), Retention(newest=1), background=background)
        return writer, Progress(step=self._number, data_position=0, data_fingerprint="")

    def waited_for(self) -> float:
        writer, progress = self._writer(background=False)
        return seconds(lambda: writer.save(self._training, progress, SETTING))

    def beside_training(self) -> dict[str, float]:
        """Seconds of the copy, of publishing, of everything; steps: how many there were meanwhile."""
        writer, progress = self._writer(background=True)
        place = self._folder / f"step_{progress.step:08d}"
        started = time.perf_counter()
        copy = seconds(lambda: writer.save(self._training, progress, SETTING))
        steps, polls = 0, 0.0
        while not place.exists():
            self.step()
            steps += 1
            polls += seconds(writer.poll)
        return {"copy": copy, "publish": polls, "all": time.perf_counter() - started, "steps": steps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=int, default=4, help="width of the model, in those of the tiny preset")
    parser.add_argument("--tokens", type=int, default=256, help="a step")
    parser.add_argument(
        "--scratch", type=Path, help="a folder on the disk to measure; default: that of temporary files"
    )
    options = parser.parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    load = os.getloadavg()[0]
    initialize(LayoutConfig(), seed=1)
    config = tiny(8192, scale=options.scale)
    training = make_trainable([build_model(config, LayoutConfig())], OptimizerConfig(), steps=100000)
    taken: dict[str, list[float]] = {"waited for": [], "step": [], "copy": [], "publish": [], "all": [], "steps": []}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        saves = Saves(Path(scratch), training, random_batch(config, options.tokens))
        saves.step()
        saves.waited_for()  # the warm-up
        for _ in range(options.rounds):
            taken["step"].append(statistics.median(seconds(saves.step) for _ in range(5)))
            taken["waited for"].append(saves.waited_for())
            for name, value in saves.beside_training().items():
                taken[name].append(value)
            print("; ".join(f"{name} {found[-1]:.3f}" for name, found in taken.items()), flush=True)
        written = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
    destroy()
    rounds = [dict(zip(taken, values, strict=True)) for values in zip(*taken.values(), strict=True)]
    stall = [one["copy"] + one["publish"] for one in rounds]
    lost = [one["all"] - one["steps"] * one["step"] for one in rounds]
    waited = taken["waited for"]
    ratios = {
        "stall_over_sync_save": median_ratio(stall, waited),
        "lost_over_sync_save": median_ratio(lost, waited),
        "copy_over_sync_save": median_ratio(taken["copy"], waited),
    }
    print(
        f"{written / 1e6:.0f} MB; {options.rounds} rounds; {torch.get_num_threads()} threads; load {load:.1f} at the "
        f"start, {os.getloadavg()[0]:.1f} at the end"
    )
    print("\n".join(aligned([["ratio", "median"], *([name, f"{ratio:.3f}"] for name, ratio in ratios.items())])))
    versions = {name: version(name) for name in ("megatron-core", "torch")} | {"python": platform.python_version()}
    rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
    print(json.dumps({"benchmark": "checkpoint_stall", "ratios": rounded, "versions": versions}))
    return 0


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
