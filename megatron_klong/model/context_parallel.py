"""Which tokens of a row each context-parallel process holds, and the row put together again.

Each window is divided into 2n chunks of one length; process r of n holds chunk r and chunk 2n - 1 - r of every window,
so that each has the same share of the work of causal attention. Transformer Engine divides packed rows the same way.

Example: windows of 8 and 4 tokens, n = 2

    position   0  1  2  3  4  5  6  7 |  8  9 10 11
    process    0  0  1  1  1  1  0  0 |  0  1  1  0

Always (tests/unit/model/test_context_parallel.py): every position is held by one process; each process holds as many.
"""

from collections.abc import Sequence

import torch


def held_positions(lengths_tokens: Sequence[int], *, rank: int, size: int) -> torch.Tensor:
    """Positions in the row [tokens / size] that process `rank` of `size` holds, in its order. Raises ValueError."""
    held: list[torch.Tensor] = []
    start = 0
    for length in lengths_tokens:
        chunk = _chunk(length, size)
        for number in (rank, 2 * size - 1 - rank):
            held.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(held)


def in_order(gathered: torch.Tensor, lengths_tokens: Sequence[int], *, size: int) -> torch.Tensor:
    """[tokens, ...] as all processes hold them, laid end to end -> the same in the order of the row."""
    held = torch.cat([held_positions(lengths_tokens, rank=rank, size=size) for rank in range(size)])
    places = torch.empty_like(held)
    places[held] = torch.arange(len(held))
    return gathered.index_select(0, places.to(gathered.device))


def _chunk(length: int, size: int) -> int:
    if length % (2 * size):
        raise ValueError(f"a window of {length} tokens is no multiple of 2 * context_parallel {size}; pad it")
    return length // (2 * size)
