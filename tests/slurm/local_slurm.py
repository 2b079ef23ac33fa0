"""A real Slurm of a few virtual nodes on this machine, for as long as a test session lasts.

munged, slurmctld and one slurmd a node run as children with all their state in one short folder; they end with the
session, however it ends. Nodes claim more CPUs than there are; nothing confines a job to them.
"""

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_ports

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
_START_SECONDS = 30.0

_CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
# Containers and small machines: processes are followed through /proc, nothing is confined.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
PropagateResourceLimits=NONE
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
KillWait=3
FirstJobId={first_job}
ReturnToService=2
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=00:10:00 DefMemPerCPU=64 State=UP
"""
_NODE = (
    "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slurm:
    """Run its commands with this environment."""

    environment: dict[str, str]

    def run(self, *command: str, timeout_seconds: float = 60, cwd: Path | None = None) -> str:
        """Standard output of a Slurm command; fails with what it printed."""
        made = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
        assert made.returncode == 0, f"{command}: {made.stdout}{made.stderr}"
        return made.stdout

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        fields = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, number: str, *states: str, timeout_seconds: float) -> dict[str, str]:
        """Wait until the job is in one of the states. Fails with its last state."""
        deadline = time.monotonic() + timeout_seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is still {job['JobState']} ({job.get('Reason')})"
            time.sleep(0.3)
        return job


def why_not() -> str | None:
    """Why no Slurm can be started here, or None."""
    missing = [program for program in PROGRAMS if _find(program) is None]
    if os.geteuid() != 0:
        return "a real Slurm is started by root only"
    return f"{', '.join(missing)} not found; install the packages {PACKAGES}" if missing else None


@contextmanager
def local_slurm(*, nodes: int) -> Iterator[Slurm]:
    """Start it, wait for its nodes, and end it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: unix sockets lie in it
    folder.chmod(0o755)
    (folder / "state").mkdir()
    _write_config(folder, nodes)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _search_path()}
    slurm = Slurm(environment=environment)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock"]
        munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
        _daemon(stack, munged, environment, folder)
        _wait_for(
            "munge", lambda: subprocess.call(["munge", "-n", "-S", f"{folder}/munge.sock"], **_silent(slurm)) == 0
        )
        _daemon(stack, ["slurmctld", "-D"], environment, folder)
        for number in range(1, nodes + 1):
            (folder / f"n{number}").mkdir()
            _daemon(stack, ["slurmd", "-D", "-N", f"n{number}"], environment, folder)
        _wait_for(f"{nodes} idle nodes in {folder}", lambda: _idle_nodes(slurm) == nodes)
        stack.callback(subprocess.call, ["scancel", "--user=root"], **_silent(slurm))
        yield slurm


def _write_config(folder: Path, nodes: int) -> None:
    host = socket.gethostname().split(".")[0]
    port, *node_ports = free_ports(nodes + 1)
    lines = [_NODE.format(number=n, host=host, port=p) for n, p in enumerate(node_ports, 1)]
    # The port at which a job's processes meet follows from its number, and two sessions may run side by side.
    first_job = random.randrange(1, 9000)
    content = _CONFIG.format(host=host, port=port, folder=folder, first_job=first_job, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(content)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def _daemon(stack: ExitStack, command: Sequence[str], environment: dict[str, str], folder: Path) -> None:
    """A child that ends with this process; jobs outlive it, so they are cancelled first."""

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)

    with (folder / f"{command[0]}.out").open("ab") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _idle_nodes(slurm: Slurm) -> int:
    made = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"], env=slurm.environment, capture_output=True, text=True, check=False
    )
    return made.stdout.split().count("idle")


def _wait_for(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {_START_SECONDS:.0f} s"
        time.sleep(0.1)


def _silent(slurm: Slurm) -> dict[str, object]:
    return {"env": slurm.environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _find(program: str) -> str | None:
    return shutil.which(program, path=_search_path())
