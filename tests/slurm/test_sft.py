"""`sbatch slurm/sft.sh` under a real Slurm, on two tasks, with the tiny model.

Faults come from the interpreter that the job is given (tests/integration/train/faulty.py), all else is what users run.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from megatron_klong.train.metrics import read_metrics
from tests.conftest import REPOSITORY
from tests.integration.train.faulty import MESSAGE
from tests.integration.train.launcher import FAULTY
from tests.slurm.local_slurm import Slurm
from tests.unit.data.test_shard import write
from tests.unit.trajectory.builders import assistant, bash, policy, tool, transcript, user

pytestmark = pytest.mark.slurm

CONFIG = """
shards = ["{shard}"]
run_folder = "{folder}/run"
steps = {steps}
row_tokens = 512
global_batch_rows = 2
save_every_steps = 2
stall_timeout = "{stall_timeout}"
"""
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
STAND_INS = {
    "apptainer": ("apptainer", '#!/bin/bash\necho "${{@:1:7}}" >>"{taken}"\nexec "${{@:8}}"\n'),
    "pyxis": (
        "srun",
        '#!/bin/bash\nfor one; do\n    case $one in\n        --container-*) echo "$one" >>"{taken}" ;;\n'
        '        *) others+=("$one") ;;\n    esac\ndone\nexec {real} "${{others[@]}}"\n',
    ),
}
SLOW = ("every", "1", "slow")  # so that a signal finds it between its first and its last step


@pytest.fixture
def config(tmp_path: Path) -> Path:
    turns = [m for n in range(12) for m in (assistant(calls=[bash(f"step {n}")]), tool(f"result {n}"))]
    write(tmp_path / "shard", [transcript(user("task"), *turns)] * 8, policy(400, reserve=40, keep=100))
    return tmp_path


def submit(
    slurm: Slurm,
    folder: Path,
    *,
    steps: int,
    options: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    stall_timeout: str = "30m",
) -> str:
    file = folder / "sft.toml"
    file.write_text(CONFIG.format(shard=folder / "shard", folder=folder, steps=steps, stall_timeout=stall_timeout))
    settings = {"KLONG_PYTHON": sys.executable, "KLONG_LOG_FOLDER": str(folder), **(environment or {})}
    exported = ",".join(["ALL", *(f"{name}={value}" for name, value in settings.items())])
    job = slurm.run(
        *("sbatch", "--parsable", f"--output={folder}/log.txt", f"--export={exported}", *options),
        *("slurm/sft.sh", str(file), *flags),
        cwd=REPOSITORY,
    )
    return job.strip()


def python_with(fault: tuple[str, ...], folder: Path) -> dict[str, str]:
    """The interpreter of a job, as a program that goes wrong in the given way."""
    program = folder / "python"
    program.write_text(f'#!/bin/bash\nexec {sys.executable} {FAULTY} {" ".join(fault)} "$@"\n')
    program.chmod(0o755)
    return {"KLONG_PYTHON": str(program)}


def attempts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.attempt-*"))


def losses(folder: Path) -> list[float]:
    """Of steps 1, 2, 3, ...; fails where one is missing or stands there twice."""
    lines = read_metrics(folder / "run")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(read_metrics(folder / "run")) < count:
        log = folder / "log.txt"
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"no {log}"
        time.sleep(0.05)


def stopped_and_resumed(folder: Path) -> list[tuple[int, int]]:
    """Of each attempt and the one behind it: the step the one stopped at, the step the other went on from."""
    texts = [(attempt / "rank-0.txt").read_text() for attempt in attempts(folder)]
    stops = [int(re.findall(r"stopped on request behind step (\d+),", text)[0]) for text in texts[:-1]]
    starts = [int(re.findall(r"resumed from \S+/step_(\d+)", text)[0]) for text in texts[1:]]
    return list(zip(stops, starts, strict=True))


@pytest.mark.long
def test_it_ends_completed_and_leaves_metrics_and_weights(slurm: Slurm, config: Path) -> None:
    job = slurm.wait(submit(slurm, config, steps=3), "COMPLETED", "FAILED", "TIMEOUT", timeout_seconds=180)
    log = (config / "log.txt").read_text()
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "2 processes" in log
    lines = [json.loads(line) for line in (config / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert (config / "run" / "hugging_face" / "config.json").is_file()
    (attempt,) = attempts(config)
    assert sorted(file.name for file in attempt.iterdir()) == ["rank-0.txt", "rank-1.txt"]


def test_a_configuration_that_cannot_be_used_fails_the_job_with_its_reason(slurm: Slurm, config: Path) -> None:
    (config / "shard.bin").unlink()
    job = slurm.wait(submit(slurm, config, steps=3), "COMPLETED", "FAILED", timeout_seconds=120)
    assert job["JobState"] == "FAILED"
    assert "shard.bin" in (config / "log.txt").read_text()


def _processes_of(folder: Path) -> list[str]:
    """Living processes that name the folder in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command and int(process.name) != os.getpid():
            found.append(command.decode(errors="replace"))
    return found


@pytest.mark.long
def test_near_the_time_limit_it_writes_a_checkpoint_queues_again_and_goes_on(
    slurm: Slurm, config: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(config, undisturbed, dirs_exist_ok=True)
    other = submit(slurm, undisturbed, steps=12, options=TWO_NODES)
    job = submit(slurm, config, steps=12, options=TWO_NODES, environment=python_with(SLOW, config))
    wait_for_steps(config, 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 does, at once
    ended = slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", timeout_seconds=400)
    log = (config / "log.txt").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert "the time limit is near, asked all processes to stop" in log
    assert "the job goes back to the queue" in log
    assert "Traceback" not in log
    ((stopped, resumed),) = stopped_and_resumed(config)
    assert 3 <= stopped == resumed < 12
    slurm.wait(other, "COMPLETED", timeout_seconds=200)
    assert losses(config) == losses(undisturbed)
    assert len(losses(config)) == 12


@pytest.mark.slow
def test_at_a_real_time_limit_it_does_the_same(slurm: Slurm, config: Path) -> None:
    options = (*TWO_NODES, "--time=1", "--signal=B:USR1@35")  # Slurm looks about twice a minute
    job = submit(slurm, config, steps=90, options=options, environment=python_with(SLOW, config))
    ended = slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", timeout_seconds=900)
    log = (config / "log.txt").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert all(stopped == resumed for stopped, resumed in stopped_and_resumed(config))
    assert len(attempts(config)) == int(ended["Restarts"]) + 1 > 1
    assert len(losses(config)) == 90


@pytest.mark.long
def test_stopped_by_hand_it_ends_with_75_and_goes_on_with_fewer_processes(slurm: Slurm, config: Path) -> None:
    job = submit(slurm, config, steps=12, options=TWO_NODES, environment=python_with(SLOW, config))
    wait_for_steps(config, 3)
    slurm.run("scancel", "--signal=USR1", job)  # to the processes of the step
    ended = slurm.wait(job, "COMPLETED", "FAILED", timeout_seconds=200)
    log = (config / "log.txt").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), log
    assert "checkpoint written; submit it again to go on" in log
    stopped = len(losses(config))
    ended = slurm.wait(
        submit(slurm, config, steps=12, options=("--ntasks-per-node=1",)), "COMPLETED", "FAILED", timeout_seconds=200
    )
    log = (config / "log.txt").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert f"resumed from {config}/run/checkpoints/step_{stopped:08d}" in log
    assert len(losses(config)) == 12


@pytest.mark.long
def test_a_failing_rank_ends_the_job_and_its_traceback_is_what_the_log_shows(slurm: Slurm, config: Path) -> None:
    environment = python_with(("1", "3", "raise"), config)
    job = submit(slurm, config, steps=100_000, options=TWO_NODES, environment=environment)
    ended = slurm.wait(job, "COMPLETED", "FAILED", timeout_seconds=300)
    log = (config / "log.txt").read_text()
    (attempt,) = attempts(config)
    first_end = attempt / "first-end.txt"
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), log
    assert first_end.read_text().startswith("rank 1 on n2: exit status 1\nTraceback")
    assert log[log.index("Traceback") :].startswith(first_end.read_text().partition("\n")[2])
    assert log.count("Traceback") == 1
    assert f"ValueError: {MESSAGE}" in log
    assert (config / "log.txt").stat().st_mtime - first_end.stat().st_mtime < 30


@pytest.mark.long
def test_a_crash_is_told_by_its_rank_and_its_last_lines(slurm: Slurm, config: Path) -> None:
    environment = python_with(("1", "3", "crash"), config)
    job = submit(slurm, config, steps=100_000, options=TWO_NODES, environment=environment)
    ended = slurm.wait(job, "COMPLETED", "FAILED", timeout_seconds=300)
    log = (config / "log.txt").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "139:0"), log
    (attempt,) = attempts(config)
    assert (attempt / "first-end.txt").read_text() == "rank 1 on n2: exit status 139\n"
    told = log[log.index("the first to fail") :]
    assert "Fatal Python error: Segmentation fault" in told
    assert "in go_wrong" in told


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named_as_the_one_that_said_nothing(slurm: Slurm, config: Path) -> None:
    job = submit(slurm, config, steps=100_000, options=TWO_NODES, stall_timeout="60s")
    wait_for_steps(config, 1)
    (rank_1,) = [
        process
        for process in psutil.process_iter()
        if _is_trainer_of(config, process) and process.environ().get("RANK") == "1"
    ]
    rank_1.send_signal(signal.SIGSTOP)
    ended = slurm.wait(job, "COMPLETED", "FAILED", timeout_seconds=300)
    log = (config / "log.txt").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "4:0"), log
    assert f"ranks that did not say where they are:\n{attempts(config)[0]}/rank-1.txt\n[sft]" in log
    assert _processes_of(config) == []


def _is_trainer_of(folder: Path, process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    return command[:1] == [sys.executable] and str(folder / "sft.toml") in command


@pytest.mark.long
@pytest.mark.parametrize("engine", ["apptainer", "pyxis"])
def test_in_a_container_the_program_finds_repository_and_logs(
    engine: str, slurm: Slurm, config: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No container can be made here: a program in front of PATH takes the options, and runs the command as it is."""
    programs = tmp_path_factory.mktemp("programs")
    name, script = STAND_INS[engine]
    (programs / name).write_text(script.format(real=shutil.which(name), taken=config / "taken.txt"))
    (programs / name).chmod(0o755)
    environment = {
        "KLONG_CONTAINER": "image.sqsh",
        "KLONG_CONTAINER_ENGINE": engine,
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    job = submit(slurm, config, steps=1, environment=environment)
    ended = slurm.wait(job, "COMPLETED", "FAILED", timeout_seconds=200)
    assert ended["JobState"] == "COMPLETED", (config / "log.txt").read_text()
    taken = set((config / "taken.txt").read_text().splitlines())
    mounts = f"{REPOSITORY}:{REPOSITORY},{config}:{config}"
    if engine == "apptainer":
        assert taken == {f"exec --nv --bind {mounts} --pwd {REPOSITORY} image.sqsh"}
    else:
        assert taken == {
            "--container-image=image.sqsh",
            f"--container-mounts={mounts}",
            f"--container-workdir={REPOSITORY}",
        }


def test_an_unknown_container_engine_is_named(slurm: Slurm, config: Path) -> None:
    environment = {"KLONG_CONTAINER": "image.sqsh", "KLONG_CONTAINER_ENGINE": "docker"}
    job = slurm.wait(submit(slurm, config, steps=1, environment=environment), "FAILED", timeout_seconds=60)
    assert job["ExitCode"] == "2:0"
    assert "KLONG_CONTAINER_ENGINE=docker: unknown; set it to pyxis or apptainer" in (config / "log.txt").read_text()


@pytest.mark.long
def test_scancel_leaves_no_process(slurm: Slurm, config: Path) -> None:
    job = submit(slurm, config, steps=100_000)
    deadline = time.monotonic() + 120
    while not (config / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, (config / "log.txt").read_text()
        time.sleep(0.2)
    assert len(_processes_of(config)) >= 2
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED", timeout_seconds=30)
    deadline = time.monotonic() + 20
    while (left := _processes_of(config)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
