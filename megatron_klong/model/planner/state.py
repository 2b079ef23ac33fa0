"""Bytes of what a rank holds all the time: weights, gradients, optimizer state, and the KV cache of a server.

As Megatron's DistributedDataParallel and DistributedOptimizer hold them (param_and_grad_buffer.py, param_layout.py,
distrib_optimizer.py): weights and fp32 gradients of all parameters in one buffer each, experts in buffers of their own
(every parameter starts at a multiple of 64 numbers, a buffer ends at a multiple of 128 and of the data-parallel size);
Adam's two moments, and for bf16 weights an fp32 copy of them, of a share of each buffer. Shares are over data and
context parallelism, for experts over the processes that hold the same experts.
"""

import math
from collections import Counter
from dataclasses import dataclass

from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.planner.holdings import Holding
from megatron_klong.model.planner.shapes import ELEMENT_BYTES, Workload

_GRADIENT_BYTES = 4
_MOMENTS_BYTES = 8
_COPY_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """step_bytes: what the update of the weights needs for a moment, once no activations are held any more."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    step_bytes: int


def state(held: Holding, layout: LayoutConfig, work: Workload, *, processes: int) -> State:
    """Of any rank of a stage."""
    dense_copies = processes // (layout.tensor_parallel * layout.pipeline_parallel)
    expert_copies = processes // (layout.expert_parallel * layout.expert_tensor_parallel * layout.pipeline_parallel)
    apart = layout.expert_parallel > 1 or layout.expert_tensor_parallel != layout.tensor_parallel
    groups = [(held.dense, dense_copies), (held.expert, expert_copies)]
    if not apart:
        groups = [(held.dense + held.expert, dense_copies)]
    buffers = [(_padded(sizes, copies), copies) for sizes, copies in groups]
    numbers = sum(size for size, _ in buffers)
    state_bytes = _MOMENTS_BYTES + (_COPY_BYTES if work.precision == "bf16" else 0)
    return State(
        weights_bytes=numbers * ELEMENT_BYTES[work.precision] + 4 * held.fp32_buffers,
        gradients_bytes=numbers * _GRADIENT_BYTES,
        optimizer_bytes=sum(size // copies for size, copies in buffers) * state_bytes,
        # gloo copies the gradients that it sums; NCCL and a fused Adam need nothing of the kind
        step_bytes=_GRADIENT_BYTES * max(size for size, _ in buffers) if work.device == "cpu" else 0,
    )


def _padded(sizes: Counter[int], copies: int) -> int:
    end = math.lcm(copies, 128)
    return -(-sum(-(-size // 64) * 64 * count for size, count in sizes.items()) // end) * end


def kv_cache_bytes(model: ModelConfig, layout: LayoutConfig, *, layers: int, tokens: int, element_bytes: int) -> int:
    """Keys and values of so many tokens, all requests together."""
    width = model.num_key_value_heads // layout.tensor_parallel * model.head_dim
    return 2 * width * layers * element_bytes * tokens
