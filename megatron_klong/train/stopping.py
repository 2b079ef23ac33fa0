"""A run that is asked to stop: all processes end behind the same step, once its checkpoint is written.

It is asked by SIGTERM (torchrun passes it on; Slurm sends it to a job that it preempts or that is out of time), by
SIGUSR1, or by a file that appears at the path in STOP_FILE. slurm/sft.sh makes that file when the time limit is near: a
signal from Slurm would reach all processes of a job step, and helpers such as wandb's would die of it.

A request to any one process counts, from `listen` on, during the long start too; a second one changes nothing.
"""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "KLONG_STOP_FILE"
STOPPED = 75  # exit status: EX_TEMPFAIL of sysexits.h, started again the run goes on


class StoppedOnRequest(Exception):
    """The checkpoint of the last step is written; every process raises it behind the same step."""


class StopRequest:
    """Whether this run is asked to stop."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._agreed = False

    @classmethod
    def listen(cls) -> "StopRequest":
        """Catch the signals from now on. Main thread only."""
        request = cls()
        for number in SIGNALS:
            signal.signal(number, request._receive)
        return request

    def agree(self) -> bool:
        """Whether any process was asked. All processes call it at the same point, all get the same answer."""
        import torch
        from torch import distributed

        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        asked = torch.tensor(int(self._asked()), device=device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        self._agreed = bool(asked.item())
        return self._agreed

    def end_run(self, step: int) -> None:
        """Raises StoppedOnRequest if that was agreed; `step`: the one whose checkpoint is written."""
        if self._agreed:
            raise StoppedOnRequest(f"stopped on request behind step {step}, its checkpoint is written; start again")

    def _asked(self) -> bool:
        file = os.environ.get(STOP_FILE)
        return self._received is not None or (file is not None and os.path.exists(file))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
