"""Python that goes wrong: runs a module as `python -m` does, but one process does something else in one of its steps.

    python faulty.py RANK STEP raise|hang|crash|slow -m MODULE ARGUMENT...

RANK may be "every".
"""

import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
MESSAGE = "the fault of this test"


def go_wrong(kind: str) -> None:
    match kind:
        case "raise":
            raise ValueError(MESSAGE)
        case "hang":
            time.sleep(3600)
        case "crash":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), signal.SIGSEGV)
        case "slow":
            time.sleep(0.3)
        case _:
            raise SystemExit(f"{kind}: no such fault")


def wrong_in_step(step: int, kind: str, train_step: Callable[..., Any]) -> Callable[..., Any]:
    """`slow` is so from that step on."""
    calls = 0

    def faulty(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step or (calls > step and kind == "slow"):
            go_wrong(kind)
        return train_step(*arguments)

    return faulty


def main(rank: str, step: str, kind: str, dash_m: str, module: str) -> None:
    assert dash_m == "-m"
    sys.path.insert(0, str(REPOSITORY))
    if rank in ("every", os.environ.get("RANK")):
        import megatron_klong.train.step as steps

        steps.train_step = wrong_in_step(int(step), kind, steps.train_step)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    head, sys.argv = sys.argv[1:6], sys.argv[5:]
    main(*head)
