"""What the fields of a row mean wherever they occur: text, calls, tool definitions, the task, the score."""

import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Role, ToolCall

_TASK_KEYS = ("instance_id", "task_id", "task_name", "id", "name")
_COLUMNS = frozenset(
    {"messages", "conversations", "conversation", "tools", "functions", "history", "trajectory", "steps"}
)
_SCORE_KEYS = ("resolved", "reward", "score")
# SWE-bench names an instance owner__repository-number; some data sets append the number of the run
_RUN_OF_INSTANCE = re.compile(r"([\w.-]+__[\w.-]+-\d+)_\d+")
_THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def decoded(value: Any) -> Any:
    """A field that may be JSON text, as columns of tables are; text that is no JSON stays what it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def with_decoded_columns(row: Any) -> Any:
    """A row whose columns that hold JSON text hold what it says: tables often store nested values so."""
    if not isinstance(row, dict) or not any(isinstance(row.get(key), str) for key in _COLUMNS):
        return row
    return {key: decoded(value) if key in _COLUMNS else value for key, value in row.items()}


def plain_text(content: Any, place: str) -> str:
    """Content as text: null, text, or a list of text parts. Raises MalformedRow, naming the part that is none."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise MalformedRow(f"{place}.content: neither text nor a list of text parts, but {type(content).__name__}")
    texts: list[str] = []
    for number, part in enumerate(content):
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise MalformedRow(f"{place}.content[{number}]: a part of type {kind}; only text can be rendered, drop it")
        texts.append(text)
    return "".join(texts)


def text_or_none(value: Any) -> str | None:
    """An identifier: numbers become text, null and empty stay none."""
    return None if value is None or value == "" else str(value)


def read_call(name: Any, arguments: Any, identity: Any, place: str) -> tuple[ToolCall, bool]:
    """A call, and whether its arguments could be read; if not, it shows their text. Raises MalformedRow."""
    if not isinstance(name, str) or not name:
        raise MalformedRow(f"{place}: no function name")
    parsed = decoded(arguments) if isinstance(arguments, str) else arguments
    if parsed is None or (isinstance(parsed, str) and parsed.strip() in ("", "null")):
        parsed = {}
    if isinstance(parsed, Mapping):
        return ToolCall(id=text_or_none(identity), name=name, arguments=parsed), True
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ToolCall(id=text_or_none(identity), name=name, arguments={"arguments": text}), False


def split_reasoning(content: str) -> tuple[str | None, str]:
    """Reasoning written into the text as <think>...</think> at its beginning, and the text after it.

    GLM-4.5's own template takes it out in the same way when it gets no reasoning by itself.
    """
    match = _THINKING.match(content)
    return (match[1].strip() or None, content[match.end() :]) if match else (None, content)


def tool_definitions(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """`tools`, or OpenAI's older `functions`; either may be JSON text. Raises MalformedRow."""
    key = "tools" if row.get("tools") else "functions"
    tools = decoded(row.get(key))
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise MalformedRow(f"{key}: not a list of function definitions")
    return tuple(tool if "function" in tool else {"type": "function", "function": _named_alike(tool)} for tool in tools)


def _named_alike(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Anthropic's name for the parameters -> OpenAI's."""
    return {"parameters" if key == "input_schema" else key: value for key, value in function.items()}


def system_message(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """A system prompt that stands beside the messages, in front of them. Raises MalformedRow."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise MalformedRow("system: not text")
    return (Message(role=Role.SYSTEM, content=system),) if system else ()


def row_task(row: Mapping[str, Any]) -> str | None:
    """What task a row says it is of. Several runs of one SWE-bench instance are one task."""
    name = next((str(row[key]) for key in _TASK_KEYS if isinstance(row.get(key), str | int) and row[key] != ""), None)
    match = _RUN_OF_INSTANCE.fullmatch(name) if name else None
    return match[1] if match else name


def row_score(row: Mapping[str, Any]) -> float | None:
    return next((float(row[key]) for key in _SCORE_KEYS if isinstance(row.get(key), bool | int | float)), None)
