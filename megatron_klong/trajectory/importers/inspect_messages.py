"""A message of an Inspect AI log -> ours.

Always: an assistant message is trained only where it is a whole reply of the agent whose every word is known;
reasoning is what the model thought or missing, never a summary and never what the provider encrypted.
Marks of our own scaffold (what a result showed of the paper) travel in a message's metadata and are honoured.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from megatron_klong.trajectory.importers.fields import an_id
from megatron_klong.trajectory.importers.formats import Json
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Reading, Role, ToolCall

_READING_KEY = "klong_reading"
_REFERENCE = re.compile(r"attachment://([0-9a-f]{32})")
_CUT_SHORT = frozenset({"max_tokens", "model_length", "content_filter"})
_ROLES = {role.value: role for role in Role}
_NOT_SHOWN = frozenset({"reasoning", "data", "tool_use"})  # parts that add nothing to the text


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A message where it stood. is_reply: the agent said it; else it was in a prompt."""

    raw: Mapping[str, Any]
    is_reply: bool = False
    stop_reason: str | None = None
    failed: bool = False
    time_seconds: float | None = None


class Attachments:
    """Long texts of a sample, which stand elsewhere as a reference."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def resolved(self, value: Json) -> Json:
        """The value with every reference replaced. Raises MalformedRow for one that leads nowhere."""
        if isinstance(value, str):
            match = _REFERENCE.fullmatch(value)
            return self._text(match[1]) if match else value
        if isinstance(value, list):
            return [self.resolved(item) for item in value]
        if isinstance(value, Mapping):
            return {key: self.resolved(item) for key, item in value.items()}
        return value

    def _text(self, name: str) -> str:
        if name not in self._texts:
            raise MalformedRow(f"attachments: {name} is missing; the sample is damaged, copy the log again")
        return self._texts[name]


def identity(raw: Mapping[str, Any], attachments: Attachments) -> object:
    """What two records of one message have in common, whatever id each has."""
    content = attachments.resolved(raw.get("content"))
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in objects(content, "content"))
    text = str(content or "")
    calls = tuple(an_id(call.get("id"), "tool_calls.id") for call in objects(raw.get("tool_calls"), "tool_calls"))
    role, answered = an_id(raw.get("role"), "role"), an_id(raw.get("tool_call_id"), "tool_call_id")
    return role, text.strip(), calls, answered if role == "tool" else None


def to_message(told: Told, attachments: Attachments, place: str, tool_times: Mapping[str | None, Json]) -> Message:
    """Convert one message. tool_times: when calls of tools ended, by id of the call. Raises MalformedRow."""
    raw = told.raw
    role = _ROLES.get(str(raw.get("role")))
    if role is None:
        raise MalformedRow(f"{place}.role: {raw.get('role')!r} is not one of {', '.join(_ROLES)}")
    content = attachments.resolved(raw.get("content"))
    text = _text(content, f"{place}.content")
    if role is Role.ASSISTANT:
        calls, well_formed = _calls(raw, attachments, place)
        provenance = _provenance(told, well_formed and not _has_part(content, "tool_use"))
        return Message(
            role=role,
            content=text,
            reasoning=_reasoning(content),
            tool_calls=calls,
            provenance=provenance,
            time_seconds=told.time_seconds,
        )
    if role is not Role.TOOL:
        return Message(role=role, content=text)
    error = optional(raw, "error", place)
    call_id = an_id(raw.get("tool_call_id"), f"{place}.tool_call_id")
    return Message(
        role=role,
        # How Inspect's providers show a failed call to a model; what it printed before is not shown.
        content=f"Error: {attachments.resolved(error.get('message'))}" if error else text,
        tool_call_id=call_id,
        reading=_reading(raw, place),
        time_seconds=seconds(tool_times.get(call_id), f"{place}: the time of {call_id}"),
    )


def objects(value: Json, place: str) -> list[Mapping[str, Any]]:
    """A list of objects; absent is empty. Raises MalformedRow."""
    found = [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise MalformedRow(f"{place}: not a list of objects; was it written by Inspect?")
    return found


def optional(fields: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    """An object in a field that may be absent. Raises MalformedRow."""
    found = {} if fields.get(key) is None else fields[key]
    if not isinstance(found, Mapping):
        raise MalformedRow(f"{place}.{key}".lstrip(".") + ": not an object; was it written by Inspect?")
    return found


def seconds(stamp: Json, place: str) -> float | None:
    """An ISO 8601 time as Unix time. Raises MalformedRow."""
    if stamp is None:
        return None
    try:
        moment = datetime.fromisoformat(stamp)
    except (TypeError, ValueError) as error:
        raise MalformedRow(f"{place}: {stamp!r} is not an ISO 8601 time") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _provenance(told: Told, well_formed: bool) -> Provenance:
    if not told.is_reply:
        by_source = {"input": Provenance.DEMONSTRATION, "generate": Provenance.COPIED}
        return by_source.get(str(told.raw.get("source")), Provenance.SYNTHETIC)
    if told.failed:
        return Provenance.API_ERROR
    if not well_formed:
        return Provenance.MALFORMED_CALL
    return Provenance.ABORTED if told.stop_reason in _CUT_SHORT else Provenance.MODEL


def _calls(raw: Mapping[str, Any], attachments: Attachments, place: str) -> tuple[tuple[ToolCall, ...], bool]:
    calls: list[ToolCall] = []
    well_formed = True
    for number, call in enumerate(objects(raw.get("tool_calls"), f"{place}.tool_calls")):
        if not isinstance(call.get("function"), str):
            raise MalformedRow(f"{place}.tool_calls[{number}].function: missing; Inspect writes a name")
        arguments = attachments.resolved(call.get("arguments"))
        if call.get("parse_error") or not isinstance(arguments, Mapping):
            well_formed = False
        if not isinstance(arguments, Mapping):
            arguments = {"arguments": arguments}
        identifier = an_id(call.get("id"), f"{place}.tool_calls[{number}].id")
        calls.append(ToolCall(id=identifier, name=call["function"], arguments=arguments))
    return tuple(calls), well_formed


def _text(content: Json, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for number, part in enumerate(objects(content, place)):
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind not in _NOT_SHOWN:
            raise MalformedRow(f"{place}[{number}]: a part of type {kind}; only text can be trained on, leave this out")
    return "\n".join(texts)


def _has_part(content: Json, kind: str) -> bool:
    return isinstance(content, list) and any(part.get("type") == kind for part in content)


def _reasoning(content: Json) -> str | None:
    """What the model thought, if the log has all of it."""
    if not _has_part(content, "reasoning"):
        return None
    parts = [part for part in content if part.get("type") == "reasoning"]
    if any(part.get("redacted") or _is_summary(part) for part in parts):
        return None
    return "\n".join(part.get("reasoning") or "" for part in parts) or None


def _is_summary(part: Mapping[str, Any]) -> bool:
    """OpenAI's reasoning items ("rs_...") had their summary put where the reasoning belongs by older versions."""
    reasoning = part.get("reasoning")
    is_openai_item = str(part.get("signature") or "").startswith("rs_")
    return (is_openai_item and part.get("summary") is None) or reasoning in (part.get("summary"), "", None)


def _reading(raw: Mapping[str, Any], place: str) -> Reading:
    value = optional(raw, "metadata", place).get(_READING_KEY, Reading.NONE)
    try:
        return Reading(value)
    except ValueError as error:
        raise MalformedRow(f"{place}.metadata.{_READING_KEY}: {value!r} is not one of {', '.join(Reading)}") from error
