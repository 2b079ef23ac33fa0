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


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Those tokens' ids."""
    return tuple(tokenizer.control[token] for token in STOP_TOKENS)


_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "tool": Role.TOOL}


class Prompts:
    """Renders for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._renderer = GlmRenderer(tokenizer)
        self._stops = frozenset(stop_ids(tokenizer))

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
        if not isinstance(role, str) or role not in _ROLES:
            raise ProtocolError(f"{name}.role: {role!r} is none of assistant, {', '.join(_ROLES)}")
        return Message(role=_ROLES[role], content=_text(f"{name}.content", given.get("content")))

    def _assistant(self, name: str, given: Mapping[str, Any]) -> Message:
        if (ids := given.get("generation_token_ids")) is not None:
            if not isinstance(ids, list) or not ids or not all(type(one) is int and one >= 0 for one in ids):
                raise ProtocolError(f"{name}.generation_token_ids: a list of token ids is needed")
            stopped = ids[-1] in self._stops
            sampled = Sampled(body=tuple(ids[:-1] if stopped else ids), end=ids[-1] if stopped else None)
            return Message(role=Role.ASSISTANT, sampled=sampled)
        content = _text(f"{name}.content", given.get("content"))
        reasoning = given.get("reasoning") if (first := given.get("reasoning_content")) is None else first
        if reasoning is None:
            reasoning, content = _thought(content)
        elif not isinstance(reasoning, str):
            raise ProtocolError(f"{name}.reasoning_content: text is needed")
        return Message(
            role=Role.ASSISTANT,
            content=content,
            reasoning=reasoning,
            tool_calls=_calls(f"{name}.tool_calls", given.get("tool_calls") or []),
        )


def _thought(content: str) -> tuple[str | None, str]:
    """Reasoning that a client keeps in the text, taken out as the model's template does it."""
    if "</think>" not in content:
        return None, content
    before, *_, after = content.split("</think>")
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")


def _text(name: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if others := {str(part.get("type")) for part in content} - {"text"}:
            raise ProtocolError(f"{name}: the model reads text only, not {', '.join(sorted(others))}")
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
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
        arguments = _json(f"{name}.function.arguments", arguments)
    if not isinstance(arguments, dict):
        raise ProtocolError(f"{name}.function.arguments: an object is needed")
    return arguments


def _json(name: str, text: str) -> Any:
    for closing in ("", "}"):  # chat.py leaves open what it could not read
        try:
            value = json.loads(text + closing)
            json.dumps(value, ensure_ascii=False).encode()  # half a character is no text
        except (ValueError, RecursionError):
            continue
        return value
    raise ProtocolError(f"{name}: no JSON")


def _tools(tools: Any) -> Sequence[Mapping[str, Any]]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise ProtocolError("tools: a list is needed")
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ProtocolError(f"tools[{place}]: type function, with function.name and function.parameters, is needed")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict) or not isinstance(parameters.get("properties") or {}, dict):
            raise ProtocolError(f"tools[{place}].function.parameters: an object with properties is needed")
    return tools


def schemas(tools: Any) -> Mapping[str, Mapping[str, Any]]:
    """Tool -> argument -> the types it may have, as a JSON schema; of tools that `Prompts.ids` took."""
    parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools or ()}
    return {
        name: {argument: _types(schema) for argument, schema in (of_all.get("properties") or {}).items()}
        for name, of_all in parameters.items()
    }


def _types(schema: Any) -> Mapping[str, Any]:
    """JSON schemas say it in several ways, of which parsing knows one."""
    several = schema.get("anyOf") if isinstance(schema, dict) else None
    kinds: list[Any] = []
    for member in several if isinstance(several, list) else [schema]:
        kind = member.get("type") if isinstance(member, dict) else None
        kinds += kind if isinstance(kind, list) else [kind]
    return {"anyOf": [{"type": kind if isinstance(kind, str) else None} for kind in kinds]}
