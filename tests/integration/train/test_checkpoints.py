"""A run goes on in any layout from the checkpoint of any other; a file that cannot be written ends it, by name."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_klong.model.checkpoint_folder import MANIFEST
from megatron_klong.train.metrics import read_metrics
from tests.integration.model.launch import launch
from tests.integration.train.launcher import finish, start_alone
from tests.unit.train.builders import small_shard

WORKER = Path(__file__).with_name("reshard_worker.py")
# layout, and whose checkpoints it goes on from
ALONE: dict[str, tuple[dict[str, int], list[str]]] = {"alone": ({}, ["expert", "both_tensor"])}
TWO: dict[str, tuple[dict[str, int], list[str]]] = {
    "data": ({}, ["data", "expert"]),
    "tensor": ({"tensor_parallel": 2}, ["tensor", "expert", "pipeline"]),
    "pipeline": ({"pipeline_parallel": 2}, ["pipeline", "tensor"]),
    "interleaved": ({"pipeline_parallel": 2, "virtual_pipeline_parallel": 2}, ["interleaved", "expert"]),
    "expert": ({"expert_parallel": 2}, ["expert", "tensor", "data", "alone", "interleaved"]),
    "both_tensor": ({"tensor_parallel": 2, "expert_tensor_parallel": 2}, ["both_tensor", "pipeline"]),
    "context": ({"context_parallel": 2}, ["expert"]),
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


def tensors(run: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of the run's checkpoint, put together from their parts."""
    dcp_to_torch_save(run / "step_00000003", scratch / "whole.pt")
    held: dict[str, Any] = torch.load(scratch / "whole.pt", weights_only=False)
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.slow
def test_any_layout_goes_on_from_any_other(shard: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    launch(WORKER, str(runs), str(shard), "write", json.dumps(ALONE), processes=1)
    launch(WORKER, str(runs), str(shard), "write,read", json.dumps(TWO), processes=2, seconds=600)
    launch(WORKER, str(runs), str(shard), "read", json.dumps(ALONE), processes=1)
    check_readers({**ALONE, **TWO}, runs, tmp_path)


@pytest.mark.long
def test_tensor_parallel_goes_on_from_expert_parallel_and_back(shard: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    few = {name: (TWO[name][0], ["tensor", "expert"]) for name in ("tensor", "expert")}
    launch(WORKER, str(runs), str(shard), "write,read", json.dumps(few), processes=2)
    check_readers(few, runs, tmp_path)


def check_readers(layouts: Mapping[str, tuple[dict[str, int], list[str]]], runs: Path, scratch: Path) -> None:
    losses = json.loads((runs / "losses.json").read_text())
    written = {writer: tensors(runs / writer, scratch) for writer in layouts}
    for reader, (_, writers) in layouts.items():
        for writer in writers:
            check_same_course(losses[f"{writer} {reader}"], losses[f"{writer} undisturbed"], exact=reader == writer)
            check_same_state(written[writer], tensors(runs / "again" / f"{writer} {reader}", scratch))


def check_same_course(losses: list[float], undisturbed: list[float], *, exact: bool) -> None:
    assert undisturbed[-1] < undisturbed[0] - 0.5
    assert losses == undisturbed if exact else losses == pytest.approx(undisturbed, rel=1e-5)


def check_same_state(written: dict[str, torch.Tensor], again: dict[str, torch.Tensor]) -> None:
    """Bit for bit, weights and what Adam knows of each, which is not nothing."""
    weights = {name.removeprefix("optimizer.state.param.") for name in written if ".state.param." in name}
    assert len(weights) > 20
    for name in weights:
        assert written[name].any()
        assert all(written[f"optimizer.state.{moment}.{name}"].any() for moment in ("exp_avg", "exp_avg_sq"))
    assert again.keys() == written.keys()
    assert not [name for name in written if not torch.equal(written[name], again[name])]


def test_the_configuration_is_in_the_checkpoint_and_what_is_kept_is_the_policys(shard: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ("--steps", "5", "--save_every_steps", "1", "--keep_checkpoints", "1", "--keep_every_steps", "2")
    finish(start_alone(shard, folder, *flags, environment={}))
    kept = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step_00000002", "step_00000004", "step_00000005"]
    assert (kept[0] / "config.toml").read_bytes() == (folder / "config.toml").read_bytes()
    assert tomllib.loads((kept[0] / "config.toml").read_text())["keep_every_steps"] == 2
    assert "config.toml" in json.loads((kept[0] / MANIFEST).read_text())["files"]


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_file_that_cannot_be_written_ends_the_run_with_its_name(background: str, shard: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ("--steps", "100000", "--save_every_steps", "3", "--async_checkpoints", background)
    full = ("prlimit", "--fsize=1000000")  # a disk with room for the curves, not for a checkpoint
    output = finish(start_alone(shard, folder, *flags, environment={}, under=full), status=2)
    (line,) = [line for line in output.splitlines() if line.startswith("sft:")]
    assert f"{folder}/checkpoints/.step_00000003.tmp/__0_0.distcp: [Errno 27] File too large" in line
    assert "Traceback" not in output
    assert not list((folder / "checkpoints").glob("step_*"))
    assert 3 <= len(read_metrics(folder)) < 100000
