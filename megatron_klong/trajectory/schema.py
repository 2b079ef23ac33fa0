"""The transcript: what an agent saw and did, in the one form every importer produces and every renderer reads.

Always: messages stand in the order in which they happened; a tool message follows the assistant message that
called it; `trained` is false on assistant messages that no policy produced (demonstrations, synthetic text).
A reply that our own policy sampled carries its token ids, which are never made anew from its text; for all else
this module knows nothing of files, tokens or windows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Reading(StrEnum):
    """What a message showed of the paper the task is about."""

    NONE = "none"
    PART = "part"  # new text of the paper
    COMPLETE = "complete"  # the last missing text of the paper


class Provenance(StrEnum):
    """Who made an assistant message. Only what the model itself said is trained on."""

    MODEL = "model"
    DEMONSTRATION = "demonstration"  # shown to the model as an example
    COPIED = "copied"  # context carried over from elsewhere: a summary, a parent's history, a resumed session
    SYNTHETIC = "synthetic"  # made by a program in the model's name
    API_ERROR = "api_error"  # an error text where a reply should have been
    ABORTED = "aborted"  # cut off: the model did not finish it
    MALFORMED_CALL = "malformed_call"  # its call cannot be read, so the model's own text is not known


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call of a tool, with its arguments as an object in the order the model wrote them."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A reply as token ids. end: the token that ended it, which is not in `body`; None if its length was cut."""

    body: tuple[int, ...]
    end: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message. `reasoning`, `tool_calls`, `sampled` belong to assistants, `tool_call_id` and `reading` to tools.

    time_seconds: when it was written, as Unix time.  trained: false for whatever its provenance forbids.
    halved: how often history was halved before this turn because the engine still called the prompt too long.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reading: Reading = Reading.NONE
    trained: bool = True
    provenance: Provenance = Provenance.MODEL
    time_seconds: float | None = None
    sampled: Sampled | None = None
    halved: int = 0

    def __post_init__(self) -> None:
        if self.provenance is not Provenance.MODEL:
            object.__setattr__(self, "trained", False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Transcript:
    """One run of an agent on one task.

    id: unique within its source, for reports ("rice/oracle").  task: what must not leak between train and
    validation.  source: the file it came from.  tools: OpenAI function definitions, as the model was shown them.
    tokenizer_sha256: of the tokenizer whose ids `sampled` holds.  format: the name of the importer that read it.
    """

    id: str
    task: str
    source: str
    tools: tuple[Mapping[str, Any], ...]
    messages: tuple[Message, ...]
    score: float | None = None
    tokenizer_sha256: str | None = None
    format: str = ""

    @property
    def turns(self) -> int:
        """Model completions in the transcript."""
        return sum(message.role is Role.ASSISTANT for message in self.messages)
