"""Pieces that the logs of several agents share with OpenAI's chat messages: content, calls, reasoning, times.

Always: what cannot be shown as text leaves a mark in the text (IMAGE), and a call whose arguments are no JSON object
makes its message MALFORMED_CALL. Raises MalformedRow, with the field, for what has another shape.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from megatron_klong.trajectory.importers.fields import a_list, a_text, an_object
from megatron_klong.trajectory.importers.formats import Json
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.row_fields import read_call, split_reasoning
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall

IMAGE = "[image]"


def text_of(content: Json, place: str, separator: str = "") -> str:
    """Content that is text, nothing, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return separator.join(_part(part, f"{place}[{n}]") for n, part in enumerate(a_list(content, place)))


def calls_of(calls: Json, place: str) -> tuple[tuple[ToolCall, ...], bool]:
    """Calls, with or without the wrapper "function", and whether all their arguments can be read."""
    made: list[ToolCall] = []
    sound = True
    for number, call in enumerate(a_list(calls or [], place)):
        fields = an_object(call, f"{place}[{number}]")
        function = an_object(fields.get("function", fields), f"{place}[{number}].function")
        identity = fields.get("id")
        read, readable = read_call(function.get("name"), function.get("arguments"), identity, f"{place}[{number}]")
        made.append(read)
        sound = sound and readable
    return tuple(made), sound


def reasoning_of(fields: Mapping[str, Json], place: str) -> str | None:
    """Reasoning as a text of its own, else from Anthropic's thinking blocks; redacted ones hold none."""
    for key in ("reasoning_content", "reasoning"):
        if isinstance(fields.get(key), str) and fields[key]:
            return a_text(fields[key], place)
    blocks = a_list(fields.get("thinking_blocks") or [], f"{place}.thinking_blocks")
    thoughts = [an_object(block, f"{place}.thinking_blocks").get("thinking") for block in blocks]
    return "\n".join(a_text(thought, f"{place}.thinking_blocks") for thought in thoughts if thought) or None


def reply_of(fields: Mapping[str, Json], place: str, time_seconds: float | None = None) -> Message:
    """An assistant message with OpenAI's keys."""
    calls, sound = calls_of(fields.get("tool_calls"), f"{place}.tool_calls")
    reasoning, content = apart(reasoning_of(fields, place), text_of(fields.get("content"), f"{place}.content"))
    return Message(
        role=Role.ASSISTANT,
        content=content,
        reasoning=reasoning,
        tool_calls=calls,
        provenance=Provenance.MODEL if sound else Provenance.MALFORMED_CALL,
        time_seconds=time_seconds,
    )


def apart(reasoning: str | None, content: str) -> tuple[str | None, str]:
    """Reasoning and answer, where the answer begins with the reasoning (between think tags) or repeats it there."""
    inline, rest = split_reasoning(content)
    if inline is None or (reasoning is not None and reasoning.strip() != inline):
        return reasoning, content
    return reasoning or inline, rest


def seconds_of(time: Json, place: str) -> float | None:
    """Unix time from a number or ISO 8601. A time without a zone is read as UTC: the same on every machine."""
    if time is None:
        return None
    if isinstance(time, int | float):
        return float(time)
    try:
        moment = datetime.fromisoformat(a_text(time, place))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise MalformedRow(f"{place}: {time!r} is no ISO 8601 time; the file is damaged, export it again") from error


def _part(part: Json, place: str) -> str:
    if isinstance(part, str):
        return part
    fields = an_object(part, place)
    if "image" in str(fields.get("type")):
        return IMAGE
    return a_text(fields.get("text"), f"{place}.text")
