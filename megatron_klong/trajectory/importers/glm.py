"""The messages of GLM's own published search trajectory -> transcript.

OpenAI-like, but: a call is flat {"session_id", "tool_call_id", "name", "arguments"}; a tool message has no id, and as
content a list of {"output"}, one for each call of the turn, which the chat template shows as results of their own.
Tools are written into the system text exactly as the template writes them. Such a text becomes `tools`: it renders to
the same tokens, while as text its tags would not be control tokens.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_klong.trajectory.glm import tools_text
from megatron_klong.trajectory.importers.formats import RowFormat
from megatron_klong.trajectory.importers.openai_messages import are_messages, convert
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.row_fields import decoded, row_score, row_task, text_or_none, tool_definitions
from megatron_klong.trajectory.schema import Message, Role, Transcript

_TOOLS = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)
_SYSTEM = "<|system|>\n"


def recognises(row: Any) -> bool:
    """Whether a parsed value is OpenAI messages but for flat calls or outputs, of which there is at least one."""
    messages = _messages(row)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return False
    return any(map(_is_own, messages)) and are_messages([_openai(message) for message in messages])


def transcript(row: Any, source: str, number: int) -> Transcript:
    """Convert one row. Raises MalformedRow."""
    fields: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    raws = _messages(row)
    messages: list[Message] = []
    calls: list[str | None] = []
    for position, message in enumerate(convert([_openai(raw) for raw in raws], "messages")):
        if _has_outputs(raws[position]):
            messages += _results(raws[position]["content"], calls, f"messages[{position}].content")
            continue
        calls = [call.id for call in message.tool_calls]
        messages.append(message)
    tools = tool_definitions(fields)
    if not tools and messages and messages[0].role is Role.SYSTEM:
        tools = _written_tools(messages[0].content)
        messages = messages[1:] if tools else messages
    task = row_task(fields) or f"{source}#{number}"
    return Transcript(
        id=f"{task}#{number}",
        task=task,
        source=source,
        tools=tools,
        messages=tuple(messages),
        score=row_score(fields),
    )


def _messages(row: Any) -> Any:
    return row.get("messages") if isinstance(row, Mapping) else row


def _is_own(message: Mapping[str, Any]) -> bool:
    return _has_outputs(message) or any(map(_is_flat, _calls(message)))


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _is_flat(call: Any) -> bool:
    return isinstance(call, Mapping) and "tool_call_id" in call and "function" not in call


def _has_outputs(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return (
        message.get("role") == "tool"
        and isinstance(content, list)
        and len(content) > 0
        and all(isinstance(part, Mapping) and "output" in part for part in content)
    )


def _openai(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with OpenAI's calls, and without outputs."""
    if _has_outputs(message):
        return {**message, "content": ""}
    calls = [{**call, "id": call["tool_call_id"]} if _is_flat(call) else call for call in _calls(message)]
    calls = [{key: call[key] for key in call if key != "tool_call_id"} if _is_flat(call) else call for call in calls]
    return {**message, "tool_calls": calls} if calls else message


def _results(outputs: list[Mapping[str, Any]], calls: list[str | None], place: str) -> list[Message]:
    if len(outputs) != len(calls):
        raise MalformedRow(f"{place}: {len(outputs)} outputs for {len(calls)} calls; there must be one for each")
    results: list[Message] = []
    for number, (output, call) in enumerate(zip(outputs, calls, strict=True)):
        if not isinstance(output["output"], str):
            raise MalformedRow(f"{place}[{number}].output: not text")
        results.append(Message(role=Role.TOOL, content=output["output"], tool_call_id=text_or_none(call)))
    return results


def _written_tools(text: str) -> tuple[Mapping[str, Any], ...]:
    """The tools in a system text that is nothing but the template's list of them."""
    match = _TOOLS.search(text)
    tools = [decoded(line) for line in match[1].split("\n")] if match else []
    whole = tools and all(isinstance(tool, Mapping) for tool in tools) and tools_text(tools) == _SYSTEM + text
    return tuple(tools) if whole else ()


FORMAT = RowFormat(name="glm", recognises=recognises, transcript=transcript)
