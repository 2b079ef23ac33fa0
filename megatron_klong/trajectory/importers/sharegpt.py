"""ShareGPT rows, as LLaMA-Factory reads them -> transcript.

{"conversations": [{"from", "value"}], "system"?, "tools"?} or a bare list of such messages; `tools` is mostly JSON
text. A function_call holds {"name", "arguments"} as JSON, or a list of them. The format has no message with text and
a call, nor one with two calls: neighbours of that kind, with nothing the model saw between them, are one turn.
A call that is not such JSON stays as context (its text as the arguments of `unknown_call`), untrained.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from megatron_klong.trajectory.importers.formats import RowFormat
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.row_fields import (
    decoded,
    read_call,
    row_score,
    row_task,
    split_reasoning,
    system_message,
    tool_definitions,
)
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript

UNKNOWN_CALL = "unknown_call"
_KEYS = ("conversations", "conversation")
_CALL = "function_call"
_ROLES = {
    "system": Role.SYSTEM,
    "human": Role.USER,
    "user": Role.USER,
    "gpt": Role.ASSISTANT,
    "chatgpt": Role.ASSISTANT,
    "assistant": Role.ASSISTANT,
    "model": Role.ASSISTANT,
    _CALL: Role.ASSISTANT,
    "observation": Role.TOOL,
    "tool": Role.TOOL,
    "function_response": Role.TOOL,
}


def recognises(row: Any) -> bool:
    """Whether a parsed value has this format."""
    said = _conversation(row)
    return isinstance(said, list) and len(said) > 0 and all(map(_is_message, said))


def transcript(row: Any, source: str, number: int) -> Transcript:
    """Convert one row. Raises MalformedRow."""
    fields: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    task = row_task(fields) or f"{source}#{number}"
    said = (_message(raw, f"conversations[{n}]") for n, raw in enumerate(_conversation(row)))
    return Transcript(
        id=f"{task}#{number}",
        task=task,
        source=source,
        tools=tool_definitions(fields),
        messages=system_message(fields) + _whole_turns(said),
        score=row_score(fields),
    )


def _conversation(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    return next((row[key] for key in _KEYS if row.get(key)), None)


def _is_message(message: Any) -> bool:
    speaker = message.get("from") if isinstance(message, Mapping) else None
    return isinstance(speaker, str) and speaker in _ROLES and "value" in message


def _message(raw: Mapping[str, Any], place: str) -> Message:
    role, value = _ROLES[raw["from"]], raw["value"]
    if raw["from"] == _CALL:
        return _calls(value, place)
    if not isinstance(value, str):
        raise MalformedRow(f"{place}.value: not text, but {type(value).__name__}")
    if role is not Role.ASSISTANT:
        return Message(role=role, content=value)
    reasoning, content = split_reasoning(value)
    return Message(role=role, content=content, reasoning=reasoning, trained=raw.get("weight") != 0)


def _calls(value: Any, place: str) -> Message:
    parsed = decoded(value)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, Mapping) and call.get("name") for call in calls):
        unknown = ToolCall(name=UNKNOWN_CALL, arguments={"arguments": str(value)})
        return Message(role=Role.ASSISTANT, tool_calls=(unknown,), provenance=Provenance.MALFORMED_CALL)
    made = [read_call(call["name"], call.get("arguments"), None, f"{place}.value") for call in calls]
    provenance = Provenance.MODEL if all(readable for _, readable in made) else Provenance.MALFORMED_CALL
    return Message(role=Role.ASSISTANT, tool_calls=tuple(call for call, _ in made), provenance=provenance)


def _whole_turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    whole: list[Message] = []
    for message in messages:
        if message.tool_calls and whole and whole[-1].role is Role.ASSISTANT:
            whole[-1] = _joined(whole[-1], message)
        else:
            whole.append(message)
    return tuple(whole)


def _joined(turn: Message, call: Message) -> Message:
    provenance = call.provenance if turn.provenance is Provenance.MODEL else turn.provenance
    trained = turn.trained and call.trained
    return replace(turn, tool_calls=turn.tool_calls + call.tool_calls, provenance=provenance, trained=trained)


FORMAT = RowFormat(name="sharegpt", recognises=recognises, transcript=transcript)
