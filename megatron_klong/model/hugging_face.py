"""Weights of the model from and to a folder in Hugging Face format (config.json and safetensors), on any layout.

Always (tests/integration/model/test_hugging_face.py): the names in the folder are exactly those of the model, each
with its shape, or nothing is loaded and the error names the tensor; what was read is written back bit for bit (in the
model's precision); the folder written is whole or is not there, and loads in transformers as it is.
"""

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import distributed

from megatron_klong.files import write_atomically
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.tensor_files import (
    TensorLike,
    TensorPlace,
    check_names,
    check_shape,
    create_files,
    find_tensors,
    plan_files,
    put_in_place,
    put_tensor,
    read_tensor,
    write_config,
)
from megatron_klong.model.weight_map import Parts, Weight, WeightsError, has_copies, weights
from megatron_klong.trajectory.tokenizer import Tokenizer

__all__ = ["WeightsError", "load_hugging_face", "local_weights", "save_hugging_face", "save_tokenizer", "share_of"]

_NEXT_LAYER = "mtp.layers.0.mtp_model_layer."

# Transformer Engine keeps these norms inside the linear layer that follows them.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a process announces of a parameter it holds: which part, of how many, and how it looks."""

    part: int
    parts: int
    shape: torch.Size
    dtype: torch.dtype


@torch.no_grad()
def load_hugging_face(chunks: Sequence[GPTModel], config: ModelConfig, folder: Path | str) -> None:
    """Fill the parameters of this process. Each process reads by itself. Raises WeightsError; then load again.

    chunks: all that this process holds of the model (`build_chunks`).
    """
    folder = Path(folder)
    places = find_tensors(folder)
    mapping = weights(config, copies=has_copies(places, config))
    check_names(folder, places, {name for weight in mapping.values() for name in weight.tensors})
    for parameter, tensor in local_weights(chunks, config):
        weight = mapping[parameter]
        share = share_of(weight, tensor)
        expected = weight.operator.part(_joint_like(weight, tensor.to("meta"), share, config), config)
        for name, like in zip(weight.tensors, expected, strict=True):
            check_shape(places[name], like.shape)
        parts = [read_tensor(places[name]) for name in weight.tensors]
        joint = weight.join(parts, config)
        own = joint if share.parts == 1 else joint.chunk(share.parts, _axis(weight))[share.part]
        tensor.copy_(own.reshape(tensor.shape))


@torch.no_grad()
def save_hugging_face(chunks: Sequence[GPTModel], config: ModelConfig, folder: Path | str) -> None:
    """Write the whole model; all processes call this, rank 0 writes and replaces what was in `folder`.

    Tensors keep the model's precision (the bias of the experts is fp32). Returns when the folder is there.
    """
    folder = Path(folder)
    local = dict(local_weights(chunks, config))
    mapping = weights(config)
    announced: list[dict[str, Share]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(announced, {name: share_of(mapping[name], local[name]) for name in local})
    tensors = _tensors(mapping, announced, config)
    temporary = folder.with_name(f".{folder.name}.tmp")
    places: dict[str, TensorPlace] = {}
    if writer := distributed.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir(parents=True)
        places = create_files(temporary, plan_files(tensors))
    for weight in mapping.values():
        shares = _collect(weight, announced, local.get(weight.parameter))
        if writer:
            joint = torch.cat([weight.operator.unflatten(share, config) for share in shares], dim=_axis(weight))
            for name, part in zip(weight.tensors, weight.operator.part(joint, config), strict=True):
                put_tensor(places[name], part.cpu())
    if writer:
        write_config(temporary, config.to_hugging_face(), next(chunks[0].parameters()).dtype)
        put_in_place(temporary, folder)
    distributed.barrier()


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Put a tokenizer beside saved weights, with its tokenizer_config.json and chat template where there are any.

    Control tokens that were appended to the vocabulary (`load_tokenizer(add_special_tokens=True)`) are written into
    tokenizer.json under their ids; a SentencePiece model is copied as it is.
    """
    source, folder = Path(tokenizer.path), Path(folder)
    if source.suffix == ".json":
        write_atomically(folder / "tokenizer.json", _with_control_tokens(source.read_bytes(), tokenizer.control))
    else:
        write_atomically(folder / "tokenizer.model", source.read_bytes())
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if source.with_name(name).is_file():
            write_atomically(folder / name, source.with_name(name).read_bytes())


def _with_control_tokens(content: bytes, control: Mapping[str, int]) -> bytes:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    known = HuggingFaceTokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    missing = [token for token in control if token not in known]
    if not missing:
        return content
    definition = json.loads(content)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": control[token], "content": token, **plain, "special": True} for token in missing]
    definition["added_tokens"] = [*(definition.get("added_tokens") or []), *added]
    return json.dumps(definition, ensure_ascii=False, indent=2).encode()


def local_weights(chunks: Sequence[GPTModel], config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """This process's parameters, and the router's bias, under names that count over the whole model."""
    for chunk in chunks:
        yield from _weights_of_chunk(chunk, config)


def _weights_of_chunk(model: GPTModel, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    experts = config.n_routed_experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert = experts * parallel_state.get_expert_model_parallel_rank()
    layers = [] if model.decoder is None else [layer.layer_number - 1 for layer in model.decoder.layers]
    buffers = (item for item in model.named_buffers() if item[0].endswith(".expert_bias"))
    for name, tensor in (*model.named_parameters(), *buffers):
        if name.startswith("decoder.layers."):
            _, _, number, inner = name.split(".", 3)
            name = f"decoder.layers.{layers[int(number)]}.{_renamed(inner, first_expert)}"
        elif name.startswith(_NEXT_LAYER):
            name = _NEXT_LAYER + _renamed(name.removeprefix(_NEXT_LAYER), first_expert)
        yield name, tensor.data


def _renamed(inner: str, first_expert: int) -> str:
    """A name within a layer, as local layers have it, with the experts counted over the whole model."""
    inner = _FUSED_NORMS.get(inner, inner)
    head, is_expert, expert = inner.rpartition(".weight")
    if is_expert and expert:  # weight0, weight1, ... of the experts
        return f"{head}.weight{first_expert + int(expert)}"
    return inner


def share_of(weight: Weight, tensor: torch.Tensor) -> Share:
    """Which part of a weight this process's tensor is."""
    rank, size = 0, 1
    if weight.operator.axis is not None:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        if weight.expert:
            rank = parallel_state.get_expert_tensor_parallel_rank()
            size = parallel_state.get_expert_tensor_parallel_world_size()
    return Share(part=rank, parts=size, shape=tensor.shape, dtype=tensor.dtype)


def _axis(weight: Weight) -> int:
    return weight.operator.axis or 0


def _joint_like(weight: Weight, tensor: torch.Tensor, share: Share, config: ModelConfig) -> torch.Tensor:
    """The joint tensor as if every process's share were this one: right in everything but its values."""
    return torch.cat([weight.operator.unflatten(tensor, config)] * share.parts, dim=_axis(weight))


def _tensors(
    mapping: Mapping[str, Weight], announced: list[dict[str, Share]], config: ModelConfig
) -> list[list[TensorLike]]:
    """What the file will hold of each weight. Raises WeightsError unless the processes together hold all of them."""
    owned = {name: share for shares in announced for name, share in shares.items()}
    if wrong := mapping.keys() ^ owned.keys():
        raise WeightsError(f"the model and its configuration differ in {', '.join(sorted(wrong)[:8])}")
    found = []
    for name, weight in mapping.items():
        share = owned[name]
        like = torch.empty(share.shape, dtype=share.dtype, device="meta")
        parts = weight.operator.part(_joint_like(weight, like, share, config), config)
        found.append(
            [
                TensorLike(name=tensor, dtype=share.dtype, shape=tuple(part.shape))
                for tensor, part in zip(weight.tensors, parts, strict=True)
            ]
        )
    return found


def _collect(weight: Weight, announced: list[dict[str, Share]], local: torch.Tensor | None) -> Parts:
    """On rank 0 the shares of a weight in order, each from the first process that holds it; elsewhere nothing."""
    rank = distributed.get_rank()
    owners: dict[int, int] = {}
    for owner, shares in enumerate(announced):
        if weight.parameter in shares:
            owners.setdefault(shares[weight.parameter].part, owner)
    collected: list[torch.Tensor] = []
    for _, owner in sorted(owners.items()):
        if rank == owner == 0:
            assert local is not None
            collected.append(local)
        elif rank == owner:
            assert local is not None
            distributed.send(local.contiguous(), dst=0)
        elif rank == 0:
            share = announced[owner][weight.parameter]
            received = torch.empty(share.shape, dtype=share.dtype, device=torch.cuda.current_device())
            distributed.recv(received, src=owner)
            collected.append(received)
    return collected
