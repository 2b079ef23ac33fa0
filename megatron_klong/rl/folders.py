"""Where the parts of a run of RL are.

RUN/config.toml              the resolved configuration
RUN/bank/                    finished episodes with their scores: megatron_klong.rl.bank
RUN/checkpoints/             what training goes on from: megatron_klong.train.checkpoint
RUN/weights/step_00000003/   the same weights in Hugging Face format, which the engine serves
RUN/iterations/2h-0003/      shard and lesson of an iteration: megatron_klong.rl.experience
RUN/metrics.jsonl            a line an update
RUN/phases.jsonl             a line a phase: what was done, and how long it took
RUN/episodes/ records/       Inspect's logs; records, and what was sampled, as the workers wrote them
RUN/output/                  what engine, trainer and workers printed
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klong.rl.bank_index import Iteration
from megatron_klong.train.checkpoint import Checkpoint, latest


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder."""

    path: Path

    @property
    def bank(self) -> Path:
        return self.path / "bank"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def episodes(self) -> Path:
        return self.path / "episodes"

    @property
    def records(self) -> Path:
        return self.path / "records"

    @property
    def output(self) -> Path:
        return self.path / "output"

    def weights(self, step: int) -> Path:
        return self.path / "weights" / f"step_{step:08d}"

    def iteration(self, iteration: Iteration) -> Path:
        return self.path / "iterations" / f"{iteration.stage}-{iteration.number:04d}"

    def lessons(self) -> list[Path]:
        """The folders of the iterations that were trained or are being trained, in the order of their making."""
        made = (self.path / "iterations").glob("*/lesson.json")
        return [file.parent for file in sorted(made, key=lambda file: file.stat().st_mtime_ns)]

    def latest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole one, and why newer ones were passed over."""
        return latest(self.checkpoints)

    def delete_weights_without_checkpoint(self) -> None:
        """Those whose checkpoint is gone; the newest is always kept."""
        kept = {path.name for path in self.checkpoints.glob("step_*")}
        for path in sorted((self.path / "weights").glob("step_*"))[:-1]:
            if path.name not in kept:
                shutil.rmtree(path)

    @contextmanager
    def phase(self, name: str, iteration: Iteration) -> Iterator[None]:
        """Note how long a phase took, once it is over."""
        started = time.monotonic()
        yield
        line: dict[str, Any] = {"phase": name, **iteration.model_dump(), "seconds": time.monotonic() - started}
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "phases.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def phases(self) -> list[dict[str, Any]]:
        """What `phase` noted, oldest first."""
        path = self.path / "phases.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
