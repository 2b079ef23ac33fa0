"""OpenHands V0 -> transcript: a row of `output.jsonl`, a row of the older resolver, a saved list of events.

Events are what the program did; what the model said is in `tool_call_metadata.model_response`, once per action. Always:
- a turn is one response, found by its id: several actions of one response are one turn, told by the first of them;
- an action without a response, from before OpenHands stored them, is written the way the agent of that time wrote it
  into its prompts (a thought, then the command between tags), which for shell and Python is what the model wrote. What
  it turned into something else (finish, browse, edit, ...) is SYNTHETIC;
- an observation is as the prompt showed it: with directory and exit code, cut to max_message_chars, marked where it is
  an error or a rejection. With a call it is a tool message, else a user message;
- an error that no response led to follows a reply OpenHands could not use and did not keep: only the error is there;
- a condensation replaced older events by a summary in all later prompts. The transcript keeps the events and has the
  summary, a user message of provenance COPIED, where it was made: what later prompts left out is for the context policy
  that trains on it to decide. The reply that wrote the summary is no turn;
- what a recall brought reaches the prompt only where the agent ran with prompt extensions. Where it did, the prompt's
  words are not in the file, only what they were made from: that stands as a SYNTHETIC user message. An evaluation row
  that does not say is taken to have run without, as OpenHands' benchmarks do (their token counts confirm it).
Not in a file: the tags of models without native calls (the stored response has calls either way), the system prompt of
files without a `system` event. Ids may skip: events that were hidden from the model or dropped from the file.
Source of the format: All-Hands-AI/OpenHands, openhands/memory/conversation_memory.py, events/serialization/, and
agenthub/codeact_agent at 0.9 to 0.12 for files without responses.
"""

import json
from collections.abc import Mapping

from megatron_klong.trajectory.importers.chat_parts import reply_of, seconds_of
from megatron_klong.trajectory.importers.fields import a_list, a_text, an_id, an_object
from megatron_klong.trajectory.importers.formats import Json, RowFormat
from megatron_klong.trajectory.importers.openhands_observations import observation_text, recalled_text
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.row_fields import row_task
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript

_MAX_MESSAGE_CHARS = 30_000  # what OpenHands assumes where a row does not say
_UNSEEN_ACTIONS = {
    "change_agent_state",
    "condensation_request",
    "loop_recovery",
    "null",
    "pause",
    "push",
    "recall",
    "resume",
    "send_pr",
    "start",
    "stop",
}
_UNSEEN_OBSERVATIONS = {"agent_state_changed", "null", "loop_detection"}
_TAGS = {"run": ("execute_bash", "command"), "run_ipython": ("execute_ipython", "code")}

type _Event = Mapping[str, Json]


def recognises(row: Json) -> bool:
    """Whether a parsed value is such a row, or a bare list of such events."""
    if isinstance(row, Mapping):
        if "history" not in row or "trajectory" in row or "output" in row:  # an Alpaca row has an output
            return False
        history = row["history"]
        return _are_events(history) or (not history and ("instruction" in row or "instance_id" in row))
    return _are_events(row)


def transcript(row: Json, source: str, number: int) -> Transcript:
    """Convert one row. Raises MalformedRow."""
    fields: Mapping[str, Json] = row if isinstance(row, Mapping) else {"history": row}
    conversation = _Conversation(fields)
    for place, event in _events(fields):
        conversation.add(event, place)
    task = _task(fields) or source
    return Transcript(
        id=f"{task}#{number}",
        task=task,
        source=source,
        tools=conversation.tools,
        messages=paired(_with_instruction(conversation.messages, fields.get("instruction"))),
        score=_score(fields),
        format=FORMAT.name,
    )


def _are_events(history: Json) -> bool:
    if not isinstance(history, list) or not history:
        return False
    events = history[0] if isinstance(history[0], list) else history
    return bool(events) and all(isinstance(e, Mapping) and ("action" in e or "observation" in e) for e in events)


def _events(fields: Mapping[str, Json]) -> list[tuple[str, _Event]]:
    """Events with their places; the first files kept [action, observation] pairs."""
    found: list[tuple[str, _Event]] = []
    for n, item in enumerate(a_list(fields["history"], "history")):
        place = f"history[{n}]"
        pair = item if isinstance(item, list) else [item]
        found += [(place, an_object(event, place)) for event in pair]
    return found


def _task(fields: Mapping[str, Json]) -> str | None:
    issue = fields.get("issue")
    if isinstance(issue, Mapping) and issue.get("number") is not None:
        return f"{issue.get('owner')}/{issue.get('repo')}#{issue['number']}"
    return row_task(fields)


def _score(fields: Mapping[str, Json]) -> float | None:
    """1 or 0 where the evaluation's report stands in the row; a patch alone says nothing."""
    result = fields.get("test_result")
    reports = [fields.get("report"), result.get("report") if isinstance(result, Mapping) else None]
    verdicts = [report.get("resolved") for report in reports if isinstance(report, Mapping)]
    return next((float(verdict) for verdict in verdicts if isinstance(verdict, bool)), None)


def _with_instruction(messages: list[Message], instruction: Json) -> list[Message]:
    """The task in front of the first turn, for rows whose history begins after it."""
    roles = [message.role for message in messages]
    start = roles.index(Role.ASSISTANT) if Role.ASSISTANT in roles else len(roles)
    if not isinstance(instruction, str) or Role.USER in roles[:start]:
        return messages
    return [*messages[:start], Message(role=Role.USER, content=instruction), *messages[start:]]


class _Conversation:
    """Messages in the order of the events; `turns`: the ids of the responses that already have theirs."""

    def __init__(self, fields: Mapping[str, Json]) -> None:
        self.messages: list[Message] = []
        self.tools: tuple[Mapping[str, Json], ...] = ()
        self._turns: set[str] = set()
        metadata = fields.get("metadata")
        metadata = metadata if isinstance(metadata, Mapping) else {}
        llm, agent = metadata.get("llm_config"), metadata.get("agent_config")
        limit = llm.get("max_message_chars") if isinstance(llm, Mapping) else None
        self._max_chars = limit if isinstance(limit, int) and limit >= 0 else _MAX_MESSAGE_CHARS
        extensions = agent.get("enable_prompt_extensions") if isinstance(agent, Mapping) else None
        self._recalls = extensions if isinstance(extensions, bool) else "metadata" not in fields

    def add(self, event: _Event, place: str) -> None:
        """Add what the event put into the prompt, if anything."""
        time = seconds_of(event.get("timestamp"), f"{place}.timestamp")
        if event.get("action") is not None:
            self._action(event, place, time)
        else:
            self._observation(event, place, time)

    def _action(self, event: _Event, place: str, time: float | None) -> None:
        kind = a_text(event["action"], f"{place}.action")
        args = _details(event, "args", place)
        metadata = an_object(event.get("tool_call_metadata") or {}, f"{place}.tool_call_metadata")
        if metadata.get("model_response"):
            self._turn(metadata, f"{place}.tool_call_metadata", time)
        elif kind in _UNSEEN_ACTIONS:
            return
        elif kind == "system":
            tools = a_list(args.get("tools") or [], f"{place}.args.tools")
            self.tools = tuple(an_object(tool, f"{place}.args.tools") for tool in tools)
            self._say(Role.SYSTEM, a_text(args.get("content"), f"{place}.args.content"), time)
        elif kind == "condensation":
            if args.get("summary"):
                self._say(Role.USER, a_text(args["summary"], f"{place}.args.summary"), time, Provenance.COPIED)
        elif self._is_users(event, kind):
            if text := _users_text(kind, args, place):
                self._say(Role.USER, text, time)
        else:
            text, provenance = _agents_text(kind, args, place)
            self._say(Role.ASSISTANT, text, time, provenance)

    def _turn(self, metadata: Mapping[str, Json], place: str, time: float | None) -> None:
        response = an_object(metadata["model_response"], f"{place}.model_response")
        key = str(response.get("id") or metadata.get("tool_call_id"))
        if key in self._turns:
            return
        self._turns.add(key)
        choices = a_list(response.get("choices") or [], f"{place}.model_response.choices")
        choice = an_object(choices[0] if choices else None, f"{place}.model_response.choices[0]")
        where = f"{place}.model_response.choices[0].message"
        self.messages.append(reply_of(an_object(choice.get("message"), where), where, time))

    def _is_users(self, event: _Event, kind: str) -> bool:
        """Whether the user acted. Old files do not say: there only the first message is the user's."""
        if "source" in event:
            return bool(event["source"] != "agent")
        return kind == "message" and not any(message.role is Role.ASSISTANT for message in self.messages)

    def _observation(self, event: _Event, place: str, time: float | None) -> None:
        kind = a_text(event.get("observation"), f"{place}: neither an action nor an observation")
        if kind in _UNSEEN_OBSERVATIONS:
            return
        extras = _details(event, "extras", place)
        if kind == "recall":
            if self._recalls and (text := recalled_text(extras, place)):
                self._say(Role.USER, text, time, Provenance.SYNTHETIC)
            return
        metadata = event.get("tool_call_metadata")
        text = observation_text(kind, event, extras, place, self._max_chars, called=metadata is not None)
        if metadata is None:
            self._say(Role.USER, text, time)
            return
        where = f"{place}.tool_call_metadata"
        called = an_id(an_object(metadata, where).get("tool_call_id"), f"{where}.tool_call_id")
        self.messages.append(Message(role=Role.TOOL, content=text, tool_call_id=called, time_seconds=time))

    def _say(self, role: Role, text: str, time: float | None, provenance: Provenance = Provenance.MODEL) -> None:
        self.messages.append(Message(role=role, content=text, provenance=provenance, time_seconds=time))


def _details(event: _Event, key: str, place: str) -> _Event:
    """What the kind of event has beyond the common fields; the first resolver files have it beside them."""
    return an_object(event[key], f"{place}.{key}") if event.get(key) is not None else event


def _users_text(kind: str, args: _Event, place: str) -> str:
    if kind == "run":
        return "User executed the command:\n" + a_text(args.get("command"), f"{place}.args.command")
    return a_text(args.get("content") or "", f"{place}.args.content")


def _agents_text(kind: str, args: _Event, place: str) -> tuple[str, Provenance]:
    """What the model said, from the action OpenHands made of it, and whether those are its words."""
    if kind == "message":
        return a_text(args.get("content"), f"{place}.args.content"), Provenance.MODEL
    thought = a_text(args.get("thought") or "", f"{place}.args.thought")
    if kind in _TAGS:
        tag, key = _TAGS[kind]
        command = a_text(args.get(key), f"{place}.args.{key}")
        return f"{thought}\n<{tag}>\n{command}\n</{tag}>", Provenance.MODEL
    if thought:
        return thought, Provenance.SYNTHETIC
    return json.dumps({"action": kind, **args}, ensure_ascii=False), Provenance.SYNTHETIC


FORMAT = RowFormat(name="openhands", recognises=recognises, transcript=transcript)
