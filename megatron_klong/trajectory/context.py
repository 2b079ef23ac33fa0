"""The context policy: which part of a growing transcript the model sees, and where a window ends.

One object, `ContextTracker`, is fed messages one by one. The live agent asks it what to send at each turn; the
splitter feeds it a finished transcript and collects the windows. So both cut in the same place.

Always (tests/unit/trajectory/test_context.py): a window fits; it starts with the whole pinned prefix; it is cut at
turn boundaries; it holds no tool result without its call; each turn is new in exactly one window.
Works on segments and their lengths; knows nothing of files, models or text.

A turn is an assistant message and what follows it until the next one. Rules, in the order in which they apply
before a turn:
1. Reasoning of turns that a user message follows is left out. If that changes tokens the model has seen, the window
   ends (`rerendered`).
2. If the context and the room for one turn do not fit, the window ends (`overflow`).
3. A new window holds the prefix and the newest whole turns that fit `keep`. The newest turn is kept even when it
   alone exceeds `keep`, as long as it fits the window: an agent that cannot see what its last action did repeats it.
4. The prefix (task, and with pin = "reading" the turns up to the last one that showed new text of the paper, or with
   a number those of the first so many messages, the last of them whole) is fixed when it is complete, when it would
   outgrow its cap, or when history is dropped for the first time.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from megatron_klong.trajectory.schema import Reading, Role
from megatron_klong.trajectory.segments import RenderedMessage, Segment, SegmentKind


class ContextError(ValueError):
    """The context cannot be made to fit, or the policy contradicts itself; the message gives the numbers."""


class WindowEnd(StrEnum):
    """Why a window ended; shards hold the place of each in this list, so append only."""

    OVERFLOW = "overflow"
    RERENDERED = "rerendered"
    FINISHED = "finished"
    DIVERTED = "diverted"  # the policy ended its turn for another role than the scaffold went on in


class DropReason(StrEnum):
    PREFIX_EXCEEDS_WINDOW = "prefix_exceeds_window"  # no room for a turn behind the pinned prefix
    TURN_EXCEEDS_WINDOW = "turn_exceeds_window"  # prefix and this turn alone are longer than a window


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextPolicy:
    """max_tokens: window length.  reserve_tokens: room for one turn, its header and end token included.

    keep: history that survives a cut, in tokens (int) or as a fraction of the window behind the prefix (float).
    pin: what the prefix holds beside the task; a number: the transcript's first so many messages, in whole turns.
    prefix_cap_tokens: the pinned turns stay below it.
    """

    max_tokens: int
    reserve_tokens: int
    keep: int | float
    pin: Literal["task", "reading"] | int
    prefix_cap_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.reserve_tokens < self.max_tokens:
            raise ContextError(
                f"reserve_tokens {self.reserve_tokens} must lie between 0 and max_tokens {self.max_tokens}"
            )
        if self.prefix_cap_tokens + self.reserve_tokens > self.max_tokens:
            raise ContextError(
                f"prefix_cap_tokens {self.prefix_cap_tokens} and reserve_tokens {self.reserve_tokens} together exceed "
                f"max_tokens {self.max_tokens}: no turn would fit behind a full prefix"
            )
        if isinstance(self.keep, float) and not 0 <= self.keep < 1:
            raise ContextError(f"keep {self.keep} is a fraction and must lie in [0, 1); write tokens as a whole number")
        if self.keep < 0 or self.keep >= self.max_tokens:
            raise ContextError(f"keep {self.keep} must be less than max_tokens {self.max_tokens}, and not negative")
        if isinstance(self.pin, int) and self.pin < 1:
            raise ContextError(f"pin {self.pin} is a number of messages and must be at least 1; or pin the task alone")

    def keep_tokens(self, prefix_tokens: int) -> int:
        """History that may survive a cut behind a prefix of that length."""
        if isinstance(self.keep, float):
            return int(self.keep * (self.max_tokens - prefix_tokens))
        return self.keep


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """One append-only span between two cuts, as ranges of segment numbers of its document.

    Segments from `first_new` on appear for the first time: only they are trained. The lengths add up:
    prefix + overlap + new = tokens of the window; for the first window `prefix` is the task alone.
    """

    ranges: tuple[range, ...]
    first_new: int
    end: WindowEnd
    prefix_tokens: int
    overlap_tokens: int
    new_tokens: int
    trained_tokens: int

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.overlap_tokens + self.new_tokens


@dataclass(slots=True)
class _Turn:
    start: int
    message: int  # messages before it
    reading: Reading = Reading.NONE


class ContextTracker:
    """Follows one transcript. Feed `begin`, then per turn `next_turn`, `add_turn`, `add_message`..., then `finish`."""

    def __init__(self, policy: ContextPolicy) -> None:
        self.policy = policy
        self.windows: list[Window] = []
        self.rewrites = 0  # how often the context changed other than by growing
        self.turn_dropped = False  # the last turn is in no window
        self.dropped_tokens: Counter[DropReason] = Counter()
        self.cuts_without_newest_turn = 0  # the newest turn was longer than the room behind the prefix
        self.trainable_tokens = 0
        self._segments: list[Segment] = []
        self._cumulative = [0]  # tokens before segment i
        self._cumulative_reasoning = [0]
        self._cumulative_ends = [0]  # sampled ends
        self._cumulative_trained = [0]
        self._turns: list[_Turn] = []
        self._messages = 0
        self._head_stop = 0
        self._prefix_stop = 0
        self._prefix_fixed = False
        self._history_start = 0
        self._stripped_below = 0  # reasoning before this segment is left out, for good
        self._diverted_below = 0  # sampled ends before this segment are left out, for good
        self._diverted = False
        self._user_message_since_turn = False
        self._first_new: int | None = None
        self._new_stop = 0  # behind the last new turn's end token

    @property
    def window_number(self) -> int:
        """Number of the window that is growing."""
        return len(self.windows)

    @property
    def context_tokens(self) -> int:
        """Tokens of the context as it stands, without the next turn's header."""
        return sum(self._tokens(part.start, part.stop) for part in self._parts(len(self._segments)))

    def begin(self, preamble: Sequence[Segment], head: Sequence[RenderedMessage]) -> None:
        """Take the tools and the messages before the first turn: the task, always pinned. Raises ContextError."""
        for segment in preamble:
            self._append(segment)
        for message in head:
            for segment in message.segments:
                self._append(segment)
        self._head_stop = self._prefix_stop = self._history_start = self._new_stop = len(self._segments)
        self._messages = len(head)
        self._prefix_fixed = self.policy.pin == "task"
        head_tokens = self._tokens(0, self._head_stop)
        if head_tokens + self.policy.reserve_tokens > self.policy.max_tokens:
            raise ContextError(
                f"tools and task have {head_tokens} tokens, which with reserve_tokens {self.policy.reserve_tokens} "
                f"exceeds max_tokens {self.policy.max_tokens}; raise max_tokens or shorten the task"
            )

    def next_turn(self) -> None:
        """Make room for one turn, ending the window where the policy says so."""
        if self.turn_dropped:
            self._forget_dropped_turn()
        self._grow_prefix()
        if self._diverted:
            self._leave_out_sampled_end()
        if self._user_message_since_turn:
            self._strip_reasoning()
        if self.context_tokens + self.policy.reserve_tokens > self.policy.max_tokens:
            self._cut(WindowEnd.OVERFLOW, self.policy.reserve_tokens)

    def halve_history(self) -> bool:
        """End the window and keep the newest whole turns that fit half its history, for an engine with less room.

        False if there was nothing to leave out.
        """
        visible = self.context_tokens
        limit = (visible - self._tokens(0, self._prefix_stop)) // 2
        self._close(WindowEnd.OVERFLOW)
        self._keep_history(self.policy.reserve_tokens, limit)
        return self.context_tokens < visible

    def add_turn(self, message: RenderedMessage) -> None:
        """Append an assistant message. One that is longer than the reserve may need a further cut, or be dropped."""
        tokens = sum(map(len, message.segments)) + 1  # the token that ends it
        if self.context_tokens + tokens > self.policy.max_tokens:
            if self._tokens(0, self._prefix_stop) + tokens <= self.policy.max_tokens:
                self._cut(WindowEnd.OVERFLOW, tokens)
            else:
                self._close(WindowEnd.OVERFLOW)
                self.turn_dropped = True
        start = len(self._segments)
        self._turns.append(_Turn(start, self._messages))
        self._messages += 1
        for segment in message.segments:
            self._append(segment)
        if self.turn_dropped:
            self._count_dropped(start)
            return
        self._new_stop = len(self._segments)
        if self._first_new is None:
            self._first_new = start

    def add_message(self, message: RenderedMessage) -> None:
        """Append what followed a turn: a tool result, a user or a system message."""
        self._append_after_turn(message.segments)
        self._messages += 1
        self._user_message_since_turn |= message.role is Role.USER
        if message.reading is not Reading.NONE and self._turns[-1].reading is not Reading.COMPLETE:
            self._turns[-1].reading = message.reading

    def finish(self, closing: Sequence[Segment]) -> None:
        """End the transcript, and with it the last window."""
        self._append_after_turn(closing)
        self._close(WindowEnd.FINISHED)

    def in_context(self, segment: int) -> bool:
        """Whether the segment belongs to the current context (its reasoning may be left out all the same)."""
        return segment < self._prefix_stop or segment >= self._history_start

    def is_stripped(self, segment: int) -> bool:
        """Whether reasoning at this segment is left out of the context."""
        return segment < self._stripped_below

    def context_segments(self) -> list[Segment]:
        """The segments the model sees, in order."""
        return [self._segments[number] for part in self._ranges(len(self._segments)) for number in part]

    # -- how the context changes

    def _grow_prefix(self) -> None:
        if self._prefix_fixed or not self._turns or not self._is_pinned(self._turns[-1]):
            return
        stop = len(self._segments)
        if self._tokens(0, stop) > self.policy.prefix_cap_tokens:
            self._prefix_fixed = True
            return
        self._prefix_stop = stop
        self._prefix_fixed = self._turns[-1].reading is Reading.COMPLETE and self.policy.pin == "reading"

    def _is_pinned(self, turn: _Turn) -> bool:
        """Whether the policy counts the turn among those the prefix holds."""
        if isinstance(self.policy.pin, int):
            return turn.message < self.policy.pin
        return turn.reading is not Reading.NONE

    def _strip_reasoning(self) -> None:
        self._user_message_since_turn = False
        seen = self.context_tokens
        previously, self._stripped_below = self._stripped_below, len(self._segments)
        if self.context_tokens == seen:
            return
        self._stripped_below = previously  # the window that ends was seen with its reasoning
        self._close(WindowEnd.RERENDERED)
        self._stripped_below = len(self._segments)
        self._keep_history(self.policy.reserve_tokens)

    def _leave_out_sampled_end(self) -> None:
        self._diverted = False
        self._close(WindowEnd.DIVERTED)
        self._diverted_below = len(self._segments)
        self._keep_history(self.policy.reserve_tokens)

    def _cut(self, end: WindowEnd, needed_tokens: int) -> None:
        self._close(end)
        self._keep_history(needed_tokens)

    def _keep_history(self, needed_tokens: int, keep_tokens: int | None = None) -> None:
        """Keep the newest whole turns that fit `keep`, and at least the newest one where the window has room."""
        prefix_tokens = self._tokens(0, self._prefix_stop)
        room = self.policy.max_tokens - needed_tokens - prefix_tokens
        limit = min(room, self.policy.keep_tokens(prefix_tokens) if keep_tokens is None else keep_tokens)
        stop = len(self._segments)
        oldest = max(self._history_start, self._prefix_stop)
        start = stop
        for turn in reversed(self._turns):
            tokens = self._tokens(turn.start, stop)
            newest = start == stop
            if turn.start < oldest or tokens > (room if newest else limit):
                break
            start = turn.start
        if start > oldest:
            self._prefix_fixed = True
        if start == stop and oldest < stop:
            self.cuts_without_newest_turn += 1
        self._history_start = max(start, self._history_start)

    def _forget_dropped_turn(self) -> None:
        """Leave a turn that is in no window, and what it brought about, out of the context."""
        self.rewrites += 1
        self.turn_dropped = False
        self._prefix_fixed = True
        self._history_start = len(self._segments)

    # -- windows

    def _close(self, end: WindowEnd) -> None:
        """Write down the window that ends, if it has a new turn; what follows sees another context."""
        self.rewrites += 1
        first_new = self._first_new
        self._first_new = None
        if first_new is None:
            return
        ranges = self._ranges(self._new_stop)
        prefix_tokens = self._tokens(0, min(self._prefix_stop, first_new))
        tokens = sum(len(self._segments[number]) for part in ranges for number in part)
        new_tokens = self._tokens(first_new, self._new_stop)
        self.windows.append(
            Window(
                ranges=ranges,
                first_new=first_new,
                end=end,
                prefix_tokens=prefix_tokens,
                overlap_tokens=tokens - prefix_tokens - new_tokens,
                new_tokens=new_tokens,
                trained_tokens=self._cumulative_trained[self._new_stop] - self._cumulative_trained[first_new],
            )
        )

    def _parts(self, stop: int) -> list[range]:
        """The context up to segment `stop`, reasoning not yet taken out."""
        if self._history_start <= self._prefix_stop:
            return [range(stop)]
        return [range(self._prefix_stop), range(min(self._history_start, stop), stop)]

    def _ranges(self, stop: int) -> tuple[range, ...]:
        ranges: list[range] = []
        for part in self._parts(stop):
            start = part.start
            for number in range(part.start, min(part.stop, max(self._stripped_below, self._diverted_below))):
                if self._is_left_out(number):
                    ranges.append(range(start, number))
                    start = number + 1
            ranges.append(range(start, part.stop))
        return tuple(part for part in ranges if part)

    def _is_left_out(self, number: int) -> bool:
        match self._segments[number].kind:
            case SegmentKind.REASONING:
                return number < self._stripped_below
            case SegmentKind.SAMPLED_END:
                return number < self._diverted_below
        return False

    # -- tokens

    def _append_after_turn(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self._append(segment)
            if segment.kind is SegmentKind.SAMPLED_END:
                self._diverted = True
            elif segment.kind is not SegmentKind.TURN_END or self._diverted:
                continue
            if self.turn_dropped:
                self._count_dropped(len(self._segments) - 1)
            else:
                self._new_stop = len(self._segments)

    def _count_dropped(self, start: int) -> None:
        trained = self._cumulative_trained[-1] - self._cumulative_trained[start]
        self.dropped_tokens[DropReason.TURN_EXCEEDS_WINDOW] += trained

    def _append(self, segment: Segment) -> None:
        tokens = len(segment)
        self._segments.append(segment)
        self._cumulative.append(self._cumulative[-1] + tokens)
        reasoning = tokens if segment.kind is SegmentKind.REASONING else 0
        self._cumulative_reasoning.append(self._cumulative_reasoning[-1] + reasoning)
        end = tokens if segment.kind is SegmentKind.SAMPLED_END else 0
        self._cumulative_ends.append(self._cumulative_ends[-1] + end)
        self._cumulative_trained.append(self._cumulative_trained[-1] + (tokens if segment.trained else 0))
        self.trainable_tokens = self._cumulative_trained[-1]

    def _tokens(self, start: int, stop: int) -> int:
        """Tokens of segments [start, stop) as the model sees them."""
        if stop <= start:
            return 0
        stripped = min(max(self._stripped_below, start), stop)
        reasoning = self._cumulative_reasoning[stripped] - self._cumulative_reasoning[start]
        diverted = min(max(self._diverted_below, start), stop)
        ends = self._cumulative_ends[diverted] - self._cumulative_ends[start]
        return self._cumulative[stop] - self._cumulative[start] - reasoning - ends
