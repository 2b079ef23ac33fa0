"""Checkpoints: everything a run needs to go on as if nothing had happened, in a folder that is whole or is not there.

    CHECKPOINTS/step_00000020/      Megatron's torch_dist format: weights, optimizer, schedule, random states

The folder and its manifest are those of `model.checkpoint_folder`; `latest` passes over what is not as its manifest
says, and over weights alone, with which no run can go on.
Resumed on the same layout and number of processes, losses are bit for bit those of the undisturbed run
(tests/integration/train/test_sft.py). On another layout all but the random states is loaded: they belong to ranks.
"""

import queue
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_klong.model.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    CheckpointFolder,
    Setting,
    checksums,
    delete,
    file_names,
    publish,
    read_checkpoint,
    temporary_folder,
)

if TYPE_CHECKING:
    from megatron_klong.train.optimizer import Training

__all__ = ["Checkpoint", "CheckpointError", "Progress", "Setting", "latest", "load", "save"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is. data_position: rows trained so far, which is the position of the next one."""

    step: int
    data_position: int
    data_fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint of a run, found whole."""

    on_disk: CheckpointFolder
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.on_disk.folder


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and why newer ones were passed over. Imports no torch."""
    passed_over: list[str] = []
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        try:
            return _read(candidate), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def _read(folder: Path) -> Checkpoint:
    found = read_checkpoint(folder)
    if found.progress is None:
        raise CheckpointError(f"{folder}: holds weights alone; start from them with megatron_init, and move it away")
    return Checkpoint(on_disk=found, progress=Progress(**found.progress))


def save(folder: Path, training: "Training", progress: Progress, setting: Setting, *, keep: int) -> Path:
    """Write one, called by all processes at once; then all but the `keep` newest are deleted."""
    from megatron.core import dist_checkpointing
    from torch import distributed

    final = folder / f"step_{progress.step:08d}"
    temporary = temporary_folder(final)
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    _write_in_this_process()
    dist_checkpointing.save(_state(training, loading=False, random=True), str(temporary))
    mine = checksums(temporary, file_names(temporary)[rank::processes])
    gathered: list[Any] | None = [None] * processes if rank == 0 else None
    distributed.gather_object(mine, gathered)
    if gathered is not None:
        files = {name: checksum for part in gathered for name, checksum in part.items()}
        # what is in the way is damaged: a run goes on behind the newest whole one
        publish(temporary, final, setting=setting, files=files, progress=asdict(progress))
        _delete_all_but(folder, keep)
    distributed.barrier()
    return final


def load(checkpoint: Checkpoint, training: "Training", setting: Setting) -> None:
    """Put weights, optimizer, schedule and random states back, called by all processes at once.

    Raises CheckpointError, on every process, for a damaged file, another model, or a layout it cannot be read into.
    """
    from megatron.core import dist_checkpointing

    from megatron_klong.model.load_megatron import verify_together

    _refuse_other_model(checkpoint, setting)
    verify_together(checkpoint.on_disk, cure=f"delete {checkpoint.folder} to resume from the one before")
    saved = checkpoint.on_disk
    layout = saved.layout.model_dump(mode="json")
    same = (layout, saved.setting.processes) == (setting.layout, setting.processes)
    loaded = dist_checkpointing.load(_state(training, loading=True, random=same), str(checkpoint.folder))
    for chunk, state in zip(training.chunks, loaded["model"], strict=True):
        chunk.load_state_dict(state, strict=False)  # strict is checked by the sharded load
    training.optimizer.load_state_dict(loaded["optimizer"])
    training.schedule.num_steps = 0  # loading adds to it
    training.schedule.load_state_dict(loaded["schedule"])
    training.guard.load_state_dict(loaded["guard"])
    if same:
        _set_random_state(loaded["random"])


def _refuse_other_model(checkpoint: Checkpoint, setting: Setting) -> None:
    model, layout = (made.model_dump(mode="json") for made in (checkpoint.on_disk.model, checkpoint.on_disk.layout))
    if changed := [name for name in setting.model if model[name] != setting.model[name]]:
        raise CheckpointError(f"{checkpoint.folder}: of another model ({', '.join(changed)}); use another run folder")
    if _experts_apart(layout) != _experts_apart(setting.layout):
        raise CheckpointError(
            f"{checkpoint.folder}: written with layout {layout}; a layout with expert_parallel above 1, or "
            "expert_tensor_parallel other than tensor_parallel, goes on only from another such, and one without only "
            "from one without; keep the layout, or start a new run with megatron_init"
        )


def _experts_apart(layout: Mapping[str, Any]) -> bool:
    """Whether experts are reduced over other processes than the rest; Megatron then keeps two optimizers, not one."""
    return bool(layout["expert_parallel"] > 1 or layout["expert_tensor_parallel"] != layout["tensor_parallel"])


def _state(training: "Training", *, loading: bool, random: bool) -> dict[str, Any]:
    from megatron_klong.model.load_megatron import sharded_metadata

    metadata = {
        **sharded_metadata(),
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    model = [chunk.sharded_state_dict(metadata=metadata) for chunk in training.chunks]
    state = {
        "model": model,
        "optimizer": training.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        "schedule": training.schedule.state_dict(),
        "guard": training.guard.state_dict(),
    }
    return state | ({"random": _random_state()} if random else {})


def _random_state() -> Any:
    """Of this rank: the generators of the CPU, of the device, and Megatron's named ones."""
    import torch
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "named": get_cuda_rng_tracker().get_states(),
    }
    processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject("random", states, (processes,), (rank,), replica_id=0)


def _set_random_state(states: Mapping[str, Any]) -> None:
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(states["named"])


def _write_in_this_process() -> None:
    """Keep Megatron from starting a process for a queue of results that, in a synchronous save, never leaves this one.

    That process takes seconds to start, runs the program's file again, and outlives a kill of the trainer.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _delete_all_but(folder: Path, keep: int) -> None:
    whole = [path for path in sorted(folder.glob("step_*")) if (path / MANIFEST).exists()]
    for path in whole[:-keep]:
        delete(path)
