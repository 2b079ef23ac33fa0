"""Inspect AI's messages <-> ours, and tool definitions as the chat template wants them.

Always: what `to_message` yields renders to what an engine is sent for the same Inspect message. Marks that Inspect
does not know (what a result showed of the paper, the record of a turn) travel in the message's metadata, so a log
yields the whole transcript, also when the episode was cut. (The store would not do: it is written out at every call.)
"""

from collections.abc import Sequence
from typing import Any

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentReasoning,
)
from inspect_ai.tool import ToolDef

from megatron_klong.trajectory.episode import TurnRecord
from megatron_klong.trajectory.schema import Message, Reading, Role, Sampled, ToolCall

_READING_KEY = "klong_reading"
_TURN_KEY = "klong_turn"
_ROLES: dict[type, Role] = {
    ChatMessageSystem: Role.SYSTEM,
    ChatMessageUser: Role.USER,
    ChatMessageAssistant: Role.ASSISTANT,
    ChatMessageTool: Role.TOOL,
}


def to_message(message: ChatMessage, sampled: Sampled | None = None) -> Message:
    """One Inspect message as ours. `sampled`: the ids of a reply by our own policy."""
    calls: tuple[ToolCall, ...] = ()
    reasoning = None
    well_formed = True
    if isinstance(message, ChatMessageAssistant):
        found = message.tool_calls or []
        calls = tuple(ToolCall(id=call.id, name=call.function, arguments=call.arguments) for call in found)
        reasoning = reasoning_of(message)
        # The text of a call that could not be parsed is lost; without sampled ids there is nothing exact to train on.
        well_formed = all(call.parse_error is None for call in found)
    metadata = message.metadata or {}
    return Message(
        role=_ROLES[type(message)],
        content=message.text,
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=message.tool_call_id if isinstance(message, ChatMessageTool) else None,
        reading=Reading(metadata.get(_READING_KEY, Reading.NONE)),
        trained=well_formed,
        sampled=sampled,
    )


def reasoning_of(message: ChatMessageAssistant) -> str | None:
    """The reasoning in a reply, or None."""
    if isinstance(message.content, str):
        return None
    return "\n".join(part.reasoning for part in message.content if isinstance(part, ContentReasoning)) or None


def without_reasoning(message: ChatMessage) -> ChatMessage:
    """The message as history shows it once a user message follows."""
    if not isinstance(message, ChatMessageAssistant) or isinstance(message.content, str):
        return message
    content = [part for part in message.content if not isinstance(part, ContentReasoning)]
    return message.model_copy(update={"content": content})


def without_marks(message: ChatMessage) -> ChatMessage:
    """The message as it was said, without the marks of ours: Inspect writes a whole prompt out at every turn."""
    rest = {key: value for key, value in (message.metadata or {}).items() if key not in (_READING_KEY, _TURN_KEY)}
    return message.model_copy(update={"metadata": rest or None})


def final_tool_message(message: ChatMessageTool, text: str, reading: Reading) -> ChatMessageTool:
    """A tool result whose text is all of it: an error is part of the text, notes are appended."""
    return message.model_copy(
        update={"content": text, "error": None, "metadata": {**(message.metadata or {}), _READING_KEY: str(reading)}}
    )


def with_turn_record(reply: ChatMessageAssistant, turn: TurnRecord) -> ChatMessageAssistant:
    """The reply with the record of its turn."""
    metadata = {**(reply.metadata or {}), _TURN_KEY: turn.model_dump()}
    return reply.model_copy(update={"metadata": metadata})


def with_tool_seconds(reply: ChatMessage, seconds: float) -> ChatMessage:
    """The reply once the tools it called have run."""
    metadata = reply.metadata or {}
    assert _TURN_KEY in metadata, "a reply is recorded before its tools run"
    turn = {**metadata[_TURN_KEY], "tool_seconds": seconds}
    return reply.model_copy(update={"metadata": {**metadata, _TURN_KEY: turn}})


def turn_record(message: ChatMessage) -> TurnRecord | None:
    """The record a reply carries."""
    found = (message.metadata or {}).get(_TURN_KEY)
    return None if found is None else TurnRecord.model_validate(found)


def tool_definitions(tools: Sequence[ToolDef]) -> tuple[dict[str, Any], ...]:
    """OpenAI function definitions of the tools, as they are sent to an engine."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": definition.name,
                "description": definition.description,
                "parameters": definition.parameters.model_dump(exclude_none=True),
            },
        }
        for definition in tools
    )
