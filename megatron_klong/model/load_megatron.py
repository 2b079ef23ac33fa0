"""Weights from a checkpoint of ours, of a run or imported, into a model on any layout.

Always (tests/integration/model/test_convert.py, tests/integration/serve/refit_on_ranks.py): whatever layout wrote it,
each process reads only what it holds; a file that is not what the manifest says is named before anything is loaded;
what one process fails at is raised by all of them.
"""

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_klong.model.checkpoint_folder import (
    CheckpointError,
    CheckpointFolder,
    changed,
    check_tensors,
    damaged,
    read_checkpoint,
)
from megatron_klong.model.config import ModelConfig


def sharded_metadata() -> dict[str, Any]:
    """How models describe themselves for our checkpoints: one tensor for all experts of a layer."""
    return {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


@torch.no_grad()
def load_megatron(chunks: Sequence[GPTModel], config: ModelConfig, folder: Path | str) -> None:
    """Fill the parameters of every process; all call this at once. Raises CheckpointError on each of them."""
    folder = Path(folder)

    def found() -> CheckpointFolder:
        checkpoint = read_checkpoint(folder)
        refuse_other_model(checkpoint, config)
        return checkpoint

    checkpoint, *_ = _agreed(folder, found)
    verify_together(checkpoint, cure=f"delete {folder}, or make it again")
    # what else a model saves are states of Transformer Engine, which are empty here
    sharded = [
        {
            name: entry
            for name, entry in chunk.sharded_state_dict(metadata=sharded_metadata()).items()
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        }
        for chunk in chunks
    ]

    def fill() -> None:
        _check_tensors(checkpoint, [entry for entries in sharded for entry in entries.values()])
        # validated, processes would talk to one another on the way, and wait for one that has failed
        loaded = dist_checkpointing.load({"model": sharded}, str(folder), validate_access_integrity=False)
        for chunk, state in zip(chunks, loaded["model"], strict=True):
            chunk.load_state_dict(state, strict=False)  # strict is checked above

    _agreed(folder, fill)


def refuse_other_model(checkpoint: CheckpointFolder, config: ModelConfig) -> None:
    """Raises CheckpointError, naming the fields, where a checkpoint holds another model than `config`."""
    if difference := checkpoint.model.difference(config):
        raise CheckpointError(f"{checkpoint.folder}: of another model ({difference}); use its own configuration")


def verify_together(checkpoint: CheckpointFolder, *, cure: str) -> None:
    """Compare all checksums, each process a share. Raises CheckpointError on every process."""
    share = sorted(checkpoint.files)[distributed.get_rank() :: distributed.get_world_size()]
    if names := [name for part in _agreed(checkpoint.folder, lambda: changed(checkpoint, share)) for name in part]:
        raise damaged(checkpoint, names, cure)


def _agreed[Result](folder: Path, work: Callable[[], Result]) -> list[Result]:
    """What it comes to on each process; all call this. Raises CheckpointError on all of them if it fails on one."""
    result: Result | None = None
    fault: str | None = None
    try:
        result = work()
    except CheckpointError as error:
        fault = str(error)
    except (Exception, CheckpointException) as error:  # the latter, of torch for a file it cannot read, is none
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        fault = f"{folder}: could not be read ({type(causes[0]).__name__}: {causes[0]}); try again, or make it anew"
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (result, fault))
    if faults := [fault for _, fault in found if fault is not None]:
        raise CheckpointError(faults[0])
    return [result for result, _ in found]


def _check_tensors(checkpoint: CheckpointFolder, sharded: Sequence[Any]) -> None:
    boxes = [
        box for entry in sharded for box in (entry.build() if isinstance(entry, ShardedTensorFactory) else [entry])
    ]
    held = FileSystemReader(checkpoint.folder).read_metadata().state_dict_metadata
    shapes = {key: entry.size for key, entry in held.items() if isinstance(entry, TensorStorageMetadata)}
    check_tensors(checkpoint, shapes, {box.key: box.global_shape for box in boxes})
