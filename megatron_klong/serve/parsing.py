"""Sampled token ids -> reasoning, content and tool calls, in the text format of GLM-4.5.

Borders are control tokens, found by id: text that spells one stays text. Nothing a model samples raises; a call that
cannot be read is a `ParsedCall` with `error`. Reads back what trajectory/glm.py renders (tests/unit/serve/
test_parsing.py), up to what that format cannot tell: white space at the ends of reasoning and content, and, where no
schema says so, text from the number or object it spells.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_klong.trajectory.sampled import decode, find, reasoning_range
from megatron_klong.trajectory.tokenizer import Tokenizer

UNNAMED = "unnamed"
type Schemas = Mapping[str, Mapping[str, Any]]  # tool -> argument -> its JSON schema


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedCall:
    """One tool call; `error` says why it could not be read, and then `arguments` is what could be."""

    name: str
    arguments: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedTurn:
    """What a reply says."""

    reasoning: str
    content: str
    calls: tuple[ParsedCall, ...]


class _Malformed(ValueError):
    def __init__(self, message: str, name: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.name = name
        self.arguments = arguments


def parse(ids: Sequence[int], tokenizer: Tokenizer, schemas: Schemas | None = None) -> ParsedTurn:
    """Read one reply, without the token that ended it."""
    control = tokenizer.control
    start, end, answer = reasoning_range(ids, tokenizer)
    rest = ids[answer:]
    first_call = find(rest, control["<tool_call>"], 0)
    return ParsedTurn(
        reasoning=decode(tokenizer, ids[start:end]).strip(),
        content=decode(tokenizer, rest[:first_call]).strip(),
        calls=tuple(_calls(rest[first_call:], tokenizer, schemas or {})),
    )


def _calls(ids: Sequence[int], tokenizer: Tokenizer, schemas: Schemas) -> list[ParsedCall]:
    opening, closing = tokenizer.control["<tool_call>"], tokenizer.control["</tool_call>"]
    found = []
    place = 0
    while place < len(ids):
        end = min(find(ids, closing, place), find(ids, opening, place + 1))
        body = ids[place + 1 : end]
        found.append(_call(body, tokenizer, schemas, closed=end < len(ids) and ids[end] == closing))
        place = find(ids, opening, end)  # what stands between calls is not part of any
    return found


def _call(ids: Sequence[int], tokenizer: Tokenizer, schemas: Schemas, *, closed: bool) -> ParsedCall:
    try:
        name, arguments = _read_call(ids, tokenizer, schemas)
        if not closed:
            raise _Malformed("the call is not closed by </tool_call>", name, arguments)
    except _Malformed as fault:
        return ParsedCall(name=fault.name, arguments=fault.arguments, error=str(fault))
    return ParsedCall(name=name, arguments=arguments)


def _read_call(ids: Sequence[int], tokenizer: Tokenizer, schemas: Schemas) -> tuple[str, dict[str, Any]]:
    control = tokenizer.control
    place = find(ids, control["<arg_key>"], 0)
    name = decode(tokenizer, ids[:place]).strip()
    arguments: dict[str, Any] = {}
    if not name or "\n" in name or any(identifier in control.values() for identifier in ids[:place]):
        raise _Malformed("the call does not begin with the name of a tool and a line break", UNNAMED, {})
    schema = schemas.get(name, {})
    while place < len(ids):
        borders = [place]
        for tag in ("</arg_key>", "<arg_value>", "</arg_value>"):
            borders.append(find(ids, control[tag], borders[-1]))
        if borders[-1] == len(ids):
            raise _Malformed("an <arg_key> is not followed by </arg_key>, <arg_value>, </arg_value>", name, arguments)
        key = decode(tokenizer, ids[borders[0] + 1 : borders[1]])
        between = decode(tokenizer, ids[borders[1] + 1 : borders[2]])
        text = decode(tokenizer, ids[borders[2] + 1 : borders[3]])
        place = find(ids, control["<arg_key>"], borders[3])
        after = decode(tokenizer, ids[borders[3] + 1 : place])
        if between.strip() or after.strip():
            raise _Malformed("there is text between the arguments", name, arguments)
        if key in arguments:
            raise _Malformed(f"argument {key} is given twice", name, arguments)
        arguments[key] = _value(text, schema.get(key, {}))
    return name, arguments


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """The template writes text as it is and anything else as JSON; the schema says which it was."""
    members = schema.get("anyOf") or [schema]
    types = {one for member in members for one in _types(member)}
    if types <= {"string", "null"}:
        return None if text == "null" and "null" in types else text
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # infinite, or half a character: not JSON
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


def _types(schema: Mapping[str, Any]) -> Sequence[Any]:
    """JSON schema allows one type, a list of them, or none."""
    kind = schema.get("type")
    return kind if isinstance(kind, list) else [kind]
