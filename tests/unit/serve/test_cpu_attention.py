"""Attention over a paged cache: what it gives, for any mixture of requests, and that it reads nothing unwritten."""

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_klong.serve import cpu_attention
from megatron_klong.serve.cpu_attention import PagedStep

GROUPS, HEADS, DIMENSION, SIZE, LAYERS = 2, 3, 8, 4, 2
FREQUENCIES = torch.outer(torch.arange(1000.0), torch.tensor([1.0, 0.1, 1.0, 0.1]))[:, None, None]


def paged(requests: list[tuple[int, int]], keys: list[torch.Tensor]) -> Any:
    """Megatron's context of requests that had so many tokens and get so many more; keys: of all their tokens."""
    free = list(range(400))
    random.Random(0).shuffle(free)
    blocks = torch.full((len(requests), 60), -1, dtype=torch.int32)
    # whoever read what nobody wrote would get nothing but this
    buffer = torch.full((2, LAYERS, len(free), SIZE, GROUPS, DIMENSION), torch.nan)
    block_of, place_of, positions = [], [], []
    for number, (before, count) in enumerate(requests):
        own = [free.pop() for _ in range(-(-(before + count) // SIZE))]
        blocks[number, : len(own)] = torch.tensor(own, dtype=torch.int32)
        for token in range(before):
            buffer[:, 1, own[token // SIZE], token % SIZE] = keys[number][:, token]
        for token in range(before, before + count):
            block_of.append(own[token // SIZE])
            place_of.append(token % SIZE)
            positions.append(token)
    state = {
        "query_lengths": torch.tensor([count for _, count in requests], dtype=torch.int32),
        "kv_seq_lengths": torch.tensor([before + count for before, count in requests], dtype=torch.int32),
        "block_table": blocks,
    }
    return SimpleNamespace(
        padded_active_token_count=len(positions),
        block_size_tokens=SIZE,
        memory_buffer=buffer,
        layer_map={0: 0, 1: 1},
        active_attn_metadata={"mha_metadata": SimpleNamespace(state_data=state)},
        gpu_view=SimpleNamespace(
            token_to_block_idx=torch.tensor(block_of, dtype=torch.int32),
            token_to_local_position_within_kv_block=torch.tensor(place_of, dtype=torch.int32),
            token_to_pos_ids=torch.tensor(positions),
        ),
    )


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[token, group, head, dimension] over [token, group, dimension]: the last queries, each over what is before."""
    scores = torch.einsum("qghd,kgd->ghqk", query, key) * DIMENSION**-0.5
    earlier = len(key) - len(query)
    unseen = torch.ones(len(query), len(key), dtype=torch.bool).triu(earlier + 1)
    return torch.einsum("ghqk,kgd->qghd", scores.masked_fill(unseen, -torch.inf).softmax(-1), value)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([0, 1, 1, 1, 2, 7])), min_size=1, max_size=12).filter(
        lambda requests: any(count for _, count in requests)
    ),
    st.sampled_from([0, 4096]),
)
@example([(200, 1), (0, 1), (1, 1), (2, 1), (90, 1), (150, 1)], 0)  # far apart: several at a time
@example([(3, 1), (0, 9), (0, 0), (4, 9), (7, 1)], 4096)
def test_each_request_attends_to_its_own_tokens_only(requests: list[tuple[int, int]], small: int) -> None:
    # a request without a token in this step only fills up the batch, and holds nothing
    requests = [(before if count else 0, count) for before, count in requests]
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randn(2, before + count, GROUPS, DIMENSION, generator=generator) for before, count in requests]
    queries = [torch.randn(count, GROUPS, HEADS, DIMENSION, generator=generator) for _, count in requests]
    new = torch.cat([pair[:, before:] for pair, (before, _) in zip(pairs, requests, strict=True)], 1)
    context = paged(requests, pairs)
    with patch.object(cpu_attention, "_SMALL", small):
        found = PagedStep(context, FREQUENCIES).attend(2, torch.cat(queries), new)
    expected = torch.cat([plain(query, *pair) for query, pair in zip(queries, pairs, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # what is new is in the cache of this layer, and of no other
    assert int(context.memory_buffer[:, 1].isfinite().sum()) == sum(pair.numel() for pair in pairs)
    assert not context.memory_buffer[:, 0].isfinite().any()


def test_rotation_is_by_halves_and_leaves_what_has_no_frequency() -> None:
    requests = [(3, 2), (11, 1)]
    keys = [torch.zeros(2, before + count, GROUPS, DIMENSION) for before, count in requests]
    heads = torch.randn(3, GROUPS, HEADS, DIMENSION, generator=torch.Generator().manual_seed(2))
    expected = heads.clone()
    for token, position in enumerate((3, 4, 11)):
        for pair, frequency in enumerate((1.0, 0.1)):
            turn = torch.polar(torch.tensor(1.0), torch.tensor(position * frequency))
            turned = torch.complex(heads[token, ..., pair], heads[token, ..., pair + 2]) * turn
            expected[token, ..., pair], expected[token, ..., pair + 2] = turned.real, turned.imag
    PagedStep(paged(requests, keys), FREQUENCIES).rotate(heads)
    torch.testing.assert_close(heads, expected, atol=1e-5, rtol=0)
