"""Which tensors of a Hugging Face checkpoint make up which parameter of the model, declared once as a table.

Each rule joins tensors of the file into one parameter with a small operator that can be undone: nothing (plain), gate
and up projection one above the other (glu), queries, keys and values interleaved by group (qkv), or several copies of
one tensor (copies). Names of the file are those of the published GLM-4.5 checkpoints, with one tensor per expert. Their
layer for multi-token prediction follows the last ordinary one by number and, in GLM-4.5 but not in GLM-4.6, brings
copies of the embedding and of the output layer.

Names of parameters here count layers and experts over the whole model, whatever this process holds of it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_klong.model.config import ModelConfig

type Parts = Sequence[torch.Tensor]


class WeightsError(ValueError):
    """Weights that do not fit the model; the message names the folder and the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """How tensors of the file become one parameter; all three functions rearrange, none computes.

    join: tensors of the file -> one tensor that `axis` divides evenly among processes; None: each has all of it.
    part: undoes `join`.  unflatten: a process's share of that, from the shape of its parameter back to the joint's.
    """

    axis: int | None
    join: Callable[[Parts, ModelConfig], torch.Tensor]
    part: Callable[[torch.Tensor, ModelConfig], Parts]
    unflatten: Callable[[torch.Tensor, ModelConfig], torch.Tensor]


def _plain(axis: int | None) -> Operator:
    return Operator(
        axis=axis,
        join=lambda parts, config: parts[0],
        part=lambda joint, config: [joint],
        unflatten=lambda share, config: share,
    )


def _split_rows(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups * rows, ...] -> [groups, rows, ...]"""
    return tensor.reshape(groups, len(tensor) // groups, *tensor.shape[1:])


def _queries_per_group(config: ModelConfig) -> int:
    return config.num_attention_heads // config.num_key_value_heads


def _rows_per_group(config: ModelConfig) -> int:
    return (_queries_per_group(config) + 2) * config.head_dim


def _join_qkv(parts: Parts, config: ModelConfig) -> torch.Tensor:
    groups = [_split_rows(part, config.num_key_value_heads) for part in parts]
    return torch.cat(groups, dim=1)  # [kv_heads, (queries per group + 2) * head_dim, ...]


def _part_qkv(joint: torch.Tensor, config: ModelConfig) -> Parts:
    sizes = [_queries_per_group(config) * config.head_dim, config.head_dim, config.head_dim]
    return [part.flatten(0, 1) for part in torch.split(joint, sizes, dim=1)]


def _copies(number: int) -> Operator:
    """Several tensors of the file that are one parameter, divided by rows; `Weight.join` sees to it that they agree."""
    return replace(_plain(0), part=lambda joint, config: [joint] * number)


COPIED = _plain(None)
ROWS = _plain(0)
COLUMNS = _plain(1)
GLU = Operator(
    axis=1,
    join=lambda parts, config: torch.stack(list(parts)),  # [2, width, hidden]
    part=lambda joint, config: joint.unbind(0),
    unflatten=lambda share, config: _split_rows(share, 2),
)
QKV = Operator(
    axis=0,
    join=_join_qkv,
    part=_part_qkv,
    unflatten=lambda share, config: _split_rows(share, len(share) // _rows_per_group(config)),
)


type Table = dict[str, tuple[Operator, tuple[str, ...]]]  # parameter -> tensors

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_ONCE: Table = {
    _EMBEDDING: (ROWS, ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": (COPIED, ("model.norm.weight",)),
    _OUTPUT: (ROWS, ("lm_head.weight",)),
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_EVERY_LAYER: Table = {
    "input_layernorm.weight": (COPIED, ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": (QKV, tuple(f"{name}.weight" for name in _QKV)),
    "self_attention.linear_proj.weight": (COLUMNS, ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": (COPIED, ("post_attention_layernorm.weight",)),
}
_ATTENTION_BIAS: Table = {"self_attention.linear_qkv.bias": (QKV, tuple(f"{name}.bias" for name in _QKV))}
_QK_NORM: Table = {
    "self_attention.q_layernorm.weight": (COPIED, ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": (COPIED, ("self_attn.k_norm.weight",)),
}
_DENSE: Table = {
    "mlp.linear_fc1.weight": (GLU, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": (COLUMNS, ("mlp.down_proj.weight",)),
}
_SHARED = "mlp.shared_experts"
_MIXTURE: Table = {
    "mlp.router.weight": (COPIED, ("mlp.gate.weight",)),
    "mlp.router.expert_bias": (COPIED, ("mlp.gate.e_score_correction_bias",)),
    f"{_SHARED}.linear_fc1.weight": (GLU, (f"{_SHARED}.gate_proj.weight", f"{_SHARED}.up_proj.weight")),
    f"{_SHARED}.linear_fc2.weight": (COLUMNS, (f"{_SHARED}.down_proj.weight",)),
}
_ONE_EXPERT: Table = {
    "mlp.experts.linear_fc1.weight{expert}": (
        GLU,
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    ),
    "mlp.experts.linear_fc2.weight{expert}": (COLUMNS, ("mlp.experts.{expert}.down_proj.weight",)),
}
# Around the layer that predicts the token after the next one; its copies of the embedding and the output layer.
_NEXT: Table = {
    "enorm.weight": (COPIED, ("enorm.weight",)),
    "hnorm.weight": (COPIED, ("hnorm.weight",)),
    "eh_proj.weight": (ROWS, ("eh_proj.weight",)),
    "final_layernorm.weight": (COPIED, ("shared_head.norm.weight",)),
}
_NEXT_COPIES = {_EMBEDDING: "embed_tokens.weight", _OUTPUT: "shared_head.head.weight"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter (or buffer) of the model. expert: divided by expert-tensor, not by tensor parallelism."""

    parameter: str
    tensors: tuple[str, ...]
    operator: Operator
    expert: bool = False

    def join(self, parts: Parts, config: ModelConfig) -> torch.Tensor:
        """What `operator.join` makes of the tensors. Raises WeightsError for copies that differ."""
        if self.parameter in _NEXT_COPIES:
            for name, part in zip(self.tensors[1:], parts[1:], strict=True):
                if not torch.equal(part, parts[0]):
                    raise WeightsError(
                        f"{name} differs from {self.tensors[0]}: a layer for multi-token prediction with tensors of "
                        "its own there is not implemented; use the weights without that layer"
                    )
        return self.operator.join(parts, config)


def weights(config: ModelConfig, *, copies: bool = True) -> dict[str, Weight]:
    """Every parameter of the model by its name, in the order of the file.

    copies: whether the file has the copies of a layer for multi-token prediction; see `has_copies`.
    """
    found = {weight.parameter: weight for weight in _filled(_ONCE)}
    ordinary = range(config.num_hidden_layers)
    for layer in ordinary:
        found |= _layer(config, layer, f"decoder.layers.{layer}.")
    for number in range(config.num_nextn_predict_layers):
        layer = len(ordinary) + number
        prefix = f"mtp.layers.{number}."
        found |= {weight.parameter: weight for weight in _filled(_NEXT, (prefix, f"model.layers.{layer}."))}
        found |= _layer(config, layer, f"{prefix}mtp_model_layer.")
    if copies and config.num_nextn_predict_layers:
        for parameter in _NEXT_COPIES:
            tensors = (*found[parameter].tensors, *_copies_of(parameter, config))
            found[parameter] = replace(found[parameter], tensors=tensors, operator=_copies(len(tensors)))
    return found


def has_copies(names: Collection[str], config: ModelConfig) -> bool:
    """Whether a file with these tensors has the copies."""
    return any(name in names for parameter in _NEXT_COPIES for name in _copies_of(parameter, config))


def _copies_of(parameter: str, config: ModelConfig) -> list[str]:
    first, number = config.num_hidden_layers, config.num_nextn_predict_layers
    return [f"model.layers.{layer}.{_NEXT_COPIES[parameter]}" for layer in range(first, first + number)]


def _layer(config: ModelConfig, layer: int, prefix: str) -> dict[str, Weight]:
    prefixes = (prefix, f"model.layers.{layer}.")
    dense = layer < config.first_k_dense_replace
    tables = [_EVERY_LAYER, _DENSE if dense else _MIXTURE]
    tables += [_ATTENTION_BIAS] * config.attention_bias + [_QK_NORM] * config.use_qk_norm
    found = [weight for table in tables for weight in _filled(table, prefixes)]
    for expert in range(0 if dense else config.n_routed_experts):
        found += _filled(_ONE_EXPERT, prefixes, expert)
    return {weight.parameter: weight for weight in found}


def _filled(table: Table, prefixes: tuple[str, str] = ("", ""), expert: int | None = None) -> Iterator[Weight]:
    for parameter, (operator, tensors) in table.items():
        yield Weight(
            parameter=prefixes[0] + parameter.format(expert=expert),
            tensors=tuple(prefixes[1] + tensor.format(expert=expert) for tensor in tensors),
            operator=operator,
            expert=expert is not None,
        )
