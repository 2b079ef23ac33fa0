"""SFT starts from an imported checkpoint, and its own checkpoints can be exported, both to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klong.model.checkpoint_folder import find_checkpoint
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.conversion.export_checkpoint import export_checkpoint
from megatron_klong.model.conversion.import_checkpoint import import_checkpoint
from megatron_klong.model.presets import tiny
from tests.conftest import REPOSITORY
from tests.integration.model.weights import assert_same_weights, write_weights
from tests.integration.train.launcher import finish, start
from tests.unit.train.builders import ROW_TOKENS, mixture_of, small_shard


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


@pytest.fixture(scope="module")
def checkpoint(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    config = tiny(mixture_of(shard).vocabulary_size).model_copy(update={"use_qk_norm": True})
    weights = write_weights(folder / "weights", config)
    layout = LayoutConfig(tensor_parallel=2, pipeline_parallel=2)
    return import_checkpoint(weights, folder / "checkpoint", layout, processes=1).folder


@pytest.mark.long
def test_a_run_starts_from_it_on_another_layout_and_its_checkpoints_are_exported(
    shard: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["--steps", "1", "--megatron_init", str(checkpoint), "--export_initial", "true"]
    flags += ["--precision", "bf16", "--layout.expert_parallel", "2"]
    finish(start(shard, tmp_path / "run", *flags))
    assert_same_weights(tmp_path / "run" / "initial_hugging_face", checkpoint.with_name("weights"))

    newest = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest.folder.name == "step_00000001"
    assert newest.progress is not None
    assert newest.model == find_checkpoint(checkpoint).model
    exported = export_checkpoint(tmp_path / "run" / "checkpoints", tmp_path / "exported", processes=1)
    assert_same_weights(exported, tmp_path / "run" / "hugging_face")
    with pytest.raises(AssertionError):
        assert_same_weights(exported, checkpoint.with_name("weights"))  # it has learnt


def dry_run(shard: Path, folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    settings = ["--shards", json.dumps([str(shard)]), "--run_folder", str(folder), "--steps", "1"]
    command = [sys.executable, "-m", "megatron_klong.train.sft", *settings, "--row_tokens", str(ROW_TOKENS)]
    return subprocess.run(
        [*command, *flags, "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_dry_run_shows_where_weights_come_from_and_what_cannot_be_is_named(
    shard: Path, checkpoint: Path, tmp_path: Path
) -> None:
    made = dry_run(shard, tmp_path / "run", "--megatron_init", str(checkpoint))
    assert made.returncode == 0, made.stderr
    assert f"# start: {checkpoint}" in made.stdout
    both = dry_run(shard, tmp_path / "run", "--megatron_init", str(checkpoint), "--hugging_face_init", "weights")
    assert both.returncode == 2
    assert "hugging_face_init and megatron_init are both given" in both.stderr
    absent = dry_run(shard, tmp_path / "run", "--megatron_init", str(tmp_path / "no"))
    assert absent.returncode == 2
    assert f"{tmp_path / 'no'}: no such folder; give a checkpoint" in absent.stderr
