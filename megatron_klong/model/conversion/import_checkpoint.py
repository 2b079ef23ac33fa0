"""Weights in Hugging Face format -> a Megatron checkpoint, parameter by parameter, in several processes.

Always (tests/integration/model/test_convert.py, test_convert_refusals.py, test_convert_kills.py): plain Megatron loads
the result into the model on any layout; names and shapes are checked before anything is written, and a dtype that
would be rounded is refused unless a precision is asked for; a worker holds one parameter at a time, with its tensors.
"""

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_klong.model.checkpoint_folder import (
    CheckpointFolder,
    Setting,
    check_output,
    checksums,
    publish,
    temporary_folder,
)
from megatron_klong.model.config import LayoutConfig, ModelConfig, Precision
from megatron_klong.model.conversion.chunk_files import ChunkFiles
from megatron_klong.model.conversion.pieces import Piece, Stored, stored_parameters
from megatron_klong.model.conversion.weights_manifest import verify_weights
from megatron_klong.model.conversion.workers import Step, in_shares
from megatron_klong.model.tensor_files import TensorPlace, check_names, check_shape, find_tensors, read_tensor
from megatron_klong.model.weight_map import WeightsError, has_copies, weights

_PRECISIONS: Mapping[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_COMMON = "common_state/shard_0_1"  # where Megatron looks for all that is no tensor; here there is nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """What one worker writes: the parameters and, for each, where its tensors are. copies: see `weights`."""

    number: int
    folder: Path
    config: ModelConfig
    copies: bool
    parameters: Sequence[tuple[Stored, tuple[TensorPlace, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    results: list[WriteResult]
    files: dict[str, dict[str, Any]]


def import_checkpoint(
    source: Path,
    output: Path,
    layout: LayoutConfig,
    *,
    processes: int,
    precision: Precision | None = None,
    without_mtp: bool = False,
    overwrite: bool = False,
) -> CheckpointFolder:
    """Write the checkpoint at `output`, in the pieces in which processes of `layout` would write it.

    precision: None: as the tensors are.  without_mtp: leave out the layer for multi-token prediction; an export can
    carry it over. Raises ConfigError, WeightsError, ManifestError, CheckpointError; then nothing is left behind.
    """
    config = ModelConfig.from_hugging_face(source)
    tensors = find_tensors(source)
    if without_mtp:
        tensors = {name: place for name, place in tensors.items() if not is_mtp(name, config)}
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    layout.check_model(config)
    copies = has_copies(tensors, config)
    check_names(source, tensors, {name for one in weights(config, copies=copies).values() for name in one.tensors})
    precision = precision or _precision_of(source, tensors)
    stored = stored_parameters(config, layout, precision, copies=copies)
    for one in stored.values():
        for name, shape in zip(one.tensors, one.shapes, strict=True):
            check_shape(tensors[name], shape)
    check_output(output, sum(one.num_bytes for one in stored.values()), overwrite=overwrite)
    verify_weights(source, processes=processes)
    setting = Setting(
        model=config.model_dump(mode="json"), layout=layout.model_dump(mode="json"), processes=layout.model_processes
    )
    temporary = temporary_folder(output)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    try:
        files = _write(temporary, config, list(stored.values()), tensors, processes)
        return publish(temporary, output, setting=setting, files=files)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of the file belongs to a layer for multi-token prediction."""
    first = config.num_hidden_layers
    layers = range(first, first + config.num_nextn_predict_layers)
    return any(name.startswith(f"model.layers.{layer}.") for layer in layers)


def _precision_of(source: Path, tensors: Mapping[str, TensorPlace]) -> Precision:
    """That of all tensors; the bias of the experts, which is fp32 in any case, does not count."""
    by_dtype: dict[torch.dtype, str] = {}
    for name, place in tensors.items():
        if not name.endswith("e_score_correction_bias"):
            by_dtype.setdefault(place.dtype, name)
    if len(by_dtype) == 1 and (dtype := next(iter(by_dtype))) in _PRECISIONS:
        return _PRECISIONS[dtype]
    shown = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in by_dtype.items())
    raise WeightsError(f"{source}: weights are neither all bf16 nor all fp32 ({shown}); pass --precision")


def _write(
    folder: Path, config: ModelConfig, stored: Sequence[Stored], tensors: Mapping[str, TensorPlace], processes: int
) -> dict[str, dict[str, Any]]:
    """All files of the checkpoint; their checksums."""
    shares = [
        _Share(
            number=number,
            folder=folder,
            config=config,
            copies=has_copies(tensors, config),
            parameters=[(one, tuple(tensors[name] for name in one.tensors)) for one in run],
        )
        for number, run in enumerate(runs(stored, [one.num_bytes for one in stored], processes))
    ]
    common = WriteItem(index=MetadataIndex(_COMMON), type=WriteItemType.BYTE_IO)
    plans = [SavePlan([common]), *(SavePlan(_items(share)) for share in shares)]
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _, metadata = planner.create_global_plan(plans)  # raises unless the pieces make up every tensor
    total = sum(one.num_bytes for one in stored)
    written = in_shares(write_share, shares, processes=processes, description="import", total_bytes=total)
    written.append(_write_common(folder, common, number=len(shares)))
    return _finish(folder, metadata, written)


def runs[Item](items: Sequence[Item], sizes: Sequence[int], number: int) -> list[list[Item]]:
    """Items in order, in at most `number` runs of about the same size."""
    made: list[list[Item]] = [[] for _ in range(number)]
    total, before = sum(sizes), 0
    for item, size in zip(items, sizes, strict=True):
        made[min(number - 1, (before + size // 2) * number // max(total, 1))].append(item)
        before += size
    return [run for run in made if run]


def _items(share: _Share) -> list[WriteItem]:
    return [_item(piece, one.dtype) for one, _ in share.parameters for piece in one.pieces]


def _item(piece: Piece, dtype: torch.dtype) -> WriteItem:
    offset = torch.Size(piece.offset)
    return WriteItem(
        index=MetadataIndex(piece.key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=torch.Size(piece.size)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(piece.whole),
        ),
    )


@torch.no_grad()
def write_share(share: _Share, step: Step) -> _Written:
    """What one worker does."""
    mapping = weights(share.config, copies=share.copies)
    with ChunkFiles(share.folder, share.number) as files:
        for stored, places in share.parameters:
            read = [read_tensor(place, forget=True).to(stored.dtype) for place in places]
            joint = mapping[stored.parameter].join(read, share.config)
            del read
            for part, one in enumerate(stored.shares(joint)):
                for piece in stored.pieces:
                    if piece.part == part:
                        files.add(_item(piece, stored.dtype), piece.of(one))
            del joint, one
            step(stored.num_bytes)
    return _Written(results=files.results, files=files.checksums)


def _write_common(folder: Path, item: WriteItem, *, number: int) -> _Written:
    content = io.BytesIO()
    torch.save([{}], content)
    with ChunkFiles(folder, number) as files:
        files.add(item, content)
    return _Written(results=files.results, files=files.checksums)


def _finish(folder: Path, metadata: Metadata, written: Sequence[_Written]) -> dict[str, dict[str, Any]]:
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    FileSystemWriter(folder).finish(metadata, [one.results for one in written])
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    small = {path.name for path in folder.iterdir()} - {name for one in written for name in one.files}
    return {name: entry for one in written for name, entry in one.files.items()} | checksums(folder, sorted(small))
