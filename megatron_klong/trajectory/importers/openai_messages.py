"""OpenAI chat messages with tools -> transcript.

Accepts a row {"messages": [...], "tools": [...]} with any other keys, or a bare list of messages. Keys may be
present with null values; arguments are a JSON string or an object; content is text, null, or a list of text parts.
A message whose call has arguments that are not a JSON object is kept as context but not trained on: the model's own
text is not known, and a repaired call would teach what it did not say. Nor is one of weight 0 (OpenAI's fine-tuning).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_klong.trajectory.importers import anthropic_messages, episodes, mini_swe_agent
from megatron_klong.trajectory.importers.formats import RowFormat
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.row_fields import (
    plain_text,
    read_call,
    row_score,
    row_task,
    split_reasoning,
    system_message,
    text_or_none,
    tool_definitions,
)
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}
_KEYS = ("messages", "conversations")
# Written with the same keys; what they mean differs.
_DIALECTS = (episodes.FORMAT, anthropic_messages.FORMAT, mini_swe_agent.FORMAT)
_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "image_url", "input_audio", "file"})


def recognises(row: Any) -> bool:
    """Whether a parsed row has this format."""
    return are_messages(_messages(row)) and not any(dialect.recognises(row) for dialect in _DIALECTS)


def transcript(row: Any, source: str, number: int) -> Transcript:
    """Convert one row. Raises MalformedRow."""
    fields: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    task = row_task(fields) or f"{source}#{number}"
    return Transcript(
        id=f"{task}#{number}",
        task=task,
        source=source,
        tools=tool_definitions(fields),
        messages=system_message(fields) + convert(_messages(row), "messages"),
        score=row_score(fields),
    )


def _messages(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    return next((row[key] for key in _KEYS if row.get(key)), None)


def are_messages(value: Any) -> bool:
    """Whether a value is a list of such messages."""
    return isinstance(value, list) and len(value) > 0 and all(map(_is_message, value))


def convert(raw: Sequence[Mapping[str, Any]], place: str) -> tuple[Message, ...]:
    """Messages of which `are_messages` is true. Raises MalformedRow."""
    return tuple(_message(message, f"{place}[{number}]") for number, message in enumerate(raw))


def _is_message(message: Any) -> bool:
    """Content blocks and flat calls of other kinds have importers of their own."""
    if not isinstance(message, Mapping):
        return False
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        return False
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else []
    flat = any(
        isinstance(call, Mapping) and "tool_call_id" in call for call in (calls if isinstance(calls, list) else [])
    )
    return not flat and all(isinstance(part, str) or _is_part(part) for part in parts)


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and (str(part.get("type")) in _PARTS or ("text" in part and "type" not in part))


def _message(raw: Mapping[str, Any], place: str) -> Message:
    role = _ROLES[raw["role"]]
    if role is not Role.ASSISTANT:
        identity = raw.get("tool_call_id") if role is Role.TOOL else None
        if raw.get("tool_calls"):
            raise MalformedRow(f"{place}.tool_calls: on a message of role {raw['role']!r}; only assistants call tools")
        return Message(role=role, content=plain_text(raw.get("content"), place), tool_call_id=text_or_none(identity))
    calls = [_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(_raw_calls(raw, place))]
    readable = all(read for _, read in calls)
    reasoning = raw.get("reasoning_content") or raw.get("reasoning")
    content = plain_text(raw.get("content"), place)
    if not reasoning:
        reasoning, content = split_reasoning(content)
    return Message(
        role=role,
        content=content,
        reasoning=reasoning if isinstance(reasoning, str) else None,
        tool_calls=tuple(call for call, _ in calls),
        trained=raw.get("weight") != 0,
        provenance=Provenance.MODEL if readable else Provenance.MALFORMED_CALL,
    )


def _raw_calls(raw: Mapping[str, Any], place: str) -> list[Any]:
    """`tool_calls`, or the one `function_call` of OpenAI's older interface."""
    calls = raw.get("tool_calls")
    if not calls:
        return [raw["function_call"]] if raw.get("function_call") else []
    if not isinstance(calls, list):
        raise MalformedRow(f"{place}.tool_calls: not a list")
    return calls


def _call(call: Any, place: str) -> tuple[ToolCall, bool]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise MalformedRow(f"{place}: no function name")
    return read_call(function.get("name"), function.get("arguments"), call.get("id"), place)


FORMAT = RowFormat(name="openai_messages", recognises=recognises, transcript=transcript)
