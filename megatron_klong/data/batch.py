"""One packed row as tensors: what the train step of SFT and of RL is fed.

Example: windows [gMASK a b] (b trained) and [gMASK c] (c trained) in a row of 6 tokens:

    ids           gMASK  a      b      gMASK  c      0
    positions     0      1      2      0      1      0      (padding counts from 0 too)
    labels        a      b      0      c      0      0
    loss_mask     no     yes    no     yes    no     no
    padding_mask  no     no     no     no     no     yes
    cu_seqlens    [0, 3, 5, 6]

With `window_multiple=4`, which context parallelism needs, each window is padded by itself: gMASK a b 0 | gMASK c 0 0.

Always (tests/unit/data/test_batch.py): position t predicts token t + 1 of its own window, so the first token of a
window is predicted by nothing; the labels under the loss mask are the trained tokens of the windows, each once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Protocol

import torch

from megatron_klong.data.packing import padded_length
from megatron_klong.data.shard import WindowTokens


class WindowSource(Protocol):
    """Whatever hands out windows by number: a shard, or several as one."""

    def window(self, number: int) -> WindowTokens: ...


class BatchError(ValueError):
    """Windows that cannot stand in a row; the message names the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Packed rows of one length; `[rows, tokens]` throughout.

    cu_seqlens: where windows begin in the rows laid end to end; padding behind the last one counted as a window of its
    own, so that the last entry is rows * tokens; padding behind each one as part of it. The optional fields are there
    for RL only, and count under the loss mask only.
    """

    ids: torch.Tensor  # [rows, tokens] int64
    positions: torch.Tensor  # [rows, tokens] int64, from 0 in each window
    labels: torch.Tensor  # [rows, tokens] int64, 0 where there is none
    loss_mask: torch.Tensor  # [rows, tokens] bool: whether the label is trained
    groups: torch.Tensor  # [rows, tokens] int64: the group of the window that the label belongs to
    padding_mask: torch.Tensor  # [rows, tokens] bool: True is padding, as in Megatron
    cu_seqlens: torch.Tensor  # [windows + 1] int32
    longest_window_tokens: int
    advantages: torch.Tensor | None = None  # [rows, tokens] float32, of the label
    token_weights: torch.Tensor | None = None  # [rows, tokens] float32, of the label
    rollout_log_probs: torch.Tensor | None = None  # [rows, tokens] float32, of the label, by the engine
    old_log_probs: torch.Tensor | None = None  # [rows, tokens] float32, of the label, by the trainer before the update

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int((~self.padding_mask).sum())

    @property
    def trained_tokens(self) -> int:
        return int(self.loss_mask.sum())

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        return self._with({name: tensor.to(device) for name, tensor in self._tensors()})

    def part(self, positions: torch.Tensor) -> "PackedBatch":
        """Only these of the rows' positions, laid end to end [1, positions]; `cu_seqlens` stays that of the rows."""
        parts = {name: tensor.reshape(1, -1)[:, positions] for name, tensor in self._tensors() if tensor.dim() == 2}
        return self._with(parts)

    def _with(self, tensors: Mapping[str, Any]) -> "PackedBatch":
        return replace(self, **tensors)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                yield field.name, value


def pack(source: WindowSource, row: Sequence[int], *, row_tokens: int, window_multiple: int = 1) -> PackedBatch:
    """The windows of `row` one behind the other, each padded to a multiple of `window_multiple` and all of them to
    `row_tokens`, which is such a multiple too: a batch of one row. Raises BatchError.
    """
    ids = torch.zeros(row_tokens, dtype=torch.int64)
    positions, labels = torch.zeros_like(ids), torch.zeros_like(ids)
    groups = torch.zeros_like(ids)
    loss_mask = torch.zeros(row_tokens, dtype=torch.bool)
    padding_mask = torch.ones_like(loss_mask)
    bounds = [0]
    for number in row:
        window = source.window(number)
        start, stop = bounds[-1], bounds[-1] + len(window.ids)
        end = bounds[-1] + padded_length(len(window.ids), window_multiple)
        if end > row_tokens:
            raise BatchError(f"windows {list(row)} are longer than a row of {row_tokens} tokens; pack them again")
        if window.loss_mask[0]:
            raise BatchError(f"window {number}: its first token is to be trained, but nothing precedes it")
        tokens, trained = torch.from_numpy(window.ids.astype("int64")), torch.from_numpy(window.loss_mask)
        ids[start:stop] = tokens
        positions[start:end] = torch.arange(end - start)
        labels[start : stop - 1] = tokens[1:]
        loss_mask[start : stop - 1] = trained[1:]
        groups[start:end] = window.group
        padding_mask[start:stop] = False
        bounds.append(end)
    if bounds[-1] < row_tokens:
        positions[bounds[-1] :] = torch.arange(row_tokens - bounds[-1])
        bounds.append(row_tokens)
    return PackedBatch(
        ids=ids[None],
        positions=positions[None],
        labels=labels[None],
        loss_mask=loss_mask[None],
        groups=groups[None],
        padding_mask=padding_mask[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        longest_window_tokens=max(stop - start for start, stop in pairwise(bounds)),
    )
