"""Packed rows as tensors: who predicts whom, and that trained tokens neither vanish nor cross a boundary."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.data.batch import BatchError, pack
from megatron_klong.data.packing import pack_rows
from megatron_klong.data.shard import WindowTokens


@dataclass
class Windows:
    """Windows given as lists of (id, trained)."""

    made: list[list[tuple[int, bool]]]

    def window(self, number: int) -> WindowTokens:
        ids, trained = zip(*self.made[number], strict=True)
        return WindowTokens(ids=np.array(ids, dtype=np.int32), loss_mask=np.array(trained), new_start=0)


def test_a_row_of_two_windows_and_padding() -> None:
    batch = pack(Windows([[(9, False), (1, False), (2, True)], [(9, False), (3, True)]]), (0, 1), row_tokens=7)
    assert batch.ids.tolist() == [[9, 1, 2, 9, 3, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.labels.tolist() == [[1, 2, 0, 3, 0, 0, 0]]
    # the last token of the first window does not predict the 9 that begins the second
    assert batch.loss_mask.tolist() == [[False, True, False, True, False, False, False]]
    assert batch.padding_mask.tolist() == [[False] * 5 + [True] * 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 7]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.tokens, batch.trained_tokens, batch.longest_window_tokens) == (5, 2, 3)


def test_a_full_row_has_no_padding_window() -> None:
    batch = pack(Windows([[(9, False), (1, True)]]), (0,), row_tokens=2)
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert not batch.padding_mask.any()


windows = st.lists(
    st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=12).map(
        lambda tokens: [(tokens[0][0], False), *tokens[1:]]
    ),
    min_size=1,
    max_size=12,
)


@given(windows)
def test_the_trained_labels_are_the_trained_tokens_of_the_windows(made: list[list[tuple[int, bool]]]) -> None:
    rows = pack_rows([len(window) for window in made], row_tokens=16)
    batches = [pack(Windows(made), row, row_tokens=16) for row in rows]
    packed = [label for batch in batches for label in batch.labels[batch.loss_mask].tolist()]
    assert sorted(packed) == sorted(token for window in made for token, trained in window if trained)
    assert sum(batch.tokens for batch in batches) == sum(map(len, made))
    for batch in batches:
        assert batch.positions[0, batch.cu_seqlens[:-1].long()].eq(0).all()
        assert not batch.loss_mask[0, batch.cu_seqlens[1:].long() - 1].any()


def test_a_trained_first_token_is_an_error_not_a_silent_loss() -> None:
    with pytest.raises(BatchError, match="window 1: its first token is to be trained"):
        pack(Windows([[(9, False)], [(9, True)]]), (0, 1), row_tokens=4)


def test_a_row_that_is_too_long_is_an_error() -> None:
    with pytest.raises(BatchError, match=r"windows \[0, 0\] are longer than a row of 3"):
        pack(Windows([[(9, False), (1, True)]]), (0, 0), row_tokens=3)


def test_windows_are_padded_one_by_one_where_each_is_to_be_divided() -> None:
    source = Windows([[(9, False), (1, False), (2, True)], [(9, False), (3, True)]])
    batch = pack(source, (0, 1), row_tokens=12, window_multiple=4)
    # window     0  0  0  .  1  1  .  .  | padding
    assert batch.ids.tolist() == [[9, 1, 2, 0, 9, 3, 0, 0, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.padding_mask.int().tolist() == [[0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert (batch.tokens, batch.trained_tokens, batch.longest_window_tokens) == (5, 2, 4)


def test_a_part_of_a_batch_keeps_the_bounds_of_the_whole() -> None:
    batch = pack(Windows([[(9, False), (1, True), (2, True)]]), (0,), row_tokens=4, window_multiple=4)
    part = batch.part(torch.tensor([0, 3]))
    assert (part.ids.tolist(), part.labels.tolist(), part.loss_mask.tolist()) == ([[9, 0]], [[1, 0]], [[True, False]])
    assert part.cu_seqlens.tolist() == [0, 4]
    assert part.advantages is None
