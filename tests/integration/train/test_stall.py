"""A process that hangs, or that waits for one that does, says where and ends; one that is only slow goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_klong.train.failure import FIRST_END
from megatron_klong.train.stall import STALLED
from tests.conftest import REPOSITORY
from tests.integration.train.launcher import finish, start_each
from tests.unit.train.builders import small_shard

FLAGS = ("--steps", "100", "--stall_timeout", "60s")  # the start of a process on a busy machine must fit in

WATCHED = """
import sys, time
from megatron_klong.duration import Duration
from megatron_klong.train.stall import Watchdog

with Watchdog(Duration(sys.argv[1])) as watchdog:
    for seconds in map(float, sys.argv[2:]):
        print("waits", flush=True)
        time.sleep(seconds)
        watchdog.done(f"{seconds} seconds")
"""


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


def watched(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_what_is_done_in_time_counts_from_anew() -> None:
    assert finish(watched("4s", "2", "2", "2", "2"), timeout_seconds=60) == "waits\n" * 4


def test_what_takes_longer_ends_the_process_and_names_the_place() -> None:
    output = finish(watched("2s", "0.1", "60"), timeout_seconds=60, status=STALLED)
    assert "rank 0 on" in output
    assert "stalled: nothing finished for 2s after 0.1 seconds; if that is no hang, raise stall_timeout" in output
    assert 'File "<string>", line 9 in <module>' in output  # the sleep
    assert "Traceback" not in output


def test_time_in_which_the_process_is_suspended_does_not_count() -> None:
    process = watched("5s", "3")
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    assert finish(process, timeout_seconds=60) == ""


@pytest.mark.long
def test_a_process_that_sleeps_is_the_one_whose_stack_differs(shard: Path, tmp_path: Path) -> None:
    first_end = tmp_path / "first-end.txt"
    environment = {FIRST_END: str(first_end)}
    processes = start_each(shard, tmp_path / "run", *FLAGS, fault=("1", "3", "hang"), environment=environment)
    outputs = [finish(process, timeout_seconds=300, status=STALLED) for process in processes]
    assert ["in go_wrong" in output for output in outputs] == [False, True]
    assert all("stalled: nothing finished for 1m after step 2" in output for output in outputs)
    assert first_end.read_text().splitlines()[0].endswith(f": exit status {STALLED}")
