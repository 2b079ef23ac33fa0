"""Asked to stop, all processes end behind one step with its checkpoint; started again, nothing shows in the losses."""

import signal
import time
from pathlib import Path

import pytest

from megatron_klong.train.metrics import read_metrics
from megatron_klong.train.stopping import STOP_FILE, STOPPED
from tests.integration.train.launcher import finish, start, start_each
from tests.unit.train.builders import small_shard

STEPS = 12
FLAGS = ("--steps", str(STEPS), "--save_every_steps", "50", "--export_hugging_face", "false")
SLOW = ("every", "1", "slow")  # so that a signal finds it between its first and its last step


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


@pytest.fixture(scope="module")
def undisturbed(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(shard, folder, *FLAGS), 300)
    return losses(folder)


def losses(folder: Path) -> list[float]:
    """Of steps 1, 2, 3, ...; fails where one is missing or stands there twice."""
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(read_metrics(folder)) < count:
        assert time.monotonic() < deadline, f"no step {count} in {folder}"
        time.sleep(0.02)


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in sorted((folder / "checkpoints").iterdir())]


@pytest.mark.long
def test_a_signal_to_one_process_stops_all_behind_the_same_step(
    shard: Path, undisturbed: list[float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    processes = start_each(shard, folder, *FLAGS, fault=SLOW)
    wait_for_steps(folder, 2)
    processes[1].send_signal(signal.SIGUSR1)
    processes[1].send_signal(signal.SIGTERM)  # again, and differently: nothing changes
    outputs = [finish(process, 300, status=STOPPED) for process in processes]
    done = len(losses(folder))
    assert 2 <= done < STEPS
    assert checkpoints(folder) == [f"step_{done:08d}"]
    assert f"sft: stopped on request behind step {done}" in outputs[0]
    assert not any("Traceback" in output for output in outputs)
    finish(start(shard, folder, *FLAGS), 300)
    assert losses(folder) == undisturbed


@pytest.mark.long
def test_torchrun_passes_a_stop_on(shard: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(shard, folder, *FLAGS, fault=SLOW)
    wait_for_steps(folder, 2)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    done = len(losses(folder))
    assert checkpoints(folder) == [f"step_{done:08d}"], output
    assert 2 <= done < STEPS


@pytest.mark.long
def test_a_request_during_the_start_stops_behind_the_first_step_and_one_in_the_last_step_leaves_the_export(
    shard: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stop_file = tmp_path / "stop"
    stop_file.touch()
    flags = ("--steps", "2", "--save_every_steps", "50")
    environment = {STOP_FILE: str(stop_file)}
    for step in (1, 2):
        (process,) = start_each(shard, folder, *flags, processes=1, environment=environment)
        finish(process, 300, status=STOPPED)
        assert checkpoints(folder)[-1] == f"step_{step:08d}"
        assert len(losses(folder)) == step
    assert not (folder / "hugging_face").exists()
    (process,) = start_each(shard, folder, *flags, processes=1, environment=environment)
    finish(process)
    assert (folder / "hugging_face").exists()
