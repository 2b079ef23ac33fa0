"""A lesson and its shard -> packed batches with what RL needs beside each token: advantage, weight, log-probability.

Rows are packed for each update by itself, and filled up with empty ones until every data-parallel process has as many.
Always (tests/unit/rl/test_rows.py): each trained token of the update's documents is the label of one place, and there
stand its own advantage, weight and log-probability.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_klong.data.batch import PackedBatch, pack
from megatron_klong.data.packing import Row, pack_rows
from megatron_klong.data.shard import Shard
from megatron_klong.rl.bank import read_contents, read_sampled
from megatron_klong.rl.experience import SHARD, Lesson, Taught, Update, read_lesson
from megatron_klong.rl.sampled import SampledSegment

type LogProbs = Mapping[int, NDArray[np.float32]]  # segment of the document -> [tokens]


class ExperienceRows:
    """The windows of one iteration, as rows for each of its updates."""

    def __init__(self, bank: Path, folder: Path, *, row_tokens: int, window_multiple: int = 1) -> None:
        """`folder`: where `prepare` wrote. Raises ShardError, BankError."""
        self.lesson: Lesson = read_lesson(folder)
        self._shard = Shard(folder / SHARD)
        self._row_tokens, self._window_multiple = row_tokens, window_multiple
        self._documents: NDArray[np.int64] = self._shard.column("document")
        parts = [self._shard.column(f"{part}_tokens") for part in ("prefix", "overlap", "new")]
        self._lengths: NDArray[np.int64] = np.sum(parts, axis=0)
        episodes = read_contents(bank).episodes[self.lesson.iteration]
        taught = {document.document for update in self.lesson.updates for document in update.documents}
        self._log_probs = {
            episode.document: _by_segment(read_sampled(bank, episode))
            for episode in episodes
            if episode.document in taught
        }

    def batches(self, update: Update, *, part: int, parts: int) -> list[PackedBatch]:
        """What process `part` of `parts` trains on in an update; a batch a row. Raises PackingError."""
        taught = {document.document: document for document in update.documents}
        windows = [number for number, document in enumerate(self._documents) if int(document) in taught]
        lengths = [int(self._lengths[number]) for number in windows]
        packed = pack_rows(lengths, row_tokens=self._row_tokens, window_multiple=self._window_multiple)
        rows: list[Row] = [tuple(windows[place] for place in row) for row in packed]
        rows += [()] * (-len(rows) % parts)
        return [self._batch(row, taught) for row in rows[part::parts]]

    def _batch(self, row: Row, taught: Mapping[int, Taught]) -> PackedBatch:
        batch = pack(self._shard, row, row_tokens=self._row_tokens, window_multiple=self._window_multiple)
        advantages, weights, log_probs = (torch.zeros(batch.ids.shape) for _ in range(3))
        for number, start in zip(row, batch.cu_seqlens.tolist(), strict=False):
            document = taught[int(self._documents[number])]
            values = torch.from_numpy(self._window_log_probs(number, document.document))
            labels = slice(start, start + len(values) - 1)  # position t predicts token t + 1
            log_probs[0, labels] = values[1:]
            advantages[0, labels] = document.advantage
            weights[0, labels] = document.weight
        return replace(batch, advantages=advantages, token_weights=weights, rollout_log_probs=log_probs)

    def _window_log_probs(self, number: int, document: int) -> NDArray[np.float32]:
        """[tokens]; zero where nothing was sampled."""
        first = int(self._shard.index.bounds[document])
        values: list[NDArray[np.float32]] = []
        for part in self._shard.ranges(number):
            for sequence in part:
                none = np.zeros(int(self._shard.index.lengths[sequence]), dtype=np.float32)
                values.append(self._log_probs[document].get(sequence - first, none))
        return np.concatenate(values)


def _by_segment(sampled: Sequence[SampledSegment]) -> LogProbs:
    return {segment.segment: segment.log_probs for segment in sampled}
