"""Attention over the paged cache on a CPU, for all requests of a step: flash-attn, which Megatron calls, needs a GPU.

A step's tokens lie one request after the other. Where each of them is written, and which places of the cache each
request reads, is the same in all layers, so it is worked out once a step (`PagedStep`). Requests of which one token is
read, most of them, are attended to at once, padded to similar lengths; the others, one after the other.

Always: what pads a request is a place of its own, so that nothing is read that nobody wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_SMALL = 4096  # places: padding of fewer is not worth a call


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ones:
    """Requests with one token in this step. tokens: which of the step's; None: all of them, in order."""

    tokens: torch.Tensor | None
    places: torch.Tensor  # [requests * longest]
    mask: torch.Tensor  # [requests, 1, 1, longest]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Several:
    """A request with several tokens in this step. places: of all it can see; None: these tokens are all there is."""

    tokens: slice
    places: torch.Tensor | None
    mask: torch.Tensor | None


class PagedStep:
    """One step of Megatron's engine, after `initialize_attention_state`. frequencies: of its rotary embedding."""

    def __init__(self, context: Any, frequencies: torch.Tensor) -> None:
        tokens, view = context.padded_active_token_count, context.gpu_view
        self._context = context
        self._cache = context.memory_buffer.flatten(2, 3)  # [keys or values, layer, place, head, dimension]
        self._written = view.token_to_block_idx[:tokens].long() * context.block_size_tokens
        self._written += view.token_to_local_position_within_kv_block[:tokens]
        angles = frequencies[view.token_to_pos_ids[:tokens]]  # [token, 1, 1, dimension]
        self._cos, sin = angles.cos(), angles.sin()
        self._half = sin.shape[-1] // 2
        self._sin = torch.cat([-sin[..., : self._half], sin[..., self._half :]], -1)
        self._parts = _parts(context)

    def rotate(self, heads: torch.Tensor) -> None:
        """Turn queries or keys [token, group, head, dimension] in place: x cos + rotate_half(x) sin."""
        turned = heads[..., : self._cos.shape[-1]]
        turned.copy_(torch.addcmul(turned * self._cos, turned.roll(self._half, -1), self._sin))

    def attend(self, layer: int, query: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        """Write keys and values `pair` [2, token, group, dimension] to the cache and attend to all before.

        layer: counted from 1 among those of this process.  query: [token, group, head, dimension], as is what comes.
        """
        cache = self._cache[:, self._context.layer_map[layer - 1]].unbind()
        for side, new in zip(cache, pair, strict=True):
            side.index_copy_(0, self._written, new)
        if len(self._parts) == 1 and isinstance(only := self._parts[0], _Ones) and only.tokens is None:
            return _attend_ones(only, query, cache)
        found = torch.zeros(query.shape, dtype=query.dtype)
        for part in self._parts:
            if isinstance(part, _Several):
                found[part.tokens] = _attend_several(part, query[part.tokens], pair[:, part.tokens], cache)
            elif part.tokens is None:
                found = _attend_ones(part, query, cache)
            else:
                found[part.tokens] = _attend_ones(part, query[part.tokens], cache)
        return found


def _attend_ones(part: _Ones, query: torch.Tensor, cache: Sequence[torch.Tensor]) -> torch.Tensor:
    """The heads of a group, which share keys, take the place of tokens in torch's attention."""
    key, value = (
        side.index_select(0, part.places).view(len(query), -1, *side.shape[1:]).transpose(1, 2) for side in cache
    )
    return scaled_dot_product_attention(query, key, value, attn_mask=part.mask.to(query.dtype))


def _attend_several(
    part: _Several, query: torch.Tensor, pair: torch.Tensor, cache: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The groups take the place of a batch, in which all heads have the same keys."""
    seen = pair if part.places is None else [side.index_select(0, part.places) for side in cache]
    heads = query.permute(1, 2, 0, 3)  # [group, head, token, dimension]
    key, value = (side.transpose(0, 1)[:, None].expand(-1, heads.shape[1], -1, -1) for side in seen)
    attended = scaled_dot_product_attention(heads, key, value, attn_mask=part.mask, is_causal=part.mask is None)
    return attended.permute(2, 0, 1, 3)


def _parts(context: Any) -> Sequence[_Ones | _Several]:
    state = context.active_attn_metadata["mha_metadata"].state_data
    lengths = state["kv_seq_lengths"].tolist()
    ones: list[tuple[int, int, int]] = []  # length, request, token
    several: list[_Ones | _Several] = []
    first = 0
    for request, (count, length) in enumerate(zip(state["query_lengths"].tolist(), lengths, strict=True)):
        if count == 1 and length:
            ones.append((length, request, first))
        elif count and length:
            places = None
            mask = None
            if length > count:
                places = _places(context, state["block_table"][request : request + 1], length)[0]
                mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            several.append(_Several(tokens=slice(first, first + count), places=places, mask=mask))
        first += count
    if not ones:
        return several
    if not several and _alike(ones):
        return [_ones(context, state["block_table"], ones, alone=len(ones) == first == len(lengths))]
    ones.sort(reverse=True)
    start = 0
    for end in range(1, len(ones) + 1):
        if end == len(ones) or not _alike(ones[start : end + 1]):
            several.append(_ones(context, state["block_table"], ones[start:end], alone=False))
            start = end
    return several


def _alike(ones: Sequence[tuple[int, int, int]]) -> bool:
    """Whether little is padding."""
    lengths = [length for length, _, _ in ones]
    return max(lengths) * len(lengths) <= 2 * sum(lengths) + _SMALL


def _ones(context: Any, table: torch.Tensor, ones: Sequence[tuple[int, int, int]], *, alone: bool) -> _Ones:
    longest = max(length for length, _, _ in ones)
    rows = table if alone else table[[request for _, request, _ in ones]]
    places = _places(context, rows, longest)
    unseen = torch.arange(longest) >= torch.tensor([[length] for length, _, _ in ones])
    return _Ones(
        tokens=None if alone else torch.tensor([token for _, _, token in ones]),
        places=torch.where(unseen, places[:, :1], places).flatten(),
        mask=torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None, None],
    )


def _places(context: Any, table: torch.Tensor, longest: int) -> torch.Tensor:
    """[request, place] in the cache of the first so many tokens of requests; of shorter ones, anything at the end."""
    size = context.block_size_tokens
    first: torch.Tensor = table[:, : -(-longest // size)].long() * size
    return (first[:, :, None] + torch.arange(size)).flatten(1)[:, :longest]
