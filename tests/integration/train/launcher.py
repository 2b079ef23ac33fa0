"""The SFT program as a user starts it, under torchrun or process by process, to its end or to its violent end."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY
from tests.ports import free_port
from tests.unit.train.builders import ROW_TOKENS

FAULTY = Path(__file__).with_name("faulty.py")


def start(
    shard: Path, run_folder: Path, *flags: str, processes: int = 2, fault: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    """torchrun on loopback, one thread a process; `finish` or `kill` it. fault: see faulty.py."""
    torchrun = ["-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    torchrun += ["--nproc-per-node", str(processes)]
    return _popen([*torchrun, *_faulty(fault), *_program(shard, run_folder, flags)])


def start_each(
    shard: Path,
    run_folder: Path,
    *flags: str,
    processes: int = 2,
    fault: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> "list[subprocess.Popen[str]]":
    """As srun does: every process by itself, so that each has an exit status and a screen of its own."""
    program = [*_faulty(fault), *_program(shard, run_folder, flags)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    meeting.update(environment or {})
    return [_popen(program, {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]


def start_alone(
    shard: Path, run_folder: Path, *flags: str, environment: Mapping[str, str], under: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    """One process without a launcher, run by the command `under`."""
    return _popen(_program(shard, run_folder, flags), environment, under)


def _program(shard: Path, run_folder: Path, flags: Sequence[str]) -> list[str]:
    settings = {
        "shards": json.dumps([str(shard)]),
        "run_folder": str(run_folder),
        "row_tokens": str(ROW_TOKENS),
        "global_batch_rows": "4",
    }
    defaults = [part for key, value in settings.items() for part in (f"--{key}", value)]
    return ["-m", "megatron_klong.train.sft", *defaults, *flags]


def _faulty(fault: Sequence[str]) -> list[str]:
    return [str(FAULTY), *fault] if fault else []


def _popen(
    program: Sequence[str], environment: Mapping[str, str] | None = None, under: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*under, sys.executable, *program],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", timeout_seconds: float = 180, *, status: int = 0) -> str:
    """What it wrote to the screen; fails unless it ended with `status` in time."""
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == status, output
    return output


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL the launcher and every worker at once: nobody gets to clean up."""
    whole = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in whole:
        member.kill()
    psutil.wait_procs(whole, timeout=30)
    process.communicate()
