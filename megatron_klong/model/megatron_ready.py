"""Import this before anything of megatron; on a machine without CUDA it redirects what would need one.

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
"""

import sys

from megatron_klong.model import cpu

# Megatron's timers import wandb, a third of the time a process takes to start, and nothing here writes by them; whoever
# wants wandb imports it later.
_hidden = "wandb" not in sys.modules
if _hidden:
    sys.modules["wandb"] = None  # type: ignore[assignment]  # None: there is no such module

cpu.install()
import megatron.core.timers  # noqa: E402, F401

if _hidden:
    del sys.modules["wandb"]
