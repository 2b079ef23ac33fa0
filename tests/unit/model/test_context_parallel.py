"""How rows are divided by context parallelism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.model.context_parallel import held_positions, in_order


def test_each_process_holds_an_early_and_a_late_chunk_of_every_window() -> None:
    # windows of 8 and 4 tokens, two processes: chunks of 2 and of 1
    assert held_positions([8, 4], rank=0, size=2).tolist() == [0, 1, 6, 7, 8, 11]
    assert held_positions([8, 4], rank=1, size=2).tolist() == [2, 3, 4, 5, 9, 10]


@given(size=st.integers(1, 4), chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_every_position_is_held_once_and_comes_back_in_order(size: int, chunks: list[int]) -> None:
    lengths = [2 * size * chunk for chunk in chunks]
    held = [held_positions(lengths, rank=rank, size=size) for rank in range(size)]
    assert {len(one) for one in held} == {sum(lengths) // size}
    row = torch.arange(sum(lengths))
    assert torch.equal(torch.cat(held).sort().values, row)
    assert torch.equal(in_order(torch.cat(held), lengths, size=size), row)


def test_a_window_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="a window of 6 tokens is no multiple of 2 \\* context_parallel 2"):
        held_positions([8, 6], rank=0, size=2)
