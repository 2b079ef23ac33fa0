"""Where each parameter of the model lies in a Megatron checkpoint, and how a layout cuts it.

Taken from the real model: every rank of a layout is built on the meta device, and what it would save says key, place
and shape. How Megatron rearranges a parameter for that (gate and up projections are kept apart) is read off the meta
tensor it would write: a view of the parameter, which here becomes shape, strides and offset. So what is written in
the name of a layout is what that layout would write itself (tests/integration/model/test_convert.py).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_klong.model.config import LayoutConfig, ModelConfig, Precision
from megatron_klong.model.meta import build_on_meta, fake_rank
from megatron_klong.model.tensor_files import TensorLike
from megatron_klong.model.weight_map import Weight, weights

type Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A box of a tensor of the checkpoint, and where it lies in a share of a parameter.

    key, offset, size: the box.  whole: shape of the checkpoint's tensor.
    part: number of the share.  stride, start: the box as a view of that share.
    """

    key: str
    offset: Shape
    size: Shape
    whole: Shape
    part: int
    stride: Shape
    start: int

    def of(self, share: torch.Tensor) -> torch.Tensor:
        """The piece as a view of a contiguous share."""
        return share.as_strided(self.size, self.stride, share.storage_offset() + self.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One parameter: `axis` divides it into `parts` shares of one shape, each stored as pieces.

    tensors, shapes: what it is made of in the file, as `weights` has it; that itself does not go to other processes.
    """

    parameter: str
    tensors: tuple[str, ...]
    axis: int
    dtype: torch.dtype
    parts: int
    shape: Shape
    shapes: tuple[Shape, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return self.parts * math.prod(self.shape) * self.dtype.itemsize

    @property
    def tensors_like(self) -> list[TensorLike]:
        """What the file holds of it."""
        return [
            TensorLike(name=name, dtype=self.dtype, shape=shape)
            for name, shape in zip(self.tensors, self.shapes, strict=True)
        ]

    def shares(self, joint: torch.Tensor) -> Iterator[torch.Tensor]:
        """Its shares, each contiguous."""
        for part in joint.chunk(self.parts, dim=self.axis) if self.parts > 1 else [joint]:
            yield part.reshape(self.shape).contiguous()


def stored_parameters(
    config: ModelConfig, layout: LayoutConfig, precision: Precision = "bf16", *, copies: bool = True
) -> dict[str, Stored]:
    """Every parameter by its name, in the order of the file.

    copies: whether the tensors are also to be those that a layer for multi-token prediction repeats (`has_copies`).
    """
    mapping = weights(config, copies=copies)
    found: dict[str, dict[tuple[str, Shape], Piece]] = {name: {} for name in mapping}
    stored: dict[str, Stored] = {}
    processes = layout.model_processes
    for rank in range(processes):
        with fake_rank(layout, rank=rank, processes=processes):
            for name, parts, tensor, pieces in _of_this_rank(config, layout, precision, mapping):
                found[name] |= {(piece.key, piece.offset): piece for piece in pieces}
                if name not in stored:
                    stored[name] = _stored(mapping[name], tensor, parts, config)
    if missing := mapping.keys() - stored.keys():
        raise ValueError(f"no rank of the model has {', '.join(sorted(missing)[:8])}")
    in_order = {name: tuple(found[name][place] for place in sorted(found[name])) for name in mapping}
    return {name: replace(stored[name], pieces=in_order[name]) for name in mapping}


def _stored(weight: Weight, tensor: torch.Tensor, parts: int, config: ModelConfig) -> Stored:
    axis = weight.operator.axis or 0
    joint = torch.cat([weight.operator.unflatten(tensor, config)] * parts, dim=axis)
    return Stored(
        parameter=weight.parameter,
        tensors=weight.tensors,
        axis=axis,
        dtype=tensor.dtype,
        parts=parts,
        shape=tuple(tensor.shape),
        shapes=tuple(tuple(made.shape) for made in weight.operator.part(joint, config)),
        pieces=(),
    )


def _of_this_rank(
    config: ModelConfig, layout: LayoutConfig, precision: Precision, mapping: Mapping[str, Weight]
) -> Iterator[tuple[str, int, torch.Tensor, list[Piece]]]:
    """Name, number of shares, meta tensor and pieces of each parameter that this rank would save."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    from megatron_klong.model.hugging_face import local_weights, share_of
    from megatron_klong.model.load_megatron import sharded_metadata

    model = build_on_meta(config, layout, precision=precision)
    saved: dict[Any, Any] = {}
    for entry in model.sharded_state_dict(metadata=sharded_metadata()).values():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            saved[_memory(entry.data)] = entry
    for name, tensor in local_weights([model], config):
        entry = saved.pop(_memory(tensor))
        if not is_main_replica(entry.replica_id):
            continue
        share = share_of(mapping[name], tensor)
        boxes = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        yield name, share.parts, tensor, [_piece(box, share.part, tensor) for box in boxes]
    if saved:
        keys = ", ".join(sorted(entry.key for entry in saved.values())[:8])
        raise ValueError(f"the model saves {keys}, which are none of its parameters by weight_map")


def _piece(box: Any, part: int, tensor: torch.Tensor) -> Piece:
    if _memory(box.data) != _memory(tensor):
        raise ValueError(f"{box.key}: Megatron saves a copy of the parameter, so nothing says how it was made")
    ones = (1,) * box.prepend_axis_num
    return Piece(
        key=box.key,
        offset=tuple(box.global_offset),
        size=ones + tuple(box.local_shape),
        whole=tuple(box.global_shape),
        part=part,
        stride=ones + tuple(box.data.stride()),
        start=box.data.storage_offset(),
    )


def _memory(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common; on the meta device too, where there is no address."""
    return int(tensor.untyped_storage()._cdata)
