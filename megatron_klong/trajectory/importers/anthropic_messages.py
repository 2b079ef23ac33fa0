"""Anthropic messages -> transcript: rows {"messages": [...], "system"?, "tools"?} with content blocks.

- thinking blocks are the turn's reasoning, their signatures are ignored. A turn with a redacted_thinking block has no
  reasoning: a part of it would be taught as the whole.
- The tool results at the head of a user message become tool messages; what else the message says stays a user
  message after them. Images and documents become "[image]", "[document]".
- A block the model wrote that the schema cannot hold (a tool the provider ran itself) becomes its type in brackets,
  and the turn is kept as context only: its own text is not known.
A row without any such block reads the same as OpenAI messages, and is left to them. As in tables, `messages`, `system`
and `tools` may be JSON text. `claude_code` reads its messages with the functions of this module.
"""

from collections.abc import Mapping, Sequence

from megatron_klong.trajectory.importers.fields import a_list, a_text, an_id, an_object
from megatron_klong.trajectory.importers.formats import Json, RowFormat
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.row_fields import decoded, row_score, row_task
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript

_OWN_BLOCKS = ("thinking", "redacted_thinking", "tool_use", "tool_result", "server_tool_use")


def assistant_message(
    content: Json, place: str, *, provenance: Provenance = Provenance.MODEL, time_seconds: float | None = None
) -> Message:
    """One turn of the model from its content: text, or blocks. Raises MalformedRow."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    redacted = False
    for number, block in enumerate(blocks_of(content, place)):
        where = f"{place}[{number}]"
        match block.get("type"):
            case "text":
                texts.append(a_text(block.get("text"), f"{where}.text"))
            case "thinking":
                thoughts.append(a_text(block.get("thinking"), f"{where}.thinking"))
            case "redacted_thinking":
                redacted = True
            case "tool_use":
                calls.append(_call(block, where))
            case other:
                texts.append(f"[{other}]")
                provenance = Provenance.MALFORMED_CALL if provenance is Provenance.MODEL else provenance
    reasoning = "\n".join(thoughts)
    return Message(
        role=Role.ASSISTANT,
        content="\n".join(texts),
        reasoning=reasoning if reasoning.strip() and not redacted else None,
        tool_calls=tuple(calls),
        provenance=provenance,
        time_seconds=time_seconds,
    )


def user_messages(content: Json, place: str, *, time_seconds: float | None = None) -> list[Message]:
    """The tool results of a user message, then what else it says. Raises MalformedRow."""
    results: list[Message] = []
    said: list[str] = []
    for number, block in enumerate(blocks_of(content, place)):
        where = f"{place}[{number}]"
        if block.get("type") != "tool_result":
            said.append(block_text(block, where))
            continue
        results.append(
            Message(
                role=Role.TOOL,
                content=text_of(block.get("content"), f"{where}.content"),
                tool_call_id=an_id(block.get("tool_use_id"), f"{where}.tool_use_id"),
                time_seconds=time_seconds,
            )
        )
    if said or not results:
        results.append(Message(role=Role.USER, content="\n".join(said), time_seconds=time_seconds))
    return results


def blocks_of(content: Json, place: str) -> Sequence[Mapping[str, Json]]:
    """Content as blocks: text is one block, null is none."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [an_object(block, f"{place}[{number}]") for number, block in enumerate(a_list(content, place))]


def block_text(block: Mapping[str, Json], place: str) -> str:
    """The text of a block that is not the model's; what is no text becomes its type in brackets."""
    kind = block.get("type")
    return a_text(block.get("text"), f"{place}.text") if kind == "text" else f"[{kind}]"


def text_of(content: Json, place: str) -> str:
    """Content that is not the model's, as one text."""
    return "\n".join(block_text(block, f"{place}[{n}]") for n, block in enumerate(blocks_of(content, place)))


def _call(block: Mapping[str, Json], place: str) -> ToolCall:
    arguments = block.get("input")
    return ToolCall(
        name=a_text(block.get("name"), f"{place}.name"),
        arguments={} if arguments is None else an_object(arguments, f"{place}.input"),
        id=an_id(block.get("id"), f"{place}.id"),
    )


def _recognises(row: Json) -> bool:
    if not isinstance(row, Mapping):
        return False
    messages = decoded(row.get("messages"))
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return False
    return any(_has_own_block(message["content"]) for message in messages)


def _is_message(message: Json) -> bool:
    return (
        isinstance(message, Mapping)
        and message.get("role") in ("user", "assistant", "system")
        and isinstance(message.get("content"), str | list)
        and not message.get("tool_calls")
    )


def _has_own_block(content: Json) -> bool:
    return isinstance(content, list) and any(
        isinstance(block, Mapping) and block.get("type") in _OWN_BLOCKS for block in content
    )


def _transcript(row: Json, source: str, number: int) -> Transcript:
    fields = an_object(row, "row")
    messages: list[Message] = []
    if system := decoded(fields.get("system")):
        messages.append(Message(role=Role.SYSTEM, content=text_of(system, "system")))
    for position, raw in enumerate(a_list(decoded(fields.get("messages")), "messages")):
        messages += _messages(an_object(raw, f"messages[{position}]"), f"messages[{position}]")
    task = row_task(fields) or f"{source}#{number}"
    tools = a_list(decoded(fields.get("tools")) or [], "tools")
    return Transcript(
        id=f"{task}#{number}",
        task=task,
        source=source,
        tools=tuple(_tool(tool, f"tools[{n}]") for n, tool in enumerate(tools)),
        messages=paired(messages),
        score=row_score(fields),
        format=FORMAT.name,
    )


def _messages(raw: Mapping[str, Json], place: str) -> list[Message]:
    content = raw.get("content")
    match raw.get("role"):
        case "assistant":
            cut = raw.get("stop_reason") == "max_tokens"
            provenance = Provenance.ABORTED if cut else Provenance.MODEL
            return [assistant_message(content, f"{place}.content", provenance=provenance)]
        case "user":
            return user_messages(content, f"{place}.content")
        case "system":
            return [Message(role=Role.SYSTEM, content=text_of(content, f"{place}.content"))]
        case other:
            raise MalformedRow(f"{place}.role: {other!r} is none of user, assistant, system; correct the role")


def _tool(tool: Json, place: str) -> Mapping[str, Json]:
    """Anthropic's definition of a tool -> OpenAI's."""
    fields = an_object(tool, place)
    if "input_schema" not in fields:
        return fields
    function = {"name": a_text(fields.get("name"), f"{place}.name"), "parameters": fields["input_schema"]}
    if fields.get("description"):
        function["description"] = a_text(fields["description"], f"{place}.description")
    return {"type": "function", "function": function}


FORMAT = RowFormat(name="anthropic_messages", recognises=_recognises, transcript=_transcript)
