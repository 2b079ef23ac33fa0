"""Gemini CLI session (a whole .json object) -> transcript.

A message of type "gemini" is one turn: its text, its tool calls and, inside the calls, their results.
- `thoughts` are summaries made for display (they are longer than the tokens the model thought), not what the model
  thought: the turn has no reasoning.
- A result is the text under "output" or "error" of its functionResponse; another response is kept as JSON.
- A message of type "error" stands where a reply should have been (API_ERROR). Notes of the program to its user
  (info, warning) were not in the model's context and are not in the transcript.
System prompt and tool definitions are not in the log.
"""

import json
from collections.abc import Iterator, Mapping

from megatron_klong.trajectory.importers.fields import a_list, a_text, an_id, an_object, unix_seconds
from megatron_klong.trajectory.importers.formats import Json, RowFormat
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript

_NOTES = ("info", "warning")
_TYPES = ("user", "gemini", "error", *_NOTES)


def _recognises(value: Json) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("sessionId"), str):
        return False
    messages = value.get("messages")
    if not isinstance(messages, list) or not (messages or "projectHash" in value):
        return False
    return all(isinstance(message, Mapping) and "type" in message and "role" not in message for message in messages)


def _transcript(value: Json, source: str, number: int) -> Transcript:
    fields = an_object(value, "session")
    session = a_text(fields.get("sessionId"), "sessionId")
    messages: list[Message] = []
    for position, raw in enumerate(a_list(fields.get("messages"), "messages")):
        messages += _messages(an_object(raw, f"messages[{position}]"), f"messages[{position}]")
    return Transcript(
        id=session,
        task=session,
        source=source,
        tools=(),
        messages=paired(messages),
        format=FORMAT.name,
    )


def _messages(raw: Mapping[str, Json], place: str) -> Iterator[Message]:
    kind = raw.get("type")
    if kind in _NOTES:
        return
    if kind not in _TYPES:
        raise MalformedRow(f"{place}.type: {kind!r} is no known message type; the log is of an unknown version")
    time_seconds = unix_seconds(raw.get("timestamp"), f"{place}.timestamp")
    content = _text(raw.get("content"), f"{place}.content")
    if kind == "user":
        yield Message(role=Role.USER, content=content, time_seconds=time_seconds)
        return
    calls = [an_object(call, f"{place}.toolCalls") for call in a_list(raw.get("toolCalls") or [], f"{place}.toolCalls")]
    yield Message(
        role=Role.ASSISTANT,
        content=content,
        tool_calls=tuple(_call(call, f"{place}.toolCalls[{n}]") for n, call in enumerate(calls)),
        provenance=_provenance(kind, content, bool(calls)),
        time_seconds=time_seconds,
    )
    for number, call in enumerate(calls):
        yield from _results(call, f"{place}.toolCalls[{number}]")


def _provenance(kind: str, content: str, calls: bool) -> Provenance:
    if kind == "error":
        return Provenance.API_ERROR
    return Provenance.MODEL if content or calls else Provenance.ABORTED  # a turn that says nothing was cut off


def _call(call: Mapping[str, Json], place: str) -> ToolCall:
    arguments = call.get("args")
    return ToolCall(
        name=a_text(call.get("name"), f"{place}.name"),
        arguments={} if arguments is None else an_object(arguments, f"{place}.args"),
        id=an_id(call.get("id"), f"{place}.id"),
    )


def _results(call: Mapping[str, Json], place: str) -> Iterator[Message]:
    """The one result of a call, from however many parts; none if it was cancelled before it had any."""
    raw = call.get("result")
    parts = raw if isinstance(raw, list) else [] if raw is None else [raw]
    if parts:
        yield Message(
            role=Role.TOOL,
            content="\n".join(_part(part, f"{place}.result[{n}]") for n, part in enumerate(parts)),
            tool_call_id=an_id(call.get("id"), f"{place}.id"),
            time_seconds=unix_seconds(call.get("timestamp"), f"{place}.timestamp"),
        )


def _part(part: Json, place: str) -> str:
    if isinstance(part, str):
        return part
    fields = an_object(part, place)
    if "functionResponse" in fields:
        response = an_object(fields["functionResponse"], f"{place}.functionResponse").get("response")
        if isinstance(response, Mapping) and len(response) == 1:
            (only,) = response.values()
            if isinstance(only, str) and not response.keys().isdisjoint({"output", "error"}):
                return only
        return json.dumps(response, ensure_ascii=False)
    if "text" in fields:
        return a_text(fields["text"], f"{place}.text")
    return f"[{next(iter(fields), 'nothing')}]"  # [inlineData], [fileData]


def _text(content: Json, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    return "\n".join(_part(part, f"{place}[{number}]") for number, part in enumerate(parts))


FORMAT = RowFormat(name="gemini_cli", recognises=_recognises, transcript=_transcript)
