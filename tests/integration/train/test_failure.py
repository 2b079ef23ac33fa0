"""Of several processes that fail, the first one is told, not those that follow from it."""

import time
from pathlib import Path

import pytest

from megatron_klong.train.failure import FIRST_END
from tests.integration.train.faulty import MESSAGE
from tests.integration.train.launcher import finish, start, start_each
from tests.unit.train.builders import small_shard

FLAGS = ("--steps", "100")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


def test_the_first_failure_is_on_record_and_lost_connections_come_after_it(shard: Path, tmp_path: Path) -> None:
    file = tmp_path / "first-end.txt"
    environment = {FIRST_END: str(file)}
    processes = start_each(shard, tmp_path / "run", *FLAGS, fault=("1", "3", "raise"), environment=environment)
    outputs = [finish(process, 300, status=1) for process in processes]
    told = file.read_text()
    assert told.startswith("rank 1 on ")
    assert told.splitlines()[0].endswith(": exit status 1")
    assert f"ValueError: {MESSAGE}" in told
    assert "in go_wrong" in told
    assert f"ValueError: {MESSAGE}" in outputs[1]
    assert "rank 0 on" in outputs[0]
    assert f"lost its connections, after this: {told.splitlines()[0]}\n" in outputs[0]
    assert "Traceback" not in outputs[0]


def test_of_a_crash_a_lost_connection_gives_the_launcher_time_to_tell(shard: Path, tmp_path: Path) -> None:
    file = tmp_path / "first-end.txt"
    waiting, crashing = start_each(
        shard, tmp_path / "run", *FLAGS, fault=("1", "3", "crash"), environment={FIRST_END: str(file)}
    )
    output = finish(crashing, status=-11)
    assert "Segmentation fault" in output
    assert "in go_wrong" in output
    time.sleep(1)
    assert not file.exists()
    file.write_text("rank 1 on here: exit status 139\n")  # as slurm/task.sh does
    output = finish(waiting, status=1)
    assert "lost its connections, after this: rank 1 on here: exit status 139" in output
    assert file.read_text() == "rank 1 on here: exit status 139\n"


def test_torchrun_reports_the_traceback_of_the_rank_that_failed(shard: Path, tmp_path: Path) -> None:
    process = start(shard, tmp_path / "run", *FLAGS, fault=("1", "3", "raise"))
    output = finish(process, 300, status=1)
    summary = output[output.index("Root Cause (first observed failure)") :]
    assert "rank      : 1 (local_rank: 1)" in summary
    assert f"ValueError: {MESSAGE}" in summary
    assert "in go_wrong" in summary
