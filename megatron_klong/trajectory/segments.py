"""Segments: the pieces a transcript's tokens come in, each with its kind and whether it is trained on.

A segment is the smallest thing a window may hold or leave out. It is stored as one sequence of a Megatron indexed
dataset, its `mode` as that sequence's int8 mode, so masks are read back and never derived a second time.
"""

from dataclasses import dataclass
from enum import IntEnum

from megatron_klong.trajectory.schema import Reading, Role


class SegmentKind(IntEnum):
    """Where tokens come from. The numbers are on disk: never renumber."""

    PREAMBLE = 0  # [gMASK]<sop>
    TOOLS = 1  # tool definitions
    SYSTEM = 2
    USER = 3
    OBSERVATION = 4  # a tool's result
    HEADER = 5  # <|assistant|>: the generation prompt
    THINK = 6  # think tags
    REASONING = 7  # what stands between them; left out of history once a user message follows
    ANSWER = 8  # content and tool calls
    TURN_END = 9  # the next role's token, which is how a GLM-4.5 turn ends
    SAMPLED_END = 10  # what a policy ended its turn with where another role came next; in that one window only


_TRAINED = 0x40


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of token ids of one kind."""

    kind: SegmentKind
    trained: bool
    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mode(self) -> int:
        """The int8 stored beside the tokens."""
        return self.kind | _TRAINED if self.trained else int(self.kind)


def kind_of_mode(mode: int) -> SegmentKind:
    return SegmentKind(mode & ~_TRAINED)


def is_trained_mode(mode: int) -> bool:
    return bool(mode & _TRAINED)


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedMessage:
    """The segments one message adds, given the one before it."""

    role: Role
    reading: Reading
    segments: tuple[Segment, ...]
    halved: int = 0  # as in Message


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedTranscript:
    """preamble, then the messages, then the token that ends the last turn if nothing follows it."""

    preamble: tuple[Segment, ...]
    messages: tuple[RenderedMessage, ...]
    closing: tuple[Segment, ...]

    @property
    def segments(self) -> list[Segment]:
        """All segments in document order; windows address them by their number here."""
        inner = [segment for message in self.messages for segment in message.segments]
        return [*self.preamble, *inner, *self.closing]

    @property
    def head_stop(self) -> int:
        """Number of messages before the first turn: the task."""
        roles = [message.role for message in self.messages]
        return roles.index(Role.ASSISTANT) if Role.ASSISTANT in roles else len(roles)

    @property
    def head_tokens(self) -> int:
        """Tokens of tools and task, which every window holds."""
        head = [segment for message in self.messages[: self.head_stop] for segment in message.segments]
        return sum(map(len, [*self.preamble, *head]))
