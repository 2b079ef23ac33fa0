"""Everything a shard promises, checked from its files: checksums, the index, each window, the manifest's counts.

Checked of a window: it lies in its document, in order; it fits the policy; it starts with the whole task and its
prefix; what is left out is history up to a turn, or reasoning and sampled ends alone; its new part has no gap and
follows the one before; its counts are those of its segments, and what it trains is what its segments' modes say.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_klong.data.shard import Shard
from megatron_klong.data.summary import ShardSummary, summarise
from megatron_klong.trajectory.segments import SegmentKind, is_trained_mode, kind_of_mode
from megatron_klong.trajectory.split_plan import turn_starts

_BLOCK_TOKENS = 1 << 22
_LEFT_OUT_ALONE = (SegmentKind.REASONING, SegmentKind.SAMPLED_END)


def verify(prefix: Path) -> tuple[Shard, list[str]]:
    """The shard, and a sentence for each thing wrong with it. Raises ShardError where files are not the manifest's."""
    shard = Shard(prefix, verify_checksums=True)
    wrong = list(_index_faults(shard))
    if not wrong:  # windows are counted in segments, so these must be sound first
        wrong = [*_window_faults(shard)]
    if not wrong:
        wrong = [*_count_faults(shard, summarise(shard, None))]
    return shard, wrong


def _index_faults(shard: Shard) -> Iterator[str]:
    index = shard.index
    if len(index.bounds) != len(shard.documents) + 1:
        yield f"{len(index.bounds) - 1} documents in the index, {len(shard.documents)} in .documents.jsonl"
    if index.bounds[0] != 0 or index.bounds[-1] != len(index.lengths) or (np.diff(index.bounds) < 0).any():
        yield "the documents' bounds in the index do not cover its sequences in order"
    ends = np.cumsum(index.lengths, dtype=np.int64)
    if (index.offsets != ends - index.lengths).any():
        yield "the sequences in the index do not follow each other without gaps"
    for mode in np.unique(index.modes).tolist():
        try:
            kind_of_mode(mode)
        except ValueError:
            yield f"mode {mode} of a sequence names no kind of segment this program knows"
    size = int(shard.manifest["tokenizer"]["vocabulary_size"])
    for start in range(0, len(index.lengths), _BLOCK_TOKENS):
        ids = index.tokens(range(start, min(start + _BLOCK_TOKENS, len(index.lengths))))
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= size):
            yield f"token id {ids.max()} or {ids.min()} outside the vocabulary of {size}"


def _window_faults(shard: Shard) -> Iterator[str]:
    index = shard.index
    kinds = {mode: kind_of_mode(mode) for mode in np.unique(index.modes).tolist()}
    alone = np.isin(index.modes, [mode for mode, kind in kinds.items() if kind in _LEFT_OUT_ALONE])
    starts = np.array(turn_starts([kinds[mode] for mode in index.modes.tolist()]), dtype=np.bool_)
    trained = np.isin(index.modes, [mode for mode in kinds if is_trained_mode(mode)])
    checker = _Checker(shard, alone, starts, trained)
    new_from: dict[int, int] = {}
    for number in tqdm(range(len(shard)), desc="verify", unit="window", delay=2, disable=None):
        document = int(shard.column("document")[number])
        if not 0 <= document < len(shard.documents):
            yield f"window {number}: document {document} is not in the shard"
            continue
        for fault in checker.faults(number, document, new_from.get(document, 0)):
            yield f"window {number} of document {document}: {fault}"
        parts = shard.ranges(number)
        new_from[document] = parts[-1].stop if parts else 0


class _Checker:
    """Looks at one window at a time."""

    def __init__(self, shard: Shard, alone: np.ndarray, starts: np.ndarray, trained: np.ndarray) -> None:
        lengths = shard.index.lengths.astype(np.int64)
        self._shard = shard
        self._starts = starts
        self._tokens = np.concatenate([[0], np.cumsum(lengths)])
        self._alone = np.concatenate([[0], np.cumsum(alone)])
        self._trained = np.concatenate([[0], np.cumsum(lengths * trained)])

    def faults(self, number: int, document: int, new_from: int) -> Iterator[str]:
        """What is wrong with a window; new_from: where the new part of the one before ended."""
        start, stop = (int(bound) for bound in self._shard.index.bounds[document : document + 2])
        parts = self._shard.ranges(number)
        first_new = int(self._shard.column("first_new")[number])
        counts = {name: int(self._shard.column(f"{name}_tokens")[number]) for name in ("prefix", "overlap", "new")}
        borders = [border for part in parts for border in (part.start, part.stop)]
        if not parts or sorted(set(borders)) != sorted(borders) or borders != sorted(borders) or not all(parts):
            yield f"its ranges {[(part.start, part.stop) for part in parts][:4]} are empty or out of order"
            return
        if borders[0] < start or borders[-1] > stop:
            yield f"it reaches outside its document's sequences {start} to {stop}"
            return
        if first_new not in parts[-1] or first_new < new_from:
            yield f"its new part starts at sequence {first_new}, outside its last range or before sequence {new_from}"
            return
        tokens = sum(self._sum(part.start, part.stop) for part in parts)
        if tokens != sum(counts.values()):
            yield f"it has {tokens} tokens, its index says {' + '.join(f'{n} {name}' for name, n in counts.items())}"
        if counts["new"] != self._sum(first_new, borders[-1]):
            yield f"{self._sum(first_new, borders[-1])} tokens are new in it, its index says {counts['new']}"
        most = self._shard.manifest["policy"]["max_tokens"]
        if tokens > most:
            yield f"its {tokens} tokens exceed max_tokens {most}"
        yield from self._prefix_faults(parts, counts["prefix"], start, first_new)
        for before, after in pairwise(parts):
            if not self._may_leave_out(before.stop, after.start):
                yield f"between sequences {before.stop} and {after.start} it leaves out more than whole turns"
        yield from self._trained_faults(number, parts, first_new)

    def _prefix_faults(self, parts: list[range], prefix: int, start: int, first_new: int) -> Iterator[str]:
        task_stop = start + int(np.argmax(self._starts[start : first_new + 1]))
        if parts[0].start != start or parts[0].stop < task_stop:
            yield "it does not start with the whole task"
        if prefix < self._sum(start, task_stop):
            yield f"its prefix of {prefix} tokens is shorter than the task"
        left = prefix
        for before, part in zip([None, *parts], parts, strict=False):
            if left <= 0:
                break
            if before and self._alone[part.start] - self._alone[before.stop] != part.start - before.stop:
                yield "its prefix has a gap"
            inside = self._tokens[part.start : part.stop + 1] - self._tokens[part.start]
            if left < inside[-1] and left not in inside:
                yield "its prefix ends inside a segment"
            left -= int(inside[-1])

    def _trained_faults(self, number: int, parts: list[range], first_new: int) -> Iterator[str]:
        from_first = first_new if self._shard.manifest["loss_on"] == "new" else parts[0].start
        by_modes = sum(
            int(self._trained[part.stop] - self._trained[max(part.start, from_first)])
            for part in parts
            if part.stop > from_first
        )
        by_mask = int(self._shard.window(number).loss_mask.sum())
        said = int(self._shard.column("trained_tokens")[number])
        if not said == by_modes == by_mask:
            yield f"{by_modes} tokens are to be trained by its segments, {by_mask} by its mask, {said} by its index"

    def _may_leave_out(self, start: int, stop: int) -> bool:
        """Reasoning and sampled ends alone, or history up to the beginning of a turn."""
        return bool(self._starts[stop]) or self._alone[stop] - self._alone[start] == stop - start

    def _sum(self, start: int, stop: int) -> int:
        return int(self._tokens[stop] - self._tokens[start])


def _count_faults(shard: Shard, summary: ShardSummary) -> Iterator[str]:
    for name, said in shard.manifest["counts"].items():
        found = getattr(summary, name, said)
        if found != said:
            yield f"{found} {name.replace('_', ' ')} in the files, {said} by the manifest"
    twice = sum(tokens for times, tokens in summary.times_trained.items() if times > 1)
    if summary.loss_on == "new" and twice:
        yield f"{twice} tokens are trained more than once, which loss_on new rules out"
