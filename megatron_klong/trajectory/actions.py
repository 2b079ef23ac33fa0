"""What a turn did: its tool calls, from the messages of a transcript or from its rendered text decoded again.

Always: a reply without a call that can be read has no action; nothing raises, however a reply is damaged.
Read in text: GLM-4.5's and Qwen's <tool_call>, gpt-oss's channels, OpenHands' <function=...>, and, where there is
none of these, shell code in ``` fences, which is how agents without tools act.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_klong.trajectory.schema import Message, Role

_GLM_CALL = re.compile(r"<tool_call>\s*([^\s<{]+)(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", re.DOTALL)
_JSON_CALL = re.compile(r"<tool_call>\s*(\{.*?)(?:</tool_call>|\Z)", re.DOTALL)
_CHANNEL_CALL = re.compile(r"to=(?:functions\.)?([\w.-]+).*?<\|message\|>(.*?)(?:<\|call\|>|\Z)", re.DOTALL)
_FUNCTION_CALL = re.compile(r"<function=([\w.-]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_FUNCTION_ARGUMENT = re.compile(r"<parameter=([\w.-]+)>(.*?)(?:</parameter>|\Z)", re.DOTALL)
_FENCE = re.compile(r"^```(?:\w*bash\w*|sh|shell|console)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One call of a tool; arguments that were no text are JSON."""

    tool: str
    arguments: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one reply did, and what came back (tool results and what a user said, joined by line ends)."""

    actions: tuple[Action, ...]
    results: str


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """The turns of a transcript; messages before the first reply belong to none."""
    turns: list[Turn] = []
    for start, message in enumerate(messages):
        if message.role is not Role.ASSISTANT:
            continue
        results: list[str] = []
        for following in messages[start + 1 :]:
            if following.role is Role.ASSISTANT:
                break
            results.append(following.content)
        turns.append(Turn(actions=_actions_of(message), results="\n".join(results)))
    return turns


def actions_in(text: str) -> tuple[Action, ...]:
    """The calls in a reply as it was rendered: control tokens spelled out."""
    for read in (_glm_calls, _json_calls, _channel_calls, _function_calls, _fences):
        if found := tuple(read(text)):
            return found
    return ()


def _actions_of(message: Message) -> tuple[Action, ...]:
    if not message.tool_calls:
        return actions_in(message.content)
    return tuple(Action(tool=call.name, arguments=_texts(call.arguments)) for call in message.tool_calls)


def _texts(arguments: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}


def _glm_calls(text: str) -> Iterator[Action]:
    for name, body in _GLM_CALL.findall(text):
        yield Action(tool=name, arguments=dict(_GLM_ARGUMENT.findall(body)))


def _json_calls(text: str) -> Iterator[Action]:
    for body in _JSON_CALL.findall(text):
        call = _object(body)
        if isinstance(name := call.get("name"), str):
            arguments = call.get("arguments")
            yield Action(tool=name, arguments=_texts(arguments) if isinstance(arguments, dict) else {})


def _channel_calls(text: str) -> Iterator[Action]:
    for name, body in _CHANNEL_CALL.findall(text):
        yield Action(tool=name, arguments=_texts(_object(body)))


def _function_calls(text: str) -> Iterator[Action]:
    for name, body in _FUNCTION_CALL.findall(text):
        yield Action(tool=name, arguments=dict(_FUNCTION_ARGUMENT.findall(body)))


def _fences(text: str) -> Iterator[Action]:
    for body in _FENCE.findall(text):
        yield Action(tool="bash", arguments={"command": body})


def _object(text: str) -> dict[str, Any]:
    """A JSON object; an empty one for text that is none, since a policy may sample anything."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
