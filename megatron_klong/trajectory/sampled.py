"""Sampled token ids -> the segments of a GLM-4.5 turn: none changed, none added, none encoded again.

Borders are control tokens, found by id: text that spells one stays text. Nothing a model samples raises.
"""

from collections.abc import Sequence

from megatron_klong.trajectory.segments import Segment, SegmentKind
from megatron_klong.trajectory.tokenizer import Tokenizer


def sampled_segments(ids: Sequence[int], tokenizer: Tokenizer, *, trained: bool = True) -> tuple[Segment, ...]:
    """The body of a reply (without the token that ended it) as what a rendered turn has after its header.

    Reasoning of white space alone counts as think tags: history, which leaves reasoning out, keeps it.
    """
    start, end, answer = reasoning_range(ids, tokenizer)
    borders = (
        (SegmentKind.THINK, 0, start),
        (SegmentKind.REASONING if decode(tokenizer, ids[start:end]).strip() else SegmentKind.THINK, start, end),
        (SegmentKind.THINK, end, answer),
        (SegmentKind.ANSWER, answer, len(ids)),
    )
    return tuple(Segment(kind, trained, list(ids[first:last])) for kind, first, last in borders if last > first)


def reasoning_range(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Where the reasoning starts and ends, and where the answer starts."""
    opening, closing = tokenizer.control["<think>"], tokenizer.control["</think>"]
    start, end = find(ids, opening, 0), find(ids, closing, 0)
    if start > end:  # closed before it was opened: all before it is reasoning
        start = -1
    if start == len(ids):
        return 0, 0, 0
    return start + 1, end, min(end + 1, len(ids))


def find(ids: Sequence[int], wanted: int, start: int) -> int:
    """The first place of `wanted` from `start` on; the end where there is none."""
    try:
        return ids.index(wanted, start)
    except ValueError:
        return len(ids)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of sampled ids; those that pad the model's vocabulary mean nothing and are left out."""
    return tokenizer.decode([identifier for identifier in ids if identifier < tokenizer.vocabulary_size])
