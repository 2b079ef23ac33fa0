"""`sbatch slurm/rl_stage.sh` under a real Slurm: a stage of the smallest run of RL."""

import asyncio
import sys
import time
from pathlib import Path

import pytest

from megatron_klong.sandbox.bubblewrap import SandboxUnavailable, check_available
from tests.conftest import REPOSITORY
from tests.integration.rl.small_run import SmallRun, make_run, processes_of
from tests.slurm.local_slurm import Slurm

pytestmark = pytest.mark.slurm


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    return make_run(tmp_path)


def submit(slurm: Slurm, run: SmallRun, *arguments: str) -> str:
    job = slurm.run(
        *("sbatch", "--parsable", f"--output={run.path}/log.txt", f"--export=ALL,KLONG_PYTHON={sys.executable}"),
        *("slurm/rl_stage.sh", str(run.config), *arguments),
        cwd=REPOSITORY,
    )
    return job.strip()


def printed(run: SmallRun) -> str:
    """The job's log, and what engine, workers and trainer had to say."""
    files = [run.path / "log.txt", *sorted(run.folder.output.glob("*.txt"))]
    return "".join(f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files if file.exists())


@pytest.mark.long
def test_cancelled_in_rollouts_it_leaves_no_process_and_submitted_again_it_completes(
    slurm: Slurm, run: SmallRun
) -> None:
    job = submit(slurm, run, "--stage", "1")
    deadline = time.monotonic() + 240
    while not run.contents.episodes:
        assert time.monotonic() < deadline, printed(run)
        assert "exit status" not in printed(run), printed(run)
        time.sleep(0.1)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED", timeout_seconds=60)
    deadline = time.monotonic() + 30
    while (left := processes_of(run.path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    (banked,) = run.contents.episodes.values()

    ended = slurm.wait(submit(slurm, run, "--stage", "1"), "COMPLETED", "FAILED", "TIMEOUT", timeout_seconds=400)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), printed(run)
    assert [line["step"] for line in run.metrics] == [1, 2]
    (episodes,) = run.contents.episodes.values()
    assert episodes[: len(banked)] == banked
    assert len(episodes) == 8


def test_a_stage_that_there_is_not_fails_the_job_with_its_reason(slurm: Slurm, run: SmallRun) -> None:
    job = slurm.wait(submit(slurm, run, "--stage", "7"), "COMPLETED", "FAILED", timeout_seconds=120)
    assert job["JobState"] == "FAILED"
    assert "there are short, long, or 1 to 2" in (run.path / "log.txt").read_text()
