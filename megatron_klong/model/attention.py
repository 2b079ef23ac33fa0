"""Core attention for Megatron's local layers, on torch's scaled_dot_product_attention: causal, with grouped queries.

In packed rows each window attends within itself only, and nothing is made that grows with the square of the row. Under
context parallelism each process gathers the keys and values of all, in packed rows and in whole sequences alike.
Megatron's own local attention has neither.

Always (tests/integration/model): outputs and gradients are those of the windows one by one.
"""

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed
from torch.nn.functional import scaled_dot_product_attention

from megatron_klong.model.context_parallel import in_order

_BLOCK = 256  # queries at a time where keys precede them


class CausalAttention(MegatronModule):  # type: ignore[misc]  # megatron has no types
    """query [tokens, batch, heads, head_dim], key and value [.., kv_heads, ..] -> [tokens, batch, heads * head_dim].

    Packed rows have no batch dimension: [tokens, heads, head_dim] -> [tokens, heads * head_dim].
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None,
        softmax_scale: float | None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend causally. Raises ValueError for a mask or bias of the caller's, which would go unheeded."""
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("this attention is causal and takes no mask or bias; pass None, or packed rows")
        lengths = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q.diff().tolist()
        if self.cp_group.size() > 1:
            return self._divided(query, key, value, lengths)
        if lengths is not None:
            return self._packed(query, key, value, lengths)
        return self._attend(query, key, value).flatten(2)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[tokens, batch, heads, head_dim] each; the last query sees all keys, each one before sees one fewer."""
        earlier = len(key) - len(query)
        if not earlier:
            return self._attention(query, key, value, None)
        mask = _late_queries(1 << (len(key) - 1).bit_length(), query.dtype, query.device)
        attended = []
        for block in torch.split(query, _BLOCK):
            earlier += len(block)  # now the keys that the last query of the block sees
            seen = mask[: len(block), mask.shape[1] - earlier - _BLOCK + len(block) :][:, :earlier]
            attended.append(self._attention(block, key[:earlier], value[:earlier], seen))
        return torch.cat(attended)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        # torch wants [batch, heads, tokens, head_dim]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
        return attended.permute(2, 0, 1, 3)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        if sum(lengths) != len(query):
            raise ValueError(f"windows of {sum(lengths)} tokens in a row of {len(query)}; count padding as a window")
        windows = zip(*(torch.split(tensor, lengths) for tensor in (query, key, value)), strict=True)
        attended = [self._attend(*(tensor[:, None] for tensor in window)) for window in windows if len(window[0])]
        return torch.cat(attended).flatten(1)

    def _divided(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int] | None
    ) -> torch.Tensor:
        """This process's queries, chunk by chunk, with all keys up to the end of the chunk; see context_parallel."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        packed = lengths is not None
        lengths = lengths or [len(query) * size]
        if sum(lengths) != len(query) * size:
            raise ValueError(
                f"windows of {sum(lengths)} tokens in a row of {len(query) * size}; count padding as a window"
            )
        if packed:
            query, key, value = (tensor[:, None] for tensor in (query, key, value))
        key, value = (in_order(self._gather(tensor), lengths, size=size) for tensor in (key, value))
        queries = iter(torch.split(query, [length // (2 * size) for length in lengths for _ in range(2)]))
        attended = []
        for first, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
            for number in (rank, 2 * size - 1 - rank):
                end = first + (number + 1) * length // (2 * size)
                attended.append(self._attend(next(queries), key[first:end], value[first:end]))
        return torch.cat(attended).flatten(1 if packed else 2)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = _GatherTokens.apply(tensor, self.cp_group)  # type: ignore[no-untyped-call]
        return gathered


@lru_cache(maxsize=32)
def _late_queries(keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[block, keys + block]: a piece of it is the mask of any block of queries that see no more than so many keys.

    Row q is 0 up to column keys + q, and minus infinity from there on. Being shared by blocks, windows and layers (keys
    is a power of two, so that there are few), it is kept for the backward pass once; that is also why it is not of
    booleans, of which torch would make a copy a call.
    """
    mask = torch.full((_BLOCK, keys + _BLOCK), -torch.inf, dtype=dtype, device=device)
    return mask.triu_(keys + 1)


class _GatherTokens(torch.autograd.Function):
    """[tokens, ...] of every process of the group -> [processes * tokens, ...]; its gradients are summed back."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        context.group = group
        gathered = tensor.new_empty((group.size() * len(tensor), *tensor.shape[1:]))
        distributed.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        summed = gradient.new_empty((len(gradient) // context.group.size(), *gradient.shape[1:]))
        distributed.reduce_scatter_tensor(summed, gradient.contiguous(), group=context.group)
        return summed, None
