"""OpenHands V1 (software-agent-sdk) events -> transcript: events as JSON Lines or as a JSON list.

Events are what the agent's program stored; it rebuilds its prompts from them, and so does this module. Always:
- the action events of one response (llm_response_id) are one turn: their calls in order, the thought and the reasoning
  of the first; calls are taken from `tool_call`, the model's own text, not from `action`, what the program made of it;
- results, errors of the agent and rejections are tool messages with the words of the prompt; a turn's results stand
  behind it, wherever other events stand between;
- reasoning comes from reasoning_content, else from thinking blocks. A model server that repeats it in the text,
  between think tags, does not have it twice here;
- a condensation replaced older events by a summary in all later prompts. The transcript keeps the events and has the
  summary, a user message of provenance COPIED, where it was made: what later prompts left out is for the context policy
  that trains on it to decide. The reply that wrote the summary is no turn;
- where events name their parent, the transcript is the path to the last event; branches left behind are not in it;
- an event of an unknown kind is refused: whether the model saw it cannot be known.
Not in a file: the parameters of built-in tools, stored as the name of a Python class (their names and descriptions
are there, and all of a server's tools), and the cut that the terminal makes in very long outputs. Token ids in events
are another tokenizer's and not used.
Source of the format: OpenHands/software-agent-sdk, openhands-sdk/openhands/sdk/event/ and tool/schema.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from megatron_klong.trajectory.importers.chat_parts import (
    apart,
    calls_of,
    reasoning_of,
    reply_of,
    seconds_of,
    text_of,
)
from megatron_klong.trajectory.importers.fields import a_list, a_text, an_id, an_object
from megatron_klong.trajectory.importers.formats import Json, SessionFormat
from megatron_klong.trajectory.importers.openhands_observations import command_text
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript

_UNSEEN = {
    "CondensationRequest",
    "ConversationErrorEvent",
    "ConversationStateUpdateEvent",
    "HookExecutionEvent",
    "InterruptEvent",
    "LLMCompletionLogEvent",
    "PauseEvent",
    "ServerErrorEvent",
    "StreamingDeltaEvent",
    "TokenEvent",
}
_RESULTS = {"ObservationEvent", "AgentErrorEvent", "UserRejectObservation"}
_SEEN = {
    "SystemPromptEvent",
    "MessageEvent",
    "ActionEvent",
    "Condensation",
    "CondensationSummaryEvent",
    "ACPToolCallEvent",
    *_RESULTS,
}
_KINDS = _SEEN | _UNSEEN
_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}
_ROOT = "__root__"
_ERROR = "[An error occurred during execution.]\n"

type _Event = Mapping[str, Json]


def recognises(lines: Sequence[_Event]) -> bool:
    """Whether the first lines are such events."""
    return bool(lines) and all(
        isinstance(line, Mapping) and isinstance(line.get("kind"), str) and _class_name(line["kind"]) in _KINDS
        for line in lines
    )


def transcripts(lines: Iterator[_Event], source: str) -> Iterator[Transcript]:
    """The one transcript of a conversation. Raises MalformedRow."""
    conversation = _Conversation()
    for place, event in _path([(f"event {n}", an_object(line, f"event {n}")) for n, line in enumerate(lines, start=1)]):
        conversation.add(event, place)
    task = conversation.id or source
    yield Transcript(
        id=task,
        task=task,
        source=source,
        tools=conversation.tools,
        messages=paired(conversation.messages),
        format=FORMAT.name,
    )


def _class_name(kind: str) -> str:
    """Early files have the module in front of the class."""
    return kind.rpartition(".")[2]


def _path(events: list[tuple[str, _Event]]) -> list[tuple[str, _Event]]:
    """The events from the root to the last one. One without a parent follows the one before it in the file."""
    numbers = {event["id"]: n for n, (_, event) in enumerate(events) if isinstance(event.get("id"), str)}
    path: list[tuple[str, _Event]] = []
    at = len(events) - 1
    while at >= 0:
        place, event = events[at]
        path.append((place, event))
        parent = an_id(event.get("parent_id"), f"{place}.parent_id")
        if parent == _ROOT:
            break
        # A parent that was cut off the file is taken to have stood just before.
        above = at - 1 if parent is None else numbers.get(parent, at - 1)
        if above >= at:
            raise MalformedRow(f"{place}.parent_id: {parent} comes later in the file; export the conversation again")
        at = above
    return path[::-1]


class _Conversation:
    """Messages in the order of the events. id: of the conversation, if an event tells it."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.messages: list[Message] = []
        self.tools: tuple[Mapping[str, Json], ...] = ()
        self._turns: dict[str, int] = {}  # id of a response -> number of its message

    def add(self, event: _Event, place: str) -> None:
        """Add what the event put into the prompt, if anything."""
        kind = _class_name(a_text(event.get("kind"), f"{place}.kind"))
        time = seconds_of(event.get("timestamp"), f"{place}.timestamp")
        if kind == "ActionEvent":
            self._action(event, place, time)
        elif kind in _RESULTS:
            called = an_id(event.get("tool_call_id"), f"{place}.tool_call_id")
            text = _result_text(kind, event, place)
            self.messages.append(Message(role=Role.TOOL, content=text, tool_call_id=called, time_seconds=time))
        elif kind == "MessageEvent":
            self.messages.append(_message(event, place, time))
        elif kind == "SystemPromptEvent":
            self._system(event, place, time)
        elif kind in ("Condensation", "CondensationSummaryEvent"):
            if summary := a_text(event.get("summary") or "", f"{place}.summary"):
                self.messages.append(_user(summary, time, Provenance.COPIED))
        elif kind == "ConversationStateUpdateEvent":
            state = event.get("value")
            if event.get("key") == "full_state" and isinstance(state, Mapping) and isinstance(state.get("id"), str):
                self.id = state["id"]
        elif kind not in _UNSEEN:
            raise MalformedRow(f"{place}.kind: {_REFUSED.get(kind, _UNKNOWN).format(kind=kind)}")

    def _system(self, event: _Event, place: str, time: float | None) -> None:
        blocks = [event.get("system_prompt"), event.get("dynamic_context")]
        text = text_of([block for block in blocks if block is not None], f"{place}.system_prompt", "\n")
        self.messages.append(Message(role=Role.SYSTEM, content=text, time_seconds=time))
        tools = a_list(event.get("tools") or [], f"{place}.tools")
        self.tools = tuple(_tool(an_object(tool, f"{place}.tools"), f"{place}.tools") for tool in tools)

    def _action(self, event: _Event, place: str, time: float | None) -> None:
        calls, sound = calls_of([event.get("tool_call")], f"{place}.tool_call")
        response = a_text(event.get("llm_response_id"), f"{place}.llm_response_id")
        number = self._turns.get(response)
        if number is not None:
            turn = self.messages[number]
            self.messages[number] = replace(
                turn,
                content=turn.content + text_of(event.get("thought"), f"{place}.thought", "\n"),
                tool_calls=turn.tool_calls + calls,
                provenance=turn.provenance if sound else Provenance.MALFORMED_CALL,
            )
            return
        self._turns[response] = len(self.messages)
        thought = text_of(event.get("thought"), f"{place}.thought", "\n")
        reasoning, content = apart(reasoning_of(event, place), thought)
        self.messages.append(
            Message(
                role=Role.ASSISTANT,
                content=content,
                reasoning=reasoning,
                tool_calls=calls,
                provenance=Provenance.MODEL if sound else Provenance.MALFORMED_CALL,
                time_seconds=time,
            )
        )


_UNKNOWN = "{kind} is of an unknown version; leave such events out if no model saw them"
_REFUSED = {"ACPToolCallEvent": "{kind}: another agent did the work; import that agent's own log"}


def _user(text: str, time: float | None, provenance: Provenance = Provenance.MODEL) -> Message:
    return Message(role=Role.USER, content=text, provenance=provenance, time_seconds=time)


def _message(event: _Event, place: str, time: float | None) -> Message:
    """A message of the user or the model, with what the agent's context put behind it."""
    raw = an_object(event.get("llm_message"), f"{place}.llm_message")
    role = _ROLES.get(a_text(raw.get("role"), f"{place}.llm_message.role"))
    if role is None:
        raise MalformedRow(f"{place}.llm_message.role: {raw['role']!r} is none of {', '.join(_ROLES)}; correct it")
    texts = [text_of(raw.get("content"), f"{place}.llm_message.content", "\n"), _extension(event, place)]
    text = "\n".join(filter(None, texts))
    if role is not Role.ASSISTANT:
        return Message(role=role, content=text, time_seconds=time)
    reply = reply_of({**raw, "content": text}, f"{place}.llm_message", time)
    return reply if event.get("source") == "agent" else replace(reply, provenance=Provenance.SYNTHETIC)


def _extension(event: _Event, place: str) -> str:
    return text_of(event.get("extended_content"), f"{place}.extended_content", "\n")


def _result_text(kind: str, event: _Event, place: str) -> str:
    if kind == "AgentErrorEvent":
        return a_text(event.get("error"), f"{place}.error")
    if kind == "UserRejectObservation":
        return "Action rejected: " + a_text(event.get("rejection_reason"), f"{place}.rejection_reason")
    seen = an_object(event.get("observation"), f"{place}.observation")
    # Before `content` was common to all kinds of observation, each kept its text under a name of its own.
    content = next((seen[key] for key in ("content", "output", "message") if seen.get(key) is not None), None)
    text = text_of(content, f"{place}.observation.content", "\n")
    if isinstance(seen.get("metadata"), Mapping):
        text = command_text(text, seen["metadata"])
    text = (_ERROR if seen.get("is_error") else "") + text
    return "\n".join(filter(None, [text, _extension(event, place)]))


def _tool(tool: Mapping[str, Json], place: str) -> Mapping[str, Json]:
    """An OpenAI function definition: early files have it as such, later ones only what the module's text says."""
    if "function" in tool:
        return tool
    server_tool = an_object(tool.get("mcp_tool") or {}, f"{place}.mcp_tool")
    name = server_tool.get("name") or tool.get("name") or _tool_name(tool.get("kind")) or tool.get("title")
    definition = {"name": a_text(name, f"{place}: the name of a tool"), "description": tool.get("description") or ""}
    if server_tool.get("inputSchema"):
        definition["parameters"] = server_tool["inputSchema"]
    return {"type": "function", "function": definition}


def _tool_name(kind: Json) -> str | None:
    """The name a tool has from its class: FileEditorTool is file_editor."""
    if not isinstance(kind, str):
        return None
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", _class_name(kind)).lower().removesuffix("_tool")


FORMAT = SessionFormat(name="openhands_events", recognises=recognises, transcripts=transcripts)
