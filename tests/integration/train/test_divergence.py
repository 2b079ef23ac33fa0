"""A run that diverges ends at once, on every process, with one line and a status of its own, and writes no more."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_klong.train.metrics import read_metrics
from megatron_klong.train.sft import DIVERGED
from tests.integration.train.launcher import finish, start, start_each
from tests.integration.train.weights import write_weights
from tests.unit.train.builders import small_shard


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


def reasons(outputs: Sequence[str]) -> list[str]:
    assert not any("Traceback" in output for output in outputs), outputs
    return [line for output in outputs for line in output.splitlines() if line.startswith("sft:")]


def test_an_absurd_learning_rate_ends_every_process_with_one_line(shard: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ("--steps", "9", "--save_every_steps", "1", "--optimizer.learning_rate", "1e30")
    outputs = [finish(process, status=DIVERGED) for process in start_each(shard, folder, *flags)]
    whole = read_metrics(folder)  # steps before it are kept
    (line,) = reasons(outputs)
    assert line in outputs[0]  # rank 0 says it
    assert line.startswith(f"sft: step {len(whole) + 1} diverged: loss nan, gradient norm nan, ")
    assert all(math.isfinite(step["loss"]) for step in whole)
    checkpoints = [path.name for path in (folder / "checkpoints").iterdir()]
    assert max(checkpoints) == f"step_{len(whole):08d}"
    assert not list(folder.glob("*hugging_face*"))


def test_a_weight_that_is_no_number_ends_a_pipeline_too(shard: Path, tmp_path: Path) -> None:
    weights, folder = tmp_path / "weights", tmp_path / "run"
    write_weights(weights)
    tensors = load_file(weights / "model.safetensors")
    tensors["model.layers.3.input_layernorm.weight"][5] = torch.nan  # on the second stage
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    flags = ("--steps", "2", "--hugging_face_init", str(weights), "--layout.pipeline_parallel", "2")
    process = start(shard, folder, *flags)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1  # torchrun's own
    assert "exitcode  : 3" in output
    (line,) = [line for line in output.splitlines() if line.startswith("sft:")]
    assert line.startswith("sft: step 1 diverged: loss nan")
    assert "TrainingDiverged" not in output
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "metrics.jsonl"]
    assert read_metrics(folder) == []


def test_weights_that_do_not_fit_are_named_without_a_traceback(shard: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    write_weights(weights)
    shutil.move(weights / "model.safetensors", tmp_path)
    (process,) = start_each(shard, tmp_path / "run", "--steps", "2", "--hugging_face_init", str(weights), processes=1)
    (line,) = reasons([finish(process, status=2)])
    assert f"{weights}: no *.safetensors there" in line
