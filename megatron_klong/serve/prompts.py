"""Chat messages as OpenAI writes them -> the token ids that ask GLM-4.5 for the next turn; imports no torch.

Always: a reply that comes back with the `generation_token_ids` it was sent out with stands in the prompt as it was
sampled; text is encoded only where there is nothing else. Reasoning before the last user message is left out, as the
model's template does.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_klong.serve.protocol import ProtocolError
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Message, Role, Sampled, ToolCall
from megatron_klong.trajectory.segments import SegmentKind
from megatron_klong.trajectory.tokenizer import Tokenizer

STOP_TOKENS = ("<|observation|>", "<|user|>", "<|endoftext|>")
"""What ends a turn of the model."""
_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "tool": Role.TOOL}


class Prompts:
    """Renders for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._renderer = GlmRenderer(tokenizer)
        self._stops = frozenset(tokenizer.control[token] for token in STOP_TOKENS)

    def ids(self, messages: Any, tools: Any) -> list[int]:
        """Of a whole conversation. Raises ProtocolError, naming the message."""
        if not isinstance(messages, list) or not messages:
            raise ProtocolError("messages: a list with at least one message is needed")
        read = [self._message(f"messages[{place}]", message) for place, message in enumerate(messages)]
        last_user = max((place for place, message in enumerate(read) if message.role is Role.USER), default=-1)
        segments = list(self._renderer.preamble(_tools(tools)))
        for place, message in enumerate(read):
            rendered = self._renderer.message(message, read[place - 1] if place else None)
            left_out = SegmentKind.REASONING if place < last_user else None
            segments += [segment for segment in rendered.segments if segment.kind is not left_out]
        segments += [*self._renderer.closing(read[-1]), self._renderer.header]
        return [identifier for segment in segments for identifier in segment.ids]

    def _message(self, name: str, given: Any) -> Message:
        if not isinstance(given, dict):
            raise ProtocolError(f"{name}: an object is needed")
        role = given.get("role")
        if role == "assistant":
            return self._assistant(name, given)
        if role not in _ROLES:
            raise ProtocolError(f"{name}.role: {role!r} is none of assistant, {', '.join(_ROLES)}")
        return Message(role=_ROLES[role], content=_text(f"{name}.content", given.get("content")))

    def _assistant(self, name: str, given: Mapping[str, Any]) -> Message:
        if (ids := given.get("generation_token_ids")) is not None:
            if not isinstance(ids, list) or not ids or not all(type(identifier) is int for identifier in ids):
                raise ProtocolError(f"{name}.generation_token_ids: a list of token ids is needed")
            stopped = ids[-1] in self._stops
            sampled = Sampled(body=tuple(ids[:-1] if stopped else ids), end=ids[-1] if stopped else None)
            return Message(role=Role.ASSISTANT, sampled=sampled)
        reasoning = given.get("reasoning_content", given.get("reasoning"))
        if reasoning is not None and not isinstance(reasoning, str):
            raise ProtocolError(f"{name}.reasoning_content: text is needed")
        return Message(
            role=Role.ASSISTANT,
            content=_text(f"{name}.content", given.get("content")),
            reasoning=reasoning,
            tool_calls=_calls(f"{name}.tool_calls", given.get("tool_calls") or []),
        )


def _text(name: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if others := {str(part.get("type")) for part in content} - {"text"}:
            raise ProtocolError(f"{name}: the model reads text only, not {', '.join(sorted(others))}")
        return "".join(str(part.get("text", "")) for part in content)
    raise ProtocolError(f"{name}: text, or a list of text parts, is needed")


def _calls(name: str, calls: Any) -> tuple[ToolCall, ...]:
    found = []
    for place, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ProtocolError(f"{name}[{place}]: a call with function.name and function.arguments is needed")
        found.append(
            ToolCall(name=function["name"], arguments=_arguments(f"{name}[{place}]", function), id=call.get("id"))
        )
    return tuple(found)


def _arguments(name: str, function: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ProtocolError(f"{name}.function.arguments: no JSON") from None
    if not isinstance(arguments, dict):
        raise ProtocolError(f"{name}.function.arguments: an object is needed")
    return arguments


def _tools(tools: Any) -> Sequence[Mapping[str, Any]]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise ProtocolError("tools: a list is needed")
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ProtocolError(f"tools[{place}]: type function, with function.name and function.parameters, is needed")
    return tools


def schemas(tools: Any) -> Mapping[str, Mapping[str, Any]]:
    """Tool -> argument -> its JSON schema, of tools that `Prompts.ids` took."""
    parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools or ()}
    return {name: schema.get("properties") or {} for name, schema in parameters.items()}
