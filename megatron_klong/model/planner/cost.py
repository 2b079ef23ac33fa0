"""What a layout costs in time, roughly: only to rank layouts that fit. Nothing here was measured.

Seconds a step on each GPU, by the volume that goes over NVLink inside a node of 8 or over the network between nodes:
sums of tensor parallelism (Korthikanti et al., arXiv 2205.05198), tokens to experts and back, keys and values of the
context-parallel ring, gradients and weights of data parallelism; the bubble of the pipeline (Narayanan et al., arXiv
2104.04473) and how uneven its stages are; and what is computed twice. Overlap of communication with computation is left
out, so the figures are high.
"""

import math
from dataclasses import dataclass

from megatron_klong.model.flops import mlp_weights_a_token, training_flops
from megatron_klong.model.planner.plan import Plan
from megatron_klong.model.planner.shapes import ELEMENT_BYTES

_NODE_GPUS = 8
_INSIDE_BYTES_PER_SECOND = 400e9
_BETWEEN_BYTES_PER_SECOND = 40e9
_SMALLER_MATRICES = 0.03  # a doubling of tensor parallelism: a preference, since halved matrices are computed slower
_FLOPS_PER_SECOND = 400e12  # 40 % of an H100's or H200's peak in bf16


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Shares of the time that computing once takes: 0.25 is a quarter of it on top."""

    tensor: float
    experts: float
    context: float
    data: float
    bubble: float
    recompute: float

    @property
    def overhead(self) -> float:
        return self.tensor + self.experts + self.context + self.data + self.bubble + self.recompute


def cost(plan: Plan) -> Cost:
    """Of one train step."""
    model, layout, work = plan.model, plan.layout, plan.work
    element, layers = ELEMENT_BYTES[work.precision], model.num_hidden_layers
    with_experts = layers - model.first_k_dense_replace
    tensor, experts, context = layout.tensor_parallel, layout.expert_parallel, layout.context_parallel
    # of one micro-batch on one GPU: its part of the row, its part of the layers
    tokens = work.row_tokens / (tensor * context)
    share = tokens / layout.pipeline_parallel
    once = share * _flops_per_token(plan) / _FLOPS_PER_SECOND
    hidden = model.hidden_size * element
    # a gather and a scatter before and after attention and MLP, forward and (one gather more each) backward
    tensor_seconds = 10 * layers * share * (tensor - 1) * hidden / _speed(tensor)
    sent = share * model.num_experts_per_tok * hidden * (experts - 1) / experts * layout.expert_tensor_parallel
    expert_seconds = 4 * with_experts * sent / _speed(experts * layout.expert_tensor_parallel)
    keys = 2 * model.num_key_value_heads / tensor * model.head_dim * element
    ring = layers / layout.pipeline_parallel * work.row_tokens / context * keys * (context - 1)
    gradients = max(stage.weights_bytes / element * (4 + element) for stage in plan.stages)
    again = {"none": 0.0, "mlp": _mlp_share(plan) / 3, "full": 1 / 3}[work.recompute]
    return Cost(
        tensor=tensor_seconds / once + _SMALLER_MATRICES * math.log2(tensor),
        experts=expert_seconds / once,
        context=3 * ring / _speed(tensor * context) / once,
        data=gradients / _BETWEEN_BYTES_PER_SECOND / (once * work.micro_batches),
        bubble=(layout.pipeline_parallel - 1) / (work.micro_batches * layout.virtual_pipeline_parallel)
        + _unevenness(plan),
        recompute=again,
    )


def _unevenness(plan: Plan) -> float:
    """How much longer the longest stage takes than an even share; loss and next-token layer count as a layer each."""
    layers = [stage.layers for stage in plan.stages]
    layers[-1] += 1 + plan.model.num_nextn_predict_layers
    return max(layers) * len(layers) / sum(layers) - 1


def _speed(group: int) -> float:
    """Of a group of so many neighbours."""
    return _INSIDE_BYTES_PER_SECOND if group <= _NODE_GPUS else _BETWEEN_BYTES_PER_SECOND


def _flops_per_token(plan: Plan) -> float:
    """Forward and backward, with one window a row."""
    return training_flops(plan.model, [plan.work.row_tokens]) / plan.work.row_tokens


def _mlp_share(plan: Plan) -> float:
    return 6 * mlp_weights_a_token(plan.model) / _flops_per_token(plan)
