"""The split plan for people: what each window of a transcript holds, what it shares, and the work it teaches.

Always: prefix + overlap + new = the tokens by kind, added up; what a window shares with the next one is what the
next one shares with it; turns and messages are numbered from 0 and include the task's messages.
Works on kinds and lengths of segments, so a stored document serves as well as one just rendered.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_klong.trajectory.actions import turns_of
from megatron_klong.trajectory.context import Window, WindowEnd
from megatron_klong.trajectory.phases import Phase, turn_phases, window_phase
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.segments import RenderedTranscript, SegmentKind
from megatron_klong.trajectory.windows import SplitPlan

_OTHERS = (SegmentKind.SYSTEM, SegmentKind.USER, SegmentKind.OBSERVATION)
_REPLY = (SegmentKind.HEADER, SegmentKind.THINK, SegmentKind.REASONING, SegmentKind.ANSWER)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRow:
    """One window. Messages and turns are those that are new in it, first and last.

    shared_with_previous, shared_with_next: tokens behind the later one's prefix that both hold. The overlap may be
    longer by what followed the last turn of the window before, which only the later one shows.
    phase, turns_by_phase: None and empty where the text of the turns is not known.
    """

    first_message: int
    last_message: int
    first_turn: int
    last_turn: int
    end: WindowEnd
    prefix_tokens: int
    overlap_tokens: int
    new_tokens: int
    trained_tokens: int
    shared_with_previous: int
    shared_with_next: int
    tokens_by_kind: Mapping[SegmentKind, int]
    phase: Phase | None
    turns_by_phase: Mapping[Phase, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The segments of one document: kind, length, and the number of the message and of the turn each belongs to.

    -1: before the first message or turn. The token that ends a turn belongs to the reply it ends.
    """

    kinds: Sequence[SegmentKind]
    lengths: Sequence[int]
    messages: Sequence[int]
    turns: Sequence[int]

    @classmethod
    def of(cls, kinds: Sequence[SegmentKind], lengths: Sequence[int]) -> "Layout":
        return cls(
            kinds=kinds,
            lengths=lengths,
            messages=[
                number - 1
                for number in accumulate(
                    kind in _OTHERS or starts for kind, starts in zip(kinds, turn_starts(kinds), strict=True)
                )
            ],
            turns=[number - 1 for number in accumulate(turn_starts(kinds))],
        )


def turn_starts(kinds: Sequence[SegmentKind]) -> list[bool]:
    """Whether a turn begins with a segment: a header, or, where a format has none, the first of a reply."""
    return [
        kind is SegmentKind.HEADER or (kind in _REPLY and before not in _REPLY)
        for before, kind in zip((SegmentKind.PREAMBLE, *kinds), kinds, strict=False)
    ]


def split_rows(rendered: RenderedTranscript, transcript: Transcript, plan: SplitPlan) -> tuple[SplitRow, ...]:
    """A row for each window of the plan."""
    segments = rendered.segments
    layout = Layout.of([segment.kind for segment in segments], [len(segment) for segment in segments])
    return rows_of(layout, plan.windows, turn_phases(turns_of(transcript.messages)))


def rows_of(layout: Layout, windows: Sequence[Window], phases: Sequence[Phase] | None) -> tuple[SplitRow, ...]:
    """The same from what a shard stores. phases: of each turn of the document, None where its text is not known."""
    held = [[number for part in window.ranges for number in part] for window in windows]
    shared = [
        sum(layout.lengths[number] for number in _behind_prefix(later, layout, window) if number in earlier)
        for earlier, later, window in zip(map(frozenset, held), held[1:], windows[1:], strict=False)
    ]
    rows = []
    for window, numbers, before, after in zip(windows, held, (0, *shared), (*shared, 0), strict=False):
        last = numbers[-1]
        first_turn, last_turn = layout.turns[window.first_new], layout.turns[last]
        new_phases = phases[first_turn : last_turn + 1] if phases is not None else []
        tokens: Counter[SegmentKind] = Counter()
        for number in numbers:
            tokens[layout.kinds[number]] += layout.lengths[number]
        rows.append(
            SplitRow(
                first_message=layout.messages[window.first_new],
                last_message=layout.messages[last],
                first_turn=first_turn,
                last_turn=last_turn,
                end=window.end,
                prefix_tokens=window.prefix_tokens,
                overlap_tokens=window.overlap_tokens,
                new_tokens=window.new_tokens,
                trained_tokens=window.trained_tokens,
                shared_with_previous=before,
                shared_with_next=after,
                tokens_by_kind=tokens,
                phase=window_phase(new_phases) if phases is not None else None,
                turns_by_phase=Counter(new_phases),
            )
        )
    return tuple(rows)


def _behind_prefix(numbers: Sequence[int], layout: Layout, window: Window) -> list[int]:
    """The segments of a window behind its prefix: prefixes are whole segments."""
    behind = [*accumulate((layout.lengths[number] for number in numbers), initial=0)]
    return [number for number, start in zip(numbers, behind, strict=False) if start >= window.prefix_tokens]
