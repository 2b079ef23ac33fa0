"""Which rows are trained at which step: sources -> one endless, seeded order of packed rows that any process can enter.

A round is as many trained tokens as the sources have together. In each round a source is passed through as often as its
share says: without weights exactly once, at twice its own share twice. Its windows come in a new order at every pass,
and one round goes on where the last one stopped. The windows of a round, of all sources, are then packed by best fit
and the rows shuffled, so a row may hold several sources.

Position n of the order is one integer, whatever the number of processes, and a step may lie across two rounds.

Always (tests/unit/data/test_blend.py): each pass through a source holds each of its windows once; the trained tokens
of the rounds so far are shared as the weights say, to within one window a source; all processes see the same rows.
Imports no torch until a batch is made. Not for several threads at once: the round in use is remembered.
"""

import hashlib
import json
import math
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_klong.data.packing import Row, pack_rows
from megatron_klong.data.shard import ShardError, WindowTokens
from megatron_klong.data.sources import Source

if TYPE_CHECKING:
    from megatron_klong.data.batch import PackedBatch

_VERSION = 1  # of the order; another one is another fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The windows of a source that are trained, or held out; weight: None for its own size."""

    name: str
    source: Source
    windows: NDArray[np.int64]
    weight: float | None = None

    @property
    def trained_tokens(self) -> int:
        return int(self.source.trained_tokens[self.windows].sum())


class Blend:
    """The packed rows of a run and their order. Windows are numbered through all parts, groups two by two.

    groups: of each part the windows before its transcripts' first cut, then those behind.
    """

    def __init__(self, parts: Sequence[Part], *, row_tokens: int, seed: int, window_multiple: int = 1) -> None:
        """Raises ShardError for a part without trained tokens, PackingError for a window longer than a row."""
        for part in parts:
            if not part.trained_tokens:
                raise ShardError(
                    f"source {part.name}: nothing in it is to be trained, or all of its tasks are held out; leave it "
                    "out, or lower validation_share"
                )
        self.parts = tuple(parts)
        self.row_tokens = row_tokens
        self.window_multiple = window_multiple
        self._seed = seed
        self._first = np.cumsum([0, *(len(part.windows) for part in parts)])
        self.lengths_tokens = self._column([part.source.lengths_tokens for part in parts])
        self.prefix_tokens = self._column([part.source.prefix_tokens for part in parts])
        self.trained_tokens = self._column([part.source.trained_tokens for part in parts])
        self.groups = np.repeat(2 * np.arange(len(parts)), np.diff(self._first))
        self.groups = self.groups + self._column([part.source.continuation for part in parts])
        self.epochs_a_round = _epochs_a_round(parts)
        self._packed: tuple[NDArray[np.int64], list[Row]] = (np.empty(0, np.int64), [])
        self._starts = [0]  # position of each round's first row, as far as known
        self._round: tuple[int, list[Row]] = (-1, [])

    def _column(self, columns: Sequence[NDArray[np.generic]]) -> NDArray[np.int64]:
        chosen = [column[part.windows] for column, part in zip(columns, self.parts, strict=True)]
        return np.concatenate(chosen).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def group_count(self) -> int:
        return 2 * len(self.parts)

    @property
    def fingerprint(self) -> str:
        """Two runs with the same one see the same rows in the same order."""
        sources = [
            (part.name, part.source.fingerprint, zlib.crc32(part.windows.tobytes()), epochs)
            for part, epochs in zip(self.parts, self.epochs_a_round, strict=True)
        ]
        content = (_VERSION, sources, self.row_tokens, self.window_multiple, self._seed)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def window(self, number: int) -> WindowTokens:
        """One window."""
        part = int(np.searchsorted(self._first, number, side="right")) - 1
        chosen = self.parts[part]
        window = chosen.source.window(int(chosen.windows[number - int(self._first[part])]))
        return replace(window, group=int(self.groups[number]))

    def rows_of(self, number: int) -> list[Row]:
        """The rows of one round, in order."""
        if self._round[0] != number:
            windows = self._windows_of(number)
            if not np.array_equal(windows, self._packed[0]):
                lengths = self.lengths_tokens[windows].tolist()
                rows = pack_rows(lengths, row_tokens=self.row_tokens, window_multiple=self.window_multiple)
                self._packed = windows, [tuple(windows[list(row)].tolist()) for row in rows]
            rows = self._packed[1]
            order = np.random.default_rng([self._seed, number]).permutation(len(rows))
            self._round = number, [rows[place] for place in order]
        return self._round[1]

    def _windows_of(self, number: int) -> NDArray[np.int64]:
        found = []
        for part, first, epochs in zip(self.parts, self._first, self.epochs_a_round, strict=False):
            start, stop = epochs * number, epochs * (number + 1)
            for epoch in range(math.floor(start), math.ceil(stop)):
                order, place = self._pass(part, epoch)
                found.append(first + order[(place >= start) & (place < stop)])
        return np.sort(np.concatenate(found))

    def _pass(self, part: Part, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The order of a part's windows in one pass, and where in it each one's middle lies, in passes so far."""
        random = np.random.default_rng([self._seed, zlib.crc32(part.name.encode()), epoch])
        order = random.permutation(len(part.windows))
        tokens = np.maximum(part.source.trained_tokens[part.windows][order], 1)
        behind = np.cumsum(tokens)
        return order, epoch + (behind - tokens / 2) / behind[-1]

    def row_at(self, position: int) -> Row:
        """The windows of the row at one position of the order."""
        while position >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self.rows_of(len(self._starts) - 1)))
        number = bisect_right(self._starts, position) - 1
        return self.rows_of(number)[position - self._starts[number]]

    def positions_of(self, rounds: float) -> int:
        """How many rows so many rounds have."""
        whole = math.floor(rounds)
        rows = sum(len(self.rows_of(number)) for number in range(whole))
        return rows + math.ceil((rounds - whole) * len(self.rows_of(whole))) if rounds > whole else rows

    def batches(self, rows: Sequence[Row], *, part: int, parts: int) -> "list[PackedBatch]":
        """What process `part` of `parts` gets of these rows; a batch a row."""
        from megatron_klong.data.batch import pack

        if len(rows) % parts:
            raise ValueError(f"{len(rows)} rows cannot be shared by {parts} data-parallel processes")
        share = len(rows) // parts
        mine = rows[part * share : (part + 1) * share]
        return [pack(self, row, row_tokens=self.row_tokens, window_multiple=self.window_multiple) for row in mine]


def _epochs_a_round(parts: Sequence[Part]) -> tuple[float, ...]:
    """How often a round passes through each part."""
    weights = [part.weight for part in parts]
    if all(weight is None for weight in weights):
        return (1.0,) * len(parts)
    given = [weight or 0.0 for weight in weights]
    tokens = [part.trained_tokens for part in parts]
    return tuple(weight / sum(given) * sum(tokens) / size for weight, size in zip(given, tokens, strict=True))
