"""Process groups and random seeds of one process: torch.distributed first, Megatron's groups on top of it.

Under torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) the process joins the others;
without one it is alone. Always: stages of a pipeline and groups of experts draw different random weights, the parts
of one matrix belong to the same draw; and groups that stay on one machine listen on the loopback interface only.
"""

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import os

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import distributed

from megatron_klong.config import ConfigError
from megatron_klong.model.config import LayoutConfig

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SEED_DISTANCE = 100  # between stages, as in Megatron's own training program


def initialize(layout: LayoutConfig, *, seed: int, backend: str | None = None) -> None:
    """Set up all process groups and random states; backend: nccl where CUDA is available, else gloo.

    Raises ConfigError if the number of processes does not fit the layout, or if groups are there already.
    """
    if distributed.is_initialized():
        raise ConfigError("process groups are there already; call destroy() first")
    layout.check_world_size(int(os.environ.get("WORLD_SIZE", "1")))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _join(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
    initialize_groups(layout, seed=seed)


def initialize_groups(layout: LayoutConfig, *, seed: int, gloo: bool = True) -> None:
    """Megatron's groups and random states, once torch.distributed is there. gloo: also groups for work on the host."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline_parallel if layout.virtual_pipeline_parallel > 1 else None
        ),
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        context_parallel_size=layout.context_parallel,
        create_gloo_process_groups=gloo,
    )
    stage_seed = seed + _SEED_DISTANCE * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def destroy() -> None:
    """Leave all process groups; `initialize` may follow."""
    parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def check_initialized(layout: LayoutConfig) -> None:
    """Raise ConfigError unless this process was initialized for `layout`."""
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError("there are no process groups; call initialize(layout, seed=...) first")
    found = LayoutConfig(
        layers_per_stage=layout.layers_per_stage,  # says nothing about processes
        tensor_parallel=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_parallel=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_parallel=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        expert_parallel=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel=parallel_state.get_expert_tensor_parallel_world_size(),
        context_parallel=parallel_state.get_context_parallel_world_size(),
    )
    if found != layout:
        raise ConfigError(f"processes were initialized for {found!r}, the model asks for {layout!r}; use one layout")


def _join(backend: str) -> None:
    given = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if given and len(given) < len(_LAUNCHER_VARIABLES):
        missing = ", ".join(sorted(set(_LAUNCHER_VARIABLES) - set(given)))
        raise ConfigError(f"the environment has {', '.join(given)} but not {missing}; start with torchrun, or set all")
    if os.environ.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1", "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if given:
        distributed.init_process_group(backend)
    else:  # alone: nobody else needs to find this process, so no port either
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
