"""How engine and trainer are started: as children on this machine, or as steps of the Slurm job this runs in.

Under Slurm the batch script has set the address of the first node and a port; engine and trainer run one after the
other, so each step may take the whole allocation.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klong import processes
from megatron_klong.config import ConfigError
from megatron_klong.rl.config import RlConfig

_STOP_SECONDS = 20.0
_ADDRESS, _PORT = "KLONG_FIRST_ADDRESS", "KLONG_PORT"
_RANKS = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"'


class TrainerFailed(RuntimeError):
    """The trainer did not end with 0; the message says where it printed why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """Commands to put before a program, and where an engine listens."""

    engine_prefix: tuple[str, ...]
    engine_host: str
    trainer_prefix: tuple[str, ...]
    environment: dict[str, str]

    def train(self, arguments: Sequence[str], output: Path) -> None:
        """Run the trainer to its end; killed, it takes none of its work with it. Raises TrainerFailed."""
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.trainer_prefix, "-m", "megatron_klong.rl.train", *arguments]
        with output.open("ab") as printed:
            status = processes.run(command, output=printed, environment=self.environment, stop_seconds=_STOP_SECONDS)
        if status:
            raise TrainerFailed(f"the trainer exited with {status}: {_last_lines(output)}")


def make_launcher(config: RlConfig) -> Launcher:
    """What `config.launcher` names. Raises ConfigError outside of a Slurm job that was asked for."""
    count = config.trainer.processes
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    if config.launcher == "local":
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
        return Launcher(
            engine_prefix=(),
            engine_host="127.0.0.1",
            trainer_prefix=(sys.executable, *torchrun),
            # torchrun stands between: its death ends its processes once they have started up, not before
            environment={"OMP_NUM_THREADS": threads, processes.ANCESTOR: str(os.getpid())},
        )
    missing = [name for name in ("SLURM_JOB_ID", _ADDRESS, _PORT) if name not in os.environ]
    if missing:
        raise ConfigError(f"launcher = slurm, but {', '.join(missing)} is not set; sbatch slurm/rl_stage.sh sets it")
    step = ("srun", "--mpi=none", "--kill-on-bad-exit=1", "--unbuffered")
    return Launcher(
        engine_prefix=(*step, "--nodes=1", "--ntasks=1"),
        engine_host=os.environ[_ADDRESS],
        trainer_prefix=(*step, f"--ntasks={count}", "bash", "-c", _RANKS, "task", sys.executable),
        environment={
            "MASTER_ADDR": os.environ[_ADDRESS],
            "MASTER_PORT": os.environ[_PORT],
            "WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        },
    )


def _last_lines(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("rl trainer:")), lines[-1] if lines else "nothing")
    return f"{said} (all of it is in {output})"
