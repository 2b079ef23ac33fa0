"""Prompts with their answers, one pair a row -> transcript of one exchange (or of its history and one exchange).

    {"prompt", "completion"}, {"prompt", "response"}            text, or OpenAI messages (TRL's conversational form)
    {"instruction", "input"?, "output", "system"?, "history"?}  Alpaca, as LLaMA-Factory reads it

What stands in a prompt of messages is context, also where an assistant said it; history is [[prompt, answer], ...]
and was said by the model. A prompt that is text becomes a user message: text continued without roles is not what a
chat model is trained on.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_klong.trajectory.importers import openai_messages
from megatron_klong.trajectory.importers.fields import a_list
from megatron_klong.trajectory.importers.formats import RowFormat
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.row_fields import (
    decoded,
    row_score,
    row_task,
    split_reasoning,
    system_message,
    tool_definitions,
)
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript

_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
_OTHER_FORMATS = ("messages", "conversations", "conversation", "trajectory", "steps")


def recognises(row: Any) -> bool:
    """Whether a parsed row has such a pair and is not of a format that tells more."""
    if not isinstance(row, Mapping) or any(key in row for key in _OTHER_FORMATS):
        return False
    pair = _pair(row)
    history = row.get("history")
    events = isinstance(history, list) and any(isinstance(entry, Mapping) for entry in history)
    return pair is not None and not events and all(_is_said(row[key]) for key in pair)


def transcript(row: Any, source: str, number: int) -> Transcript:
    """Convert one row that is recognised. Raises MalformedRow."""
    pair = _pair(row)
    assert pair is not None
    prompt_key, answer_key = pair
    head = _said(row[prompt_key], prompt_key, Role.USER, row.get("input"))
    head = tuple(_context(message) for message in head)
    task = row_task(row) or f"{source}#{number}"
    return Transcript(
        id=f"{task}#{number}",
        task=task,
        source=source,
        tools=tool_definitions(row),
        messages=system_message(row) + _history(row) + head + _said(row[answer_key], answer_key, Role.ASSISTANT),
        score=row_score(row),
    )


def _pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    return next(((prompt, answer) for prompt, answer in _PAIRS if prompt in row and answer in row), None)


def _is_said(value: Any) -> bool:
    return isinstance(value, str) or openai_messages.are_messages(decoded(value))


def _said(value: Any, key: str, role: Role, more: Any = None) -> tuple[Message, ...]:
    parsed = decoded(value)
    if openai_messages.are_messages(parsed):
        return openai_messages.convert(parsed, key)
    if not isinstance(value, str):
        raise MalformedRow(f"{key}: neither text nor messages")
    if more is not None and not isinstance(more, str):
        raise MalformedRow("input: not text")
    if role is Role.ASSISTANT:
        reasoning, content = split_reasoning(value)
        return (Message(role=role, content=content, reasoning=reasoning),)
    return (Message(role=role, content=f"{value}\n{more}" if more else value),)


def _context(message: Message) -> Message:
    return replace(message, provenance=Provenance.COPIED) if message.role is Role.ASSISTANT else message


def _history(row: Mapping[str, Any]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for number, exchange in enumerate(a_list(row.get("history") or (), "history")):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise MalformedRow(f"history[{number}]: not a prompt and its answer")
        messages += _said(exchange[0], f"history[{number}][0]", Role.USER)
        messages += _said(exchange[1], f"history[{number}][1]", Role.ASSISTANT)
    return tuple(messages)


FORMAT = RowFormat(name="completion", recognises=recognises, transcript=transcript)
