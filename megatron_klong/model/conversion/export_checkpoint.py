"""A Megatron checkpoint -> weights in Hugging Face format, parameter by parameter, in several processes.

Always (tests/integration/model/test_convert.py, test_convert_refusals.py, test_convert_kills.py): what an import read
is written back bit for bit, whatever layout wrote the checkpoint; all its checksums, names and shapes are checked
before anything is written; a worker holds one parameter at a time, with its tensors.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_klong.model.checkpoint_folder import (
    CheckpointError,
    CheckpointFolder,
    check_output,
    check_tensors,
    damaged,
    find_checkpoint,
    temporary_folder,
)
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.conversion.flushing import Flusher
from megatron_klong.model.conversion.import_checkpoint import runs
from megatron_klong.model.conversion.like import Like, read_like
from megatron_klong.model.conversion.pieces import Stored, stored_parameters
from megatron_klong.model.conversion.workers import Step, checksums_of, in_shares
from megatron_klong.model.tensor_files import (
    TensorLike,
    TensorPlace,
    create_files,
    plan_files,
    put_in_place,
    read_tensor,
    write_config,
    write_tensor,
)
from megatron_klong.model.weight_map import weights

# what a checkpoint of a run holds besides the weights: the optimizer, and states that are no tensors
_NOT_WEIGHTS = ("optimizer.", "chained_", "param_groups", "random", "common_state", "rng")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Where tensors come from: a parameter of the checkpoint, or as they are from the folder to be like."""

    stored: Stored | None
    copied: TensorPlace | None
    tensors: tuple[TensorLike, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """What one worker writes, and the places of all its tensors. copies: see `weights`."""

    checkpoint: Path
    config: ModelConfig
    copies: bool
    sources: Sequence[_Source]
    places: Mapping[str, TensorPlace]


def export_checkpoint(
    source: Path, output: Path, *, processes: int, like: Path | None = None, overwrite: bool = False
) -> Path:
    """Write the weights of a checkpoint, or of the newest whole one of a `checkpoints` folder, to the folder `output`.

    like: a folder in Hugging Face format of the same model, whose tokenizer and other small files are copied, and
    its layer for multi-token prediction if the checkpoint has none. Raises CheckpointError, WeightsError, ConfigError;
    then nothing is left behind.
    """
    checkpoint = find_checkpoint(source)
    config = checkpoint.model
    model = read_like(like, config)
    copies = model is None or model.copies
    stored = stored_parameters(config, LayoutConfig(), copies=copies)
    total = sum(one.num_bytes for one in stored.values())
    check_output(output, total, overwrite=overwrite)
    _verify(checkpoint, processes)
    metadata = FileSystemReader(checkpoint.folder).read_metadata()
    sources = [*_from_checkpoint(checkpoint, metadata, stored), *_from_like(model)]
    temporary = temporary_folder(output)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    try:
        places = create_files(temporary, plan_files([one.tensors for one in sources]))
        shares = [
            _Share(
                checkpoint=checkpoint.folder,
                config=config,
                copies=copies,
                sources=run,
                places={tensor.name: places[tensor.name] for one in run for tensor in one.tensors},
            )
            for run in runs(sources, [one.num_bytes for one in sources], processes)
        ]
        in_shares(write_share, shares, processes=processes, description="export", total_bytes=total)
        _write_small_files(temporary, config, sources, model)
        put_in_place(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _verify(checkpoint: CheckpointFolder, processes: int) -> None:
    names = sorted(checkpoint.files, key=lambda name: -checkpoint.files[name]["bytes"])
    found = checksums_of([checkpoint.folder / name for name in names], processes=processes)
    wrong = [name for name, entry in zip(names, found, strict=True) if entry != checkpoint.files[name]]
    if wrong:
        raise damaged(checkpoint, wrong, f"delete {checkpoint.folder}, or make it again")


def _from_checkpoint(
    checkpoint: CheckpointFolder, metadata: Metadata, stored: Mapping[str, Stored]
) -> Iterator[_Source]:
    """The parameters in the dtype they have there. Raises CheckpointError unless the checkpoint has exactly these."""
    held = {
        key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    wholes = {piece.key: piece.whole for one in stored.values() for piece in one.pieces}
    check_tensors(checkpoint, {key: entry.size for key, entry in held.items()}, wholes)
    extra = sorted(key for key in held.keys() - wholes.keys() if not key.startswith(_NOT_WEIGHTS))
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(extra)} tensors not of this model: {', '.join(extra[:8])}; its manifest is of "
            "another model, make it again"
        )
    for one in stored.values():
        dtype = held[one.pieces[0].key].properties.dtype
        read = replace(one, dtype=dtype)
        yield _Source(stored=read, copied=None, tensors=tuple(read.tensors_like))


def _from_like(model: Like | None) -> Iterator[_Source]:
    for place in model.carried if model else ():
        made = TensorLike(name=place.name, dtype=place.dtype, shape=place.shape)
        yield _Source(stored=None, copied=place, tensors=(made,))


@torch.no_grad()
def write_share(share: _Share, step: Step) -> None:
    """What one worker does."""
    mapping = weights(share.config, copies=share.copies)
    reader = _Reader(share.checkpoint)
    with ExitStack() as stack:
        files = sorted({place.file for place in share.places.values()})
        opened = {file: stack.enter_context(file.open("r+b", buffering=0)) for file in files}
        flusher = stack.enter_context(Flusher())
        for source in share.sources:
            if source.stored is None:
                assert source.copied is not None
                parts: Sequence[torch.Tensor] = [read_tensor(source.copied)]
            else:
                operator = mapping[source.stored.parameter].operator
                whole = reader.read(source.stored)
                parts = operator.part(operator.unflatten(whole, share.config), share.config)
                del whole
            for tensor, part in zip(source.tensors, parts, strict=True):
                place = share.places[tensor.name]
                write_tensor(opened[place.file].fileno(), place, part)
                flusher.wrote(opened[place.file].fileno(), place.num_bytes)
            step(source.num_bytes)
        for file in opened.values():
            flusher.finish(file.fileno())


class _Reader(LoadPlanner):
    """Reads parameters of a checkpoint one by one, through torch's own reader, of whose planners it is the simplest."""

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._targets: Sequence[torch.Tensor] = ()

    def read(self, stored: Stored) -> torch.Tensor:
        """A parameter, whole."""
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        self._targets = [piece.of(whole) for piece in stored.pieces]
        items: list[ReadItem] = []
        for number, piece in enumerate(stored.pieces):
            entry = self._metadata.state_dict_metadata[piece.key]
            assert isinstance(entry, TensorStorageMetadata)
            box = ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=torch.Size(piece.size))
            for item in create_read_items_for_chunk_list(piece.key, entry, [box]):
                items.append(replace(item, dest_index=replace(item.dest_index, index=number)))
        self._reader.read_data(LoadPlan(items), self)
        return whole

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._targets[read_item.dest_index.index or 0]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It has been copied to where it belongs."""

    def set_up_planner(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]


def _write_small_files(folder: Path, config: ModelConfig, sources: Sequence[_Source], model: Like | None) -> None:
    fields = config.to_hugging_face()
    if model is not None:
        fields["num_nextn_predict_layers"] = model.config.num_nextn_predict_layers
        for file in model.small_files:
            shutil.copyfile(file, folder / file.name)
    write_config(folder, fields, sources[0].tensors[0].dtype)
