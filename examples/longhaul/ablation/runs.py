"""Training runs of the comparison: the SFT program as a user starts it, a process a run, some of them at once.

Every run starts from random weights and has the same budget: as many steps, rows a step and tokens a row, context
included, at the same learning rates. Only the windows in the rows differ. What came of the budget is read from the
runs' own curves.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_klong import processes
from megatron_klong.config import write_resolved
from megatron_klong.train.config import OptimizerConfig, SftConfig
from megatron_klong.train.metrics import read_metrics

SHAPE = Path(__file__).parent / "model.json"
ROW_TOKENS = 1320  # five windows of the longest
ROWS_A_STEP = 1
LEARNING_RATE = 5e-3
STEPS = 1500
_STOP_SECONDS = 10.0


class RunFailed(RuntimeError):
    """The SFT program did not end with 0; the message names its output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a run was trained on, from its curves. tokens: without padding, context included."""

    steps: int
    tokens: int
    trained_tokens: int


def sft_config(shard: Path, run_folder: Path, *, steps: int, seed: int, learning_rate: float) -> SftConfig:
    """The settings of one run."""
    return SftConfig(
        shards=(str(shard),),
        run_folder=str(run_folder),
        shape=str(SHAPE),
        steps=steps,
        global_batch_rows=ROWS_A_STEP,
        row_tokens=ROW_TOKENS,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, min_learning_rate=learning_rate / 10, warmup_steps=min(10, steps // 2)
        ),
        seed=seed,
        save_every_steps=steps,
    )


def train_all(configs: Sequence[SftConfig], *, at_once: int) -> None:
    """Train every run to its end. Raises RunFailed; runs that have not begun are then left out."""
    with ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(_train, config) for config in configs]
        try:
            for run in runs:
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)


def budget(run_folder: Path) -> Budget:
    """Of a finished run."""
    lines = read_metrics(run_folder)
    return Budget(
        steps=len(lines),
        tokens=sum(int(line["tokens"]) for line in lines),
        trained_tokens=sum(int(line["trained_tokens"]) for line in lines),
    )


def _train(config: SftConfig) -> None:
    folder = Path(config.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings, output = folder / "sft.toml", folder / "output.txt"
    write_resolved(config, settings)
    with output.open("wb") as printed:
        status = processes.run(
            [sys.executable, "-m", "megatron_klong.train.sft", str(settings)],
            output=printed,
            environment={"OMP_NUM_THREADS": "1", processes.ANCESTOR: str(os.getpid())},
            stop_seconds=_STOP_SECONDS,
        )
    if status:
        lines = output.read_text(errors="replace").strip().splitlines()
        raise RunFailed(f"{folder.name}: sft exited with {status}; see {output}: {lines[-1:]}")
