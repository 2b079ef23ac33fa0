"""Let Megatron-Core's dynamic inference engine run without CUDA: what model/cpu.py does, for serving.

Attention over the paged cache gets plain versions on torch's own attention (exact, one request after the other); where
tensors are placed and pinned is model/cpu.py's affair. With CUDA, `install` does nothing.
"""

from collections import defaultdict
from typing import Any

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import torch
from megatron.core.inference import communication_utils
from megatron.core.inference.contexts import dynamic_context
from megatron.core.transformer import attention
from torch.nn.functional import scaled_dot_product_attention

_SMALL = 4096  # tokens: fewer than these are not worth a loop over requests

_installed = False


def install() -> None:
    """Redirect everything, once; a no-op where CUDA is available."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _memory_figures()
    _attention()
    _cache_writes()
    _stages()
    _rounding()


def _memory_figures() -> None:
    """The engine reports how much device memory it took."""
    torch.cuda.memory_stats = lambda device=None: defaultdict(int)


def _attention() -> None:
    """flash-attn has no CPU version; without one of its functions the engine refuses to start."""
    attention.flash_attn_varlen_func = _varlen_attention
    attention.flash_attn_with_kvcache = _decode_attention
    attention.is_fa_min_version = lambda version: True


def _cache_writes() -> None:
    """triton can be imported next to a CUDA build of torch, and then a kernel of its would be taken."""
    dynamic_context.triton_append_key_value_cache = None


def _stages() -> None:
    """What stages of a pipeline exchange is checked to be on the device."""
    communication_utils._is_cuda = lambda tensor: None


def _rounding() -> None:
    """Steps are filled up to a multiple of 64 tokens, for CUDA graphs and kernels; here that is only work."""
    dynamic_context.DynamicInferenceContext.TOKEN_ROUNDER = 1


def _varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *lengths: Any,
    softmax_scale: float | None = None,
    block_table: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Several queries a request, over its blocks: flash_attn_varlen_func with a block table."""
    result = torch.zeros_like(q)
    queries, keys = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    if len(decoding := ((queries == 1) & (keys > 0)).nonzero()[:, 0]):
        places = cu_seqlens_q[decoding].long()
        result[places] = _one_query_each(
            q[places][:, None], k, v, keys[decoding], block_table[decoding], softmax_scale
        )[:, 0]
    for request in ((queries > 1) & (keys > 0)).nonzero()[:, 0].tolist():
        start, end, length = int(cu_seqlens_q[request]), int(cu_seqlens_q[request + 1]), int(keys[request])
        blocks = block_table[request]
        result[start:end] = _attend(q[start:end], _gather(k, blocks, length), _gather(v, blocks, length), softmax_scale)
    return result


def _decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """One query a request (or a few, of one number): flash_attn_with_kvcache with a block table."""
    result = torch.zeros_like(q)
    real = (cache_seqlens[: q.shape[0]] > 0).nonzero()[:, 0]  # others only fill up the batch
    result[real] = _one_query_each(q[real], k_cache, v_cache, cache_seqlens[real], block_table[real], softmax_scale)
    return result


def _one_query_each(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, blocks: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """q: [request, token, head, dimension], the last tokens of requests of such lengths."""
    if not len(q):  # only others filled the batch
        return q
    if len(q) * int(lengths.max()) <= 4 * int(lengths.sum()) + _SMALL:  # little of it is padding
        return _attend_all(q, k, v, lengths, blocks, scale)
    found = [
        _attend(one, _gather(k, own, length), _gather(v, own, length), scale)
        for one, own, length in zip(q, blocks, lengths.tolist(), strict=True)
    ]
    return torch.stack(found)


def _attend_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, blocks: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """All at once, padded to the longest."""
    longest = int(lengths.max())
    used = blocks[:, : -(-longest // k.shape[1])].long().clamp(min=0)
    keys, values = (cache[used].flatten(1, 2)[:, :longest] for cache in (k, v))
    last_seen = lengths[:, None] + torch.arange(1 - q.shape[1], 1)  # [request, token]
    mask = torch.arange(longest) < last_seen[:, None, :, None]
    query, key, value = (part.transpose(1, 2) for part in (q, keys, values))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, tokens: int) -> torch.Tensor:
    """[block, place, head, dimension] -> [token, head, dimension] of one request."""
    used = blocks[: -(-tokens // cache.shape[1])].long()
    return cache[used].flatten(0, 1)[:tokens]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Causal attention of the last tokens to all; [token, head, dimension]."""
    mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    query, key, value = (part.transpose(0, 1)[None] for part in (q, k, v))
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)
