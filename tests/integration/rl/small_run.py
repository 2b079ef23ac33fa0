"""A run of RL at its smallest: a random model that says anything, and a judge that throws a coin.

Everything else is real. Scores by luck give a signal to train on, whatever the policy does.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from examples.longhaul.corpus import training_texts
from examples.longhaul.generate import Split, generate_tasks
from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.model.presets import tiny
from megatron_klong.rl.bank import read_contents
from megatron_klong.rl.bank_index import BankContents
from megatron_klong.rl.folders import RunFolder
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.conftest import REPOSITORY

COIN = """#!/bin/sh
read -r word < /proc/sys/kernel/random/uuid
case $word in [0-7]*) exit 0 ;; esac
exit 1
"""
CONFIG = """
weights = "{folder}/weights"
tasks = "{folder}/tasks/papers"
run_folder = "{folder}/run"
max_episodes = 3

[[stages]]
name = "short"
timeout = "90s"
hard_timeout = "120s"
iterations = 1
tasks_per_iteration = 2
rollouts_per_task = 4
updates_per_iteration = 2
learning_rate = 1e-3

[[stages]]
name = "long"
timeout = "100s"
hard_timeout = "150s"
iterations = 1
tasks_per_iteration = 2
rollouts_per_task = 4
learning_rate = 1e-3
temperature = 1.3

[episode]
command_timeout = "10s"
tools = ["bash", "submit"]
reading = "off"
reply_tokens = 40
stall_limit = 3

[episode.context]
max_tokens = 768
reserve_tokens = 64
keep_tokens = 128
prefix_cap_tokens = 640

[engine]
max_sequence_length = 768
kv_cache_gib = 0.1

[trainer]
processes = 2
row_tokens = 768
"""


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """A folder in which a run can be started, killed and continued."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "rl.toml"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path / "run")

    @property
    def contents(self) -> BankContents:
        return read_contents(self.folder.bank) if (self.folder.bank / "index.jsonl").exists() else BankContents()

    @property
    def metrics(self) -> list[dict[str, float]]:
        file = self.folder.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def start(self, *flags: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_klong.rl", str(self.config), *flags],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def make_run(path: Path) -> SmallRun:
    """Tasks, tokenizer, random weights and a configuration."""
    ids = generate_tasks(path / "tasks", splits=[Split(name="train", num_tasks=2, turns=(12,))], seed=1)["train"]
    papers = path / "tasks" / "papers"
    for task in ids:
        (papers / task / "judge" / "check.sh").write_text(COIN)
    settings = EpisodeConfig.model_validate({"tools": ("bash", "submit")})
    texts = training_texts([papers / task for task in ids], settings)
    train_tokenizer(texts, vocabulary_size=1200, folder=path / "weights")
    write_random_weights(path / "weights")
    (path / "rl.toml").write_text(CONFIG.format(folder=path))
    return SmallRun(path=path)


def write_random_weights(folder: Path) -> None:
    """Of the tiny model, as transformers saves them, far from uniform."""
    import torch
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    shape = tiny(load_tokenizer(folder).vocabulary_size).to_hugging_face()
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**{name: value for name, value in shape.items() if name != "model_type"}))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.1 + ("norm" in name))
    model.save_pretrained(folder)


def processes_of(folder: Path) -> list[str]:
    """Living processes that name the folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(folder) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found
