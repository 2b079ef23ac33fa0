"""Curves for wandb: offline they are all in the run folder, no network is touched and no key is written."""

import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from megatron_klong.train.metrics import WANDB_ID, read_metrics
from tests.integration.train.launcher import finish, start_alone
from tests.unit.train.builders import small_shard

pytest.importorskip("wandb", reason="wandb is not installed; pip install wandb")
KEY = uuid.uuid4().hex + "f00dfeed"  # as long as wandb's own


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


@pytest.fixture(scope="module")
def cut_off() -> list[str]:
    """A command that runs another without any network but a loopback interface."""
    command = ["bwrap", "--unshare-net", "--dev-bind", "/", "/"]
    if shutil.which("bwrap") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("bubblewrap cannot take the network away here; install it, or allow user namespaces")
    return command


def logged(folder: Path) -> tuple[str, dict[int, dict[str, str]], int]:
    """Of an offline run: its id, its history by step (values as JSON), and the exit status it was given."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    name, history, status = "", {}, -1
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                name = record.run.run_id
            case "history":
                items = record.history.item
                history[record.history.step.num] = {item.nested_key[0]: item.value_json for item in items}
            case "exit":
                status = record.exit.exit_code
    return name, history, status


def test_offline_runs_are_whole_and_a_resumed_one_keeps_its_id(shard: Path, cut_off: list[str], tmp_path: Path) -> None:
    folder, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    environment = {"WANDB_API_KEY": KEY, "HOME": str(home), "WANDB_MODE": "online"}  # the configuration wins
    outputs = []
    for steps in ("2", "3"):
        process = start_alone(
            shard, folder, "--steps", steps, "--wandb", "offline", environment=environment, under=cut_off
        )
        outputs.append(finish(process, 120))
    assert "resumed from" in outputs[1]

    lines = {int(line.pop("step")): line for line in read_metrics(folder)}
    first, second = (logged(path) for path in sorted((folder / "wandb").glob("offline-run-*")))
    assert first[0] == second[0] == (folder / WANDB_ID).read_text().strip()
    assert (first[2], second[2]) == (0, 0)
    assert (list(first[1]), list(second[1])) == ([1, 2], [3])
    for step, values in (first[1] | second[1]).items():
        assert {name: float(values[name]) for name in lines[step]} == pytest.approx(lines[step], rel=1e-6)

    written = [path for top in (folder, home) for path in top.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert not any(KEY in output or "Traceback" in output for output in outputs)


@pytest.mark.parametrize("lacking", ["a login", pytest.param("a network", marks=pytest.mark.long)])
def test_online_without_what_it_needs_is_refused_before_the_first_step(
    lacking: str, shard: Path, cut_off: list[str], tmp_path: Path
) -> None:
    key, under, message = ("", [], "No API key configured") if lacking == "a login" else (KEY, cut_off, "unreachable")
    environment = {"HOME": str(tmp_path), "WANDB_API_KEY": key, "NETRC": str(tmp_path / "netrc")}
    folder = tmp_path / "run"
    process = start_alone(shard, folder, "--steps", "2", "--wandb", "online", environment=environment, under=under)
    output = finish(process, 180, status=2)
    (line,) = [line for line in output.splitlines() if line.startswith("sft: ")]
    assert line.startswith("sft: wandb = 'online': ")
    assert message in line
    assert line.endswith("run `wandb login`, or set wandb to offline")
    assert "Traceback" not in output
    assert read_metrics(folder) == []
