"""The record of one episode as a file: what happened, how it ended, and the fingerprint of every prompt.

Always: messages are complete (never cut to a window); a reader refuses a file of another format or version.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_klong.files import write_atomically
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.schema import Message, Reading, Role, Sampled, ToolCall, Transcript

EPISODE_SUFFIX = ".episode.json"


class EpisodeError(ValueError):
    """A file that is not a readable episode record; the message names file and field."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolCallRecord(_Record):
    id: str | None
    name: str
    arguments: dict[str, Any]


class SampledRecord(_Record):
    """A reply as the ids that were sampled; end: the token that ended it, null if its length was cut."""

    body: list[int]
    end: int | None

    @classmethod
    def of(cls, sampled: Sampled) -> Self:
        return cls(body=list(sampled.body), end=sampled.end)

    def sampled(self) -> Sampled:
        return Sampled(body=tuple(self.body), end=self.end)


class MessageRecord(_Record):
    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: list[ToolCallRecord] = []
    tool_call_id: str | None = None
    reading: Reading = Reading.NONE
    trained: bool = True
    sampled: SampledRecord | None = None
    halved: int = 0

    @classmethod
    def of(cls, message: Message) -> Self:
        return cls(
            role=message.role,
            content=message.content,
            reasoning=message.reasoning,
            tool_calls=[
                ToolCallRecord(id=call.id, name=call.name, arguments=dict(call.arguments))
                for call in message.tool_calls
            ],
            tool_call_id=message.tool_call_id,
            reading=message.reading,
            trained=message.trained,
            sampled=SampledRecord.of(message.sampled) if message.sampled else None,
            halved=message.halved,
        )

    def message(self) -> Message:
        return Message(
            role=self.role,
            content=self.content,
            reasoning=self.reasoning,
            tool_calls=tuple(
                ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in self.tool_calls
            ),
            tool_call_id=self.tool_call_id,
            reading=self.reading,
            trained=self.trained,
            sampled=self.sampled.sampled() if self.sampled else None,
            halved=self.halved,
        )


class TurnRecord(_Record):
    """One turn: the window and fingerprint of its prompt (None if no window can hold the turn) and its seconds.

    key: of the reply in the file of sampled turns; None if a teacher replied.  halved: as in schema.Message.
    model_seconds: of the reply, without what was waited for the engine's queue and retries (given_back_seconds).
    tool_seconds: of the tools it called.
    """

    key: str | None = None
    window: int | None
    prompt_tokens: int | None
    prompt_sha256: str | None
    model_seconds: float
    given_back_seconds: float
    tool_seconds: float = 0.0
    halved: int = 0


class PolicyRecord(_Record):
    """The context policy the episode ran under."""

    max_tokens: int
    reserve_tokens: int
    keep: int | float
    pin: Literal["task", "reading"] | int
    prefix_cap_tokens: int

    @classmethod
    def of(cls, policy: ContextPolicy) -> Self:
        return cls(
            max_tokens=policy.max_tokens,
            reserve_tokens=policy.reserve_tokens,
            keep=policy.keep,
            pin=policy.pin,
            prefix_cap_tokens=policy.prefix_cap_tokens,
        )

    def policy(self) -> ContextPolicy:
        return ContextPolicy(**self.model_dump())


class FailureRecord(_Record):
    """dependency, context, engine, sandbox or agent; message: number of the one that shows it, where one does."""

    category: str
    message: int | None
    excerpt: str


class ViolationRecord(_Record):
    """attempted or obtained, in which message, against which entry of the blacklist."""

    kind: str
    message: int
    rule: str
    excerpt: str


class EpisodeRecord(_Record):
    """One episode. `model` is the policy that acted; `log` and `sample` say where Inspect's own record is.

    context and tokenizer_sha256 are None for an episode that never began.
    """

    format: Literal["klong-episode"] = "klong-episode"
    version: Literal[1] = 1
    task: str
    model: str
    epoch: int
    ending: str
    error: str | None
    score: float | None
    seconds: float
    windows: int
    refused_requests: int = 0
    """By the egress filter."""
    failure: FailureRecord | None = None
    """What kept the episode from a success; None for a success."""
    violations: list[ViolationRecord] = []
    """What the transcript shows of material the task forbids, but for mere mentions."""
    messages: list[MessageRecord]
    tools: list[dict[str, Any]]
    turns: list[TurnRecord]
    context: PolicyRecord | None
    tokenizer_sha256: str | None
    log: str
    sample: str

    @property
    def id(self) -> str:
        return f"{self.task}/{self.model}/{self.epoch}"

    @property
    def file_name(self) -> str:
        return self.id.replace("/", "__") + EPISODE_SUFFIX

    def transcript(self, source: str) -> Transcript:
        """The transcript in it, as the importers give it."""
        return Transcript(
            id=self.id,
            task=self.task,
            source=source,
            tools=tuple(self.tools),
            messages=tuple(record.message() for record in self.messages),
            score=self.score,
            tokenizer_sha256=self.tokenizer_sha256,
        )


def write_episode(record: EpisodeRecord, folder: Path) -> Path:
    """Write the record under a name made from its id."""
    write_atomically(folder / record.file_name, record.model_dump_json(indent=1))
    return folder / record.file_name


def parse_episode(content: Mapping[str, Any], source: str) -> EpisodeRecord:
    """Validate parsed JSON. Raises EpisodeError."""
    try:
        return EpisodeRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the record"
        raise EpisodeError(f"{source}: {field}: {first['msg']}; was it written by another version?") from error


def read_episode(path: Path) -> EpisodeRecord:
    """Read one record. Raises EpisodeError, OSError."""
    import json

    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise EpisodeError(f"{path}: not JSON ({error}); the file is damaged, record the episode again") from error
    return parse_episode(content, str(path))
