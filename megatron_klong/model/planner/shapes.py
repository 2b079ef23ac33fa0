"""How large what one process computes on is: model, layout and a row of tokens -> rows and widths of its tensors."""

from dataclasses import dataclass
from typing import Literal

from megatron_klong.model.config import LayoutConfig, ModelConfig, Precision, Recompute

type Device = Literal["cpu", "gpu"]
"""cpu: torch's own kernels and gloo. gpu: Transformer Engine's kernels and NCCL."""

ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}


MASK_ROWS = 256
"""Queries that model/attention.py attends at once where they have a mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What a train step is fed and how it computes.

    row_tokens: of one micro-batch, which is one packed row, before it is divided. windows_per_row: all of one length;
    they matter for attention masks on a CPU only. expert_imbalance: rows that a process's experts get over the rows
    they would get if all were chosen equally often.
    """

    row_tokens: int
    windows_per_row: int = 1
    micro_batches: int = 8
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    expert_imbalance: float = 1.0
    device: Device = "gpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Of one process. tokens: its part of a row; slice_tokens: what it holds of them between layers."""

    device: Device
    element_bytes: int
    tokens: int
    slice_tokens: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    rotated: int
    attention_bias: bool
    query_key_norm: bool
    dense: int  # width of a dense layer here
    shared: int  # of the shared expert
    expert: int  # of one routed expert
    experts: int  # of the model
    local_experts: int
    chosen: int  # experts a token
    expert_imbalance: float
    vocabulary: int
    tensor_parallel: int
    expert_parallel: int
    expert_tensor_parallel: int
    context_parallel: int
    masks_bytes: int  # of attention under context parallelism on a CPU

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Of keys alone, and of values alone."""
        return self.key_value_heads * self.head_dim

    @property
    def slice_bytes(self) -> int:
        """Hidden states between layers."""
        return self.slice_tokens * self.hidden * self.element_bytes

    @property
    def full_bytes(self) -> int:
        """Hidden states inside attention and MLP, where each tensor-parallel process has all tokens."""
        return self.tokens * self.hidden * self.element_bytes

    @property
    def sent_rows(self) -> int:
        """Tokens of this process, once for each expert they go to."""
        return self.slice_tokens * self.chosen

    @property
    def received_rows(self) -> int:
        """What the other expert-parallel processes send here."""
        return round(self.sent_rows * self.expert_imbalance)

    @property
    def expert_rows(self) -> int:
        """What the experts here compute on: those that divide them by tensor parallelism share their rows."""
        return self.received_rows * self.expert_tensor_parallel

    @property
    def exact(self) -> bool:
        """Whether activations are fp32 like everything else."""
        return self.element_bytes == 4


def shapes(model: ModelConfig, layout: LayoutConfig, work: Workload) -> Shapes:
    """Rounded up where a row cannot be divided evenly."""
    tensor, expert_tensor = layout.tensor_parallel, layout.expert_tensor_parallel
    tokens = -(-work.row_tokens // layout.context_parallel)
    return Shapes(
        device=work.device,
        element_bytes=ELEMENT_BYTES[work.precision],
        tokens=tokens,
        slice_tokens=-(-tokens // tensor),
        hidden=model.hidden_size,
        heads=model.num_attention_heads // tensor,
        key_value_heads=model.num_key_value_heads // tensor,
        head_dim=model.head_dim,
        rotated=round(model.head_dim * model.partial_rotary_factor),
        attention_bias=model.attention_bias,
        query_key_norm=model.use_qk_norm,
        dense=model.intermediate_size // tensor,
        shared=model.moe_intermediate_size * model.n_shared_experts // tensor,
        expert=model.moe_intermediate_size // expert_tensor,
        experts=model.n_routed_experts,
        local_experts=model.n_routed_experts // layout.expert_parallel,
        chosen=model.num_experts_per_tok,
        expert_imbalance=work.expert_imbalance,
        vocabulary=model.vocab_size // tensor,
        tensor_parallel=tensor,
        expert_parallel=layout.expert_parallel,
        expert_tensor_parallel=expert_tensor,
        context_parallel=layout.context_parallel,
        masks_bytes=_masks_bytes(layout, work),
    )


def _masks_bytes(layout: LayoutConfig, work: Workload) -> int:
    """For the two chunks that a process holds of each window; all layers share them (model/attention.py).

    On the process whose first chunk has keys before it: on the first one it needs no mask.
    """
    chunk = work.row_tokens // (2 * layout.context_parallel * work.windows_per_row)
    ends = (layout.context_parallel * chunk, (layout.context_parallel + 1) * chunk)
    columns = sum(keys + MASK_ROWS for keys in {1 << (end - 1).bit_length() for end in ends})
    return MASK_ROWS * columns * ELEMENT_BYTES[work.precision] if layout.context_parallel > 1 else 0
