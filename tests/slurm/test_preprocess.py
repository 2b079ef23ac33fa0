"""`sbatch slurm/preprocess.sh` under a real Slurm: an array of parts, then the job that makes the shard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.slurm.local_slurm import Slurm
from tests.unit.data.builders import PROGRAM, arguments, content, row, write_inputs
from tests.unit.trajectory.test_tokenizer import write_tokenizer

pytestmark = pytest.mark.slurm


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments for an input of several units."""
    source = write_inputs(tmp_path / "in", files=4, rows_of_large=4)
    for number in range(5):  # a unit takes 8 MiB of files
        (source / f"long{number}.json").write_text(_padded(number, bytes_=5 << 20))
    tokenizer = write_tokenizer(tmp_path / "tok", control=True)
    return arguments(source, tmp_path / "out" / "s", tokenizer)


def _padded(seed: int, *, bytes_: int) -> str:
    """A row in a file that white space makes large."""
    text = json.dumps(row(seed))
    return text + " " * (bytes_ - len(text))


def submit(slurm: Slurm, folder: Path, command: list[str], *options: str) -> str:
    return slurm.run(
        *("sbatch", "--parsable", f"--output={folder}/%j.txt", f"--export=ALL,KLONG_PYTHON={sys.executable}"),
        *("--cpus-per-task=1", *options, "slurm/preprocess.sh", *command),
        cwd=REPOSITORY,
    ).strip()


def logs(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))


def test_an_array_and_the_job_after_it_make_the_shard_of_a_local_run(
    slurm: Slurm, tmp_path: Path, command: list[str]
) -> None:
    parts = submit(slurm, tmp_path, command, "--array=0-2")
    after = submit(slurm, tmp_path, command, f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes")
    job = slurm.wait(after, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_seconds=240)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), logs(tmp_path)
    assert all(f"part {number}/3 on" in logs(tmp_path) for number in range(3))
    whole = [str(tmp_path / "local" / "s") if one.endswith("out/s") else one for one in command]
    subprocess.run([sys.executable, str(PROGRAM), *whole], cwd=REPOSITORY, check=True, timeout=120)
    assert content(tmp_path / "out" / "s") == content(tmp_path / "local" / "s")
    assert not (tmp_path / "out" / "s.parts").exists()


def test_an_input_that_is_not_there_fails_its_job_and_the_one_after_it_never_starts(
    slurm: Slurm, tmp_path: Path, command: list[str]
) -> None:
    absent = [str(tmp_path / "absent") if one == str(tmp_path / "in") else one for one in command]
    parts = submit(slurm, tmp_path, absent, "--array=0-1")
    after = submit(slurm, tmp_path, absent, f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes")
    job = slurm.wait(after, "COMPLETED", "FAILED", "CANCELLED", timeout_seconds=120)
    assert job["JobState"] == "CANCELLED"
    assert "absent: no such file or folder of transcripts" in logs(tmp_path)
