"""Codex rollout (JSON Lines) -> transcripts.

Taken from `response_item` rows alone (`event_msg` rows repeat them for display) and, in logs of the older generation,
from the bare items. One turn is a run of reasoning, text and calls up to the first tool result or message of another.
- Reasoning is encrypted, and its summary is a display text, not what the model thought: the turn has no reasoning.
  Only plain reasoning (`content` of type reasoning_text, as local models give it) is rendered.
- A result is the text the model was given, which may itself be JSON with the exit code: it stays as it is.
- Environment, instructions and the like that the program injects are user messages, as the model saw them;
  developer messages, and base_instructions where the log has them, are system messages.
- `turn_aborted` marks the turn before it as ABORTED if it was still open: nothing but reasoning or text, and no call.
  An abort after a call cut nothing the model wrote, and one before the first item left nothing to mark.
- `compacted` and `thread_rolled_back` end a transcript: the model saw something else from there on. The next one
  begins with what it saw: the replacement history (or the user's messages and the summary), or the history without
  the turns taken back. Replies in it are COPIED.
- A tool that the provider ran itself (web search) is a call whose arguments and result are not fully in the log: its
  turn is kept as context only (MALFORMED_CALL), and what the model said after it is a turn of its own. So is a turn
  with a part that is no text (a refusal).
Tool definitions are not in the log.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_klong.trajectory.importers.fields import a_list, a_text, an_id, an_object, unix_seconds
from megatron_klong.trajectory.importers.formats import Json, SessionFormat
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.row_fields import read_call
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript

_ROW_TYPES = ("session_meta", "turn_context", "response_item", "event_msg", "compacted")
_CALLS = frozenset({"function_call", "custom_tool_call", "local_shell_call"})
_OUTPUTS = frozenset({"function_call_output", "custom_tool_call_output", "local_shell_call_output"})
_TEXT_PARTS = ("input_text", "output_text", "text")
_NOT_SHOWN = frozenset({"ghost_snapshot"})  # the program's own book-keeping
_ROLES = {"user": Role.USER, "system": Role.SYSTEM, "developer": Role.SYSTEM}
_INJECTED = ("<environment_context>", "<user_instructions>", "# AGENTS.md instructions", "<turn_aborted>")


def _recognises(rows: Sequence[Mapping[str, Json]]) -> bool:
    first = next(iter(rows), {})
    if isinstance(first.get("payload"), Mapping):
        return first.get("type") in _ROW_TYPES
    return "type" not in first and isinstance(first.get("id"), str) and "instructions" in first


def _transcripts(rows: Iterable[Mapping[str, Json]], source: str) -> Iterator[Transcript]:
    session = _Session(source=source)
    for number, row in enumerate(rows, start=1):
        place = f"line {number}"
        time_seconds = unix_seconds(row.get("timestamp"), f"{place}: timestamp")
        kind = row.get("type")
        payload = row.get("payload")
        if "payload" not in row or kind not in _ROW_TYPES:
            if "record_type" not in row and "payload" not in row:
                session.bare(row, place, time_seconds)
        elif kind == "session_meta":
            session.begin(an_object(payload, f"{place}: payload"), place)
        elif kind == "response_item":
            session.item(an_object(payload, f"{place}: payload"), place, time_seconds)
        elif kind == "event_msg":
            yield from session.event(an_object(payload, f"{place}: payload"))
        elif kind == "compacted":
            yield from session.compact(an_object(payload, f"{place}: payload"), place, time_seconds)
    yield session.transcript()


@dataclass(slots=True)
class _Turn:
    """What the model has said since somebody else spoke."""

    time_seconds: float | None = None
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    provenance: Provenance = Provenance.MODEL

    def message(self) -> Message:
        if not self.texts and not self.calls:
            self.provenance = Provenance.ABORTED  # reasoning alone is no reply
        return Message(
            role=Role.ASSISTANT,
            content="\n".join(self.texts),
            reasoning="\n".join(self.reasoning) or None,
            tool_calls=tuple(self.calls),
            provenance=self.provenance,
            time_seconds=self.time_seconds,
        )


@dataclass(kw_only=True, slots=True)
class _Session:
    """The transcript that is growing."""

    source: str
    id: str | None = None
    task: str | None = None
    part: int = 0
    messages: list[Message] = field(default_factory=list)
    turn: _Turn | None = None

    def begin(self, meta: Mapping[str, Json], place: str) -> None:
        """Take the session's header. A fork repeats its parent's, which is not the session's."""
        if self.id is not None:
            return
        self.id = a_text(meta.get("id"), f"{place}: id")
        self.task = an_id(meta.get("forked_from_id"), f"{place}: forked_from_id") or self.id
        base = meta.get("base_instructions")
        if isinstance(base, Mapping) and base.get("text"):
            self.messages.append(Message(role=Role.SYSTEM, content=a_text(base["text"], f"{place}: base_instructions")))

    def bare(self, row: Mapping[str, Json], place: str, time_seconds: float | None) -> None:
        """A row of the older generation: the header, or an item by itself."""
        if "type" in row:
            self.item(row, place, time_seconds)
        elif "id" in row:
            self.begin(row, place)

    def item(self, item: Mapping[str, Json], place: str, time_seconds: float | None) -> None:
        kind = a_text(item.get("type"), f"{place}: type")
        if kind in _NOT_SHOWN:
            return
        if kind == "reasoning" or kind.endswith("_call") or (kind, item.get("role")) == ("message", "assistant"):
            self._say(item, kind, place, time_seconds)
            return
        self.close()
        if kind in _OUTPUTS:
            content = _output(item.get("output"), f"{place}: output")
            call_id = an_id(item.get("call_id"), f"{place}: call_id")
            self.messages.append(
                Message(role=Role.TOOL, content=content, tool_call_id=call_id, time_seconds=time_seconds)
            )
        elif kind == "message":
            role = _ROLES.get(a_text(item.get("role"), f"{place}: role"), Role.USER)
            content = _text(item.get("content"), f"{place}: content")
            self.messages.append(Message(role=role, content=content, time_seconds=time_seconds))
        else:  # it stood in the context, but the log does not have it as text (an encrypted summary, say)
            self.messages.append(Message(role=Role.USER, content=f"[{kind}]", time_seconds=time_seconds))

    def _say(self, item: Mapping[str, Json], kind: str, place: str, time_seconds: float | None) -> None:
        if self.turn is None:
            self.turn = _Turn()
        self.turn.time_seconds = time_seconds
        if kind == "message":
            self.turn.texts.append(_text(item.get("content"), f"{place}: content"))
            if not _is_text_alone(item.get("content")):
                self.turn.provenance = Provenance.MALFORMED_CALL
        elif kind == "reasoning":
            self.turn.reasoning += _plain_reasoning(item, place)
        elif kind in _CALLS:
            call, well_formed = _call(item, kind, place)
            self.turn.calls.append(call)
            if not well_formed:
                self.turn.provenance = Provenance.MALFORMED_CALL
        else:
            self.turn.calls.append(ToolCall(name=kind.removesuffix("_call"), arguments=_action(item, place)))
            self.turn.provenance = Provenance.MALFORMED_CALL
            self.close()

    def close(self) -> None:
        """End the turn that is open, if one is."""
        if self.turn is not None:
            self.messages.append(self.turn.message())
            self.turn = None

    def event(self, event: Mapping[str, Json]) -> Iterator[Transcript]:
        """Events matter where they change what the items say."""
        if event.get("type") == "turn_aborted" and self.turn is not None:
            if not self.turn.calls:
                self.turn.provenance = Provenance.ABORTED
            self.close()
        elif event.get("type") == "thread_rolled_back" and isinstance(event.get("num_turns"), int):
            yield self.transcript()
            self._begin_again(_without_last(self.messages, event["num_turns"]))

    def compact(self, payload: Mapping[str, Json], place: str, time_seconds: float | None) -> Iterator[Transcript]:
        """Everything so far was replaced by a shorter history."""
        yield self.transcript()
        if payload.get("replacement_history") is not None:
            seen = _Session(source=self.source)
            history = a_list(payload["replacement_history"], f"{place}: replacement_history")
            for number, item in enumerate(history):
                where = f"{place}: replacement_history[{number}]"
                seen.item(an_object(item, where), where, time_seconds)
            seen.close()
            self._begin_again([*_head(self.messages), *seen.messages])
            return
        kept = [m for m in self.messages if m.role in (Role.SYSTEM, Role.USER) and m.provenance is Provenance.MODEL]
        summary = a_text(payload.get("message"), f"{place}: message")
        note = Message(
            role=Role.USER,
            content=summary,
            provenance=Provenance.COPIED,
            time_seconds=time_seconds,
        )
        self._begin_again([*kept, note])

    def _begin_again(self, history: Iterable[Message]) -> None:
        copied = Provenance.COPIED
        self.messages = [replace(m, provenance=copied) if m.role is Role.ASSISTANT else m for m in history]
        self.part += 1

    def transcript(self) -> Transcript:
        self.close()
        name = self.id or self.source
        return Transcript(
            id=f"{name}/part-{self.part}" if self.part else name,
            task=self.task or name,
            source=self.source,
            tools=(),
            messages=paired(self.messages),
            format=FORMAT.name,
        )


def _head(messages: Sequence[Message]) -> list[Message]:
    """The base instructions, which a replacement history does not repeat."""
    return [message for message in messages[:1] if message.role is Role.SYSTEM and message.time_seconds is None]


def _without_last(messages: Sequence[Message], turns: int) -> Sequence[Message]:
    """The history before the user's last `turns` requests."""
    asked = [n for n, m in enumerate(messages) if m.role is Role.USER and not m.content.startswith(_INJECTED)]
    return messages[: asked[max(len(asked) - turns, 0)]] if asked and turns > 0 else messages


def _call(item: Mapping[str, Json], kind: str, place: str) -> tuple[ToolCall, bool]:
    call_id = an_id(item.get("call_id"), f"{place}: call_id") or an_id(item.get("id"), f"{place}: id")
    if kind == "local_shell_call":
        return ToolCall(name="local_shell", arguments=_action(item, place), id=call_id), True
    name = a_text(item.get("name"), f"{place}: name")
    if kind == "custom_tool_call":  # its input is free text, not an object
        return ToolCall(name=name, arguments={"input": a_text(item.get("input"), f"{place}: input")}, id=call_id), True
    return read_call(name, a_text(item.get("arguments"), f"{place}: arguments"), call_id, place)


def _action(item: Mapping[str, Json], place: str) -> Mapping[str, Json]:
    action = item.get("action")
    return {} if action is None else an_object(action, f"{place}: action")


def _plain_reasoning(item: Mapping[str, Json], place: str) -> list[str]:
    parts = [an_object(part, f"{place}: content") for part in a_list(item.get("content") or [], f"{place}: content")]
    return [a_text(part["text"], f"{place}: content") for part in parts if part.get("text")]


def _output(output: Json, place: str) -> str:
    if isinstance(output, Mapping):
        output = output.get("content")
    return _text(output, place)


def _text(content: Json, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for number, part in enumerate(a_list(content, place)):
        fields = an_object(part, f"{place}[{number}]")
        kind = fields.get("type")
        is_text = kind in _TEXT_PARTS
        texts.append(a_text(fields.get("text"), f"{place}[{number}].text") if is_text else f"[{kind}]")
    return "\n".join(texts)


def _is_text_alone(content: Json) -> bool:
    parts = content if isinstance(content, list) else []
    return all(part.get("type") in _TEXT_PARTS for part in parts)


FORMAT = SessionFormat(name="codex", recognises=_recognises, transcripts=_transcripts)
