"""The decoder of a served model on a CPU: the same products in fewer operations.

Megatron's layers are made for training and for many processes. Where a step reads a few tokens, most of their time on
a CPU goes into what is nothing there: functions for the backward pass, exchanges within a group of one, the rotary
embedding anew in every layer, experts' weights put together for every product. Here the layers' own modules and
weights are used without that. What several processes share (tensor or expert parallelism) is left to Megatron's own
module, so every layout works.

Always (tests/integration/serve): log-probabilities are those of the model as it is trained. With CUDA, nothing changes.
"""

from functools import partial
from typing import Any

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch.nn.functional import grouped_mm, linear, silu

from megatron_klong.serve.cpu_attention import PagedStep


def lighten(model: GPTModel) -> None:
    """Have the engine, which alone may call this model from now on, take the short way; a no-op with CUDA."""
    if torch.cuda.is_available():
        return
    model.decoder.forward = partial(_decoder, model.decoder)
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            for part in (layer.mlp.experts.linear_fc1, layer.mlp.experts.linear_fc2):
                _stacked(part)
    if model.post_process and model.output_layer.tp_group.size() == 1:
        model.output_layer.forward = partial(_output, model.output_layer)


def _decoder(
    decoder: Any, hidden_states: Any, *, inference_context: Any, rotary_pos_emb: torch.Tensor, **_unused: Any
) -> torch.Tensor:
    """[token, 1, hidden_size] in and out, on the first stage of a pipeline wrapped by GPTModel."""
    hidden: torch.Tensor = hidden_states.unwrap() if decoder.pre_process else decoder.input_tensor
    step = PagedStep(inference_context, rotary_pos_emb)
    for number, layer in enumerate(decoder.layers, start=1):
        hidden = hidden + _attention(layer.self_attention, number, layer.input_layernorm(hidden), step)
        normed = layer.pre_mlp_layernorm(hidden)
        hidden += _moe(layer.mlp, normed) if isinstance(layer.mlp, MoELayer) else _mlp(layer.mlp, normed)
    return hidden if decoder.final_layernorm is None else decoder.final_layernorm(hidden)


def _output(
    module: Any, hidden: torch.Tensor, weight: torch.Tensor | None = None, **_unused: Any
) -> tuple[torch.Tensor, None]:
    return linear(hidden, module.weight if weight is None else weight), None


def _linear(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Column- or row-parallel."""
    if module.tp_group.size() > 1:
        return module(hidden)[0]  # type: ignore[no-any-return]
    return linear(hidden, module.weight, module.bias)


def _mlp(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    return _linear(mlp.linear_fc2, _gated(_linear(mlp.linear_fc1, hidden)))


def _gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return silu(gate).mul_(up)


def _attention(attention: Any, layer: int, hidden: torch.Tensor, step: PagedStep) -> torch.Tensor:
    groups, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    # a group of heads lies together: its queries, its key, its value
    heads = attention.num_attention_heads_per_partition // groups + 2
    mixed = _linear(attention.linear_qkv, hidden).view(-1, groups, heads, size)
    query, key = mixed[:, :, :-2], mixed[:, :, -2]
    if attention.q_layernorm is not None:
        query.copy_(attention.q_layernorm(query))
        key.copy_(attention.k_layernorm(key))
    step.rotate(mixed[:, :, :-1])
    attended = step.attend(layer, query, mixed[:, :, -2:].permute(2, 0, 1, 3))
    return _linear(attention.linear_proj, attended.reshape(len(attended), 1, -1))


def _moe(moe: Any, hidden: torch.Tensor) -> torch.Tensor:
    groups = moe.experts.linear_fc1.groups
    if groups.tp.size() > 1 or groups.ep.size() > 1 or groups.expt_tp.size() > 1:
        return moe(hidden)[0]  # type: ignore[no-any-return]
    routed = _experts(moe, hidden.squeeze(1)).unsqueeze(1)
    return routed if moe.shared_experts is None else routed.add_(_mlp(moe.shared_experts, hidden))


def _experts(moe: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[token, hidden_size]: each token through its experts, tokens sorted by expert."""
    weights, chosen = _routed(moe.router, hidden)
    order = chosen.flatten().argsort()
    token = order // chosen.shape[1]
    ends = torch.bincount(chosen.flatten(), minlength=moe.num_local_experts).cumsum(0).to(torch.int32)
    first, second = (_stacked(part).transpose(1, 2) for part in (moe.experts.linear_fc1, moe.experts.linear_fc2))
    inner = _gated(grouped_mm(hidden[token], first, offs=ends))
    inner = (inner * weights.flatten()[order, None]).to(hidden.dtype)
    return torch.zeros_like(hidden).index_add_(0, token, grouped_mm(inner, second, offs=ends))


def _routed(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[token, expert of the token]: weights and numbers."""
    config = router.config
    found: tuple[torch.Tensor, torch.Tensor] = topk_routing_with_score_function(
        linear(hidden.float(), router.weight.float()),
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
        router_replay=router.router_replay,
        dense_output=True,
    )
    return found


def _stacked(experts: Any) -> torch.Tensor:
    """[expert, output, input]: the parameters are made views of one tensor, so whoever writes to them writes to it."""
    parameters = experts._parameters.values()  # weight0, weight1, ..., in this order and nothing else
    stacked: torch.Tensor | None = getattr(experts, "stacked", None)
    if stacked is not None:
        first, size = stacked.data_ptr(), stacked[0].nbytes
        if all(weight.data_ptr() == first + number * size for number, weight in enumerate(parameters)):
            return stacked
    # not of the inference mode of a step, in which nothing could be read into it afterwards
    with torch.inference_mode(False):
        experts.stacked = stacked = torch.stack([weight.detach() for weight in parameters])
        for weight, part in zip(parameters, stacked, strict=True):
            weight.data = part
    return stacked
