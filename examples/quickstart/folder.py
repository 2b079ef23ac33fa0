"""One run of the quickstart: its settings, its folder, and how long its phases took."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from examples.quickstart.config import QuickstartConfig
from megatron_klong import processes
from megatron_klong.config import write_resolved


@dataclass(kw_only=True)
class Run:
    """One run."""

    config: QuickstartConfig
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, config: QuickstartConfig) -> "Run":
        runs = Path(config.runs_folder)
        folder = runs / datetime.now().strftime("%Y%m%d-%H%M%S")
        folder.mkdir(parents=True)
        latest = runs / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(folder.name)
        write_resolved(config, folder / "config.toml")
        print(f"run folder: {folder}", flush=True)
        return cls(config=config, folder=folder)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        yield
        spent = time.monotonic() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        print(f"{name}: {spent:.0f} s", flush=True)

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def shard(self) -> Path:
        return self.folder / "shards" / "sft"

    @property
    def demonstrations(self) -> Path:
        return self.folder / "demonstrations.jsonl"

    @property
    def demonstration_shard(self) -> Path:
        return self.folder / "shards" / "demonstrations"

    def task_folder(self, task: str) -> Path:
        return self.folder / "tasks" / "papers" / task

    @property
    def environment(self) -> dict[str, str]:
        """Of the programs this run starts: a process a core must not start a thread on every core."""
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), processes.ANCESTOR: str(os.getpid())}

    @property
    def records(self) -> Path:
        return self.folder / "records"

    @property
    def papers(self) -> Path:
        return self.folder / "tasks" / "papers"

    def split(self, name: str) -> Path:
        return self.folder / "tasks" / "splits" / f"{name}.txt"

    @property
    def sft(self) -> Path:
        return self.folder / "sft"

    @property
    def rl(self) -> Path:
        return self.folder / "rl"

    @property
    def output(self) -> Path:
        return self.folder / "output"
