"""A server as a child process: started, its address read from the line it prints, and ended with its parent.

Always: it is stopped when the context ends and killed when the parent is; what it prints is in a file; a server that
does not come up is an error that quotes the end of that file.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_klong import processes
from megatron_klong.serve.config import EngineConfig

_STOP_SECONDS = 20.0


class ServerFailed(RuntimeError):
    """The server did not come up, or ended; the message says where it printed why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A running server."""

    url: str
    process: "subprocess.Popen[bytes]"
    output: Path

    def check(self) -> None:
        """Raises ServerFailed if it has ended."""
        if self.process.poll() is not None:
            raise ServerFailed(f"the server exited with {self.process.returncode}: {_end_of(self.output)}")


@contextmanager
def serving(
    weights: Path,
    engine: EngineConfig,
    output: Path,
    *,
    policy_epoch: int = 0,
    seed: int = 0,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve the weights; `prefix`: a command that starts the program elsewhere, such as srun. Raises ServerFailed."""
    settings = {
        **engine.model_dump(mode="json"),
        "weights": str(weights),
        "policy_epoch": policy_epoch,
        "seed": seed,
        "host": host,
        "drain_seconds": 0,  # it is stopped when nobody waits for a reply any more
    }
    layout = settings.pop("layout")
    given = {**settings, **{f"layout.{name}": value for name, value in layout.items()}}
    flags = [part for name, value in given.items() for part in (f"--{name}", json.dumps(value))]
    processes_of_one = engine.layout.model_processes
    # a port of the launcher's own choice: several servers may be started on one machine
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes_of_one), "-m"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as printed:
        process = processes.start(
            [
                *prefix,
                sys.executable,
                "-m",
                *(launcher if processes_of_one > 1 else []),
                "megatron_klong.serve",
                *flags,
            ],
            output=subprocess.PIPE,
            errors=printed,
            # on a CPU its threads would wait for one another wherever clients beside it run, ten times as long
            environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # empty if it ends without one
        if not line:
            process.wait()
            raise ServerFailed(f"the server of {weights} exited with {process.returncode}: {_end_of(output)}")
        yield Server(url=str(json.loads(line)["url"]), process=process, output=output)
    finally:
        processes.stop(process, seconds=_STOP_SECONDS)
        process.stdout.close()


def _end_of(output: Path) -> str:
    lines = output.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'it printed nothing'} (all of it is in {output})"
