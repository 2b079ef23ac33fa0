"""SWE-agent `.traj` -> transcript (v0, v1.0, v1.1; replies with a fenced command or with function calls).

A file holds the conversation (`history`) and, a second time, the prompt of every step (`trajectory[].messages` in
v1.0, `.query` in v1.1), which makes it quadratic. `history` is what is imported; of the prompts at most the last two
messages are looked at. Always:
- every observation is as the model saw it when it was new, with whatever its template put around it ("OBSERVATION:").
  A history processor may have shown later steps an elided copy ("Old environment output: ..."); the transcript holds
  the full one, and what later prompts left out is for the context policy that trains on it to decide;
- demonstrations have the provenance of that name, as messages of their own and as one user message alike;
- the text with which the agent ended a run in the model's name ("Exit due to cost limit") is SYNTHETIC;
- a reply that was refused (format error, blocked action, syntax error) is not in `history`. v1 keeps it as a step: it
  stands where it was said, followed by the error the model read, or by NOT_RECORDED where the file (v1.0) lacks it.
  Later prompts did not hold the two. With function calls its call is not in the file, so it is MALFORMED_CALL. v0
  files do not have refused replies at all;
- entries of another agent than the first entry's are another conversation, which this model did not see.
Not in a file: tool definitions, and whether the submission was right (the score is unknown whatever exit_status says).
Source of the format: SWE-agent/SWE-agent, sweagent/agent/agents.py and history_processors.py.
"""

import json
import re
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath

from megatron_klong.trajectory.importers.chat_parts import reply_of, text_of
from megatron_klong.trajectory.importers.fields import a_list, a_text, an_object
from megatron_klong.trajectory.importers.formats import Json, RowFormat
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.row_fields import row_task
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript

NOT_RECORDED = "[error message not recorded]"
_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}
_EXIT = re.compile(r"Exit(ing)? due to ")

type _Entry = Mapping[str, Json]


def recognises(row: Json) -> bool:
    """Whether a parsed value is such a run; one of a retrying agent that was stopped early counts too."""
    if not isinstance(row, Mapping):
        return False
    attempts = row.get("attempts")
    return _is_run(row) or ("history" not in row and isinstance(attempts, list) and any(map(_is_run, attempts)))


def transcript(row: Json, source: str, number: int) -> Transcript:
    """Convert one run. Raises MalformedRow."""
    if "history" not in row:
        cure = "write the attempt you want, an element of `attempts`, to a file of its own"
        raise MalformedRow(f"history: the run was stopped before it chose one of its attempts; {cure}")
    history = a_list(row["history"], "history")
    entries = [an_object(entry, f"history[{n}]") for n, entry in enumerate(history)]
    agent = entries[0].get("agent") if entries else None
    own = {n: entry for n, entry in enumerate(entries) if entry.get("agent", agent) == agent}
    refused = _refused_replies(own, a_list(row.get("trajectory"), "trajectory"))
    messages: list[Message] = []
    for n, entry in own.items():
        messages += refused.get(n, ())
        messages.append(_message(entry, f"history[{n}]"))
    task = _task(row) or task_of_file(source)
    return Transcript(
        id=f"{task}#{number}",
        task=task,
        source=source,
        tools=(),
        messages=paired(messages),
        format=FORMAT.name,
    )


def task_of_file(source: str) -> str:
    """The name SWE-agent and its kin gave the file: the task, then `.traj` or `.traj.json`."""
    name, dot_traj, _ = PurePath(source).name.partition(".traj")
    return name if name and dot_traj else PurePath(source).stem


def _is_run(row: Json) -> bool:
    if not isinstance(row, Mapping) or "trajectory" not in row:
        return False
    history = row.get("history")
    return isinstance(history, list) and any(isinstance(entry, Mapping) and "role" in entry for entry in history)


def _task(row: Mapping[str, Json]) -> str | None:
    """The id of the task, if the file has it: replay_config is an object or, from v1.0.1 on, JSON text."""
    config = row.get("replay_config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError as error:
            raise MalformedRow(f"replay_config: not JSON ({error}); the file is damaged, export it again") from error
    problem = config.get("problem_statement") if isinstance(config, Mapping) else None
    return row_task(row) or (row_task(problem) if isinstance(problem, Mapping) else None)


def _message(entry: _Entry, place: str) -> Message:
    role = _ROLES.get(a_text(entry.get("role"), f"{place}.role"))
    if role is None:
        raise MalformedRow(f"{place}.role: {entry['role']!r} is none of {', '.join(_ROLES)}; correct or remove it")
    shown = Provenance.DEMONSTRATION if _is_demonstration(entry) else Provenance.MODEL
    if role is Role.ASSISTANT:
        reply = reply_of(entry, place)
        if shown is Provenance.DEMONSTRATION:
            return replace(reply, provenance=shown)
        return replace(reply, provenance=Provenance.SYNTHETIC) if _by_the_agent(entry, reply) else reply
    answered = a_list(entry.get("tool_call_ids") or [], f"{place}.tool_call_ids") if role is Role.TOOL else []
    return Message(
        role=role,
        content=text_of(entry.get("content"), f"{place}.content"),
        tool_call_id=a_text(answered[0], f"{place}.tool_call_ids") if answered else None,
        provenance=shown,
    )


def _is_demonstration(entry: _Entry) -> bool:
    return bool(entry.get("is_demo")) or entry.get("message_type") == "demonstration"


def _by_the_agent(entry: _Entry, reply: Message) -> bool:
    """Whether the agent, not the model, wrote it: v1 leaves the action empty, v0 names the kind of exit there."""
    action = str(entry.get("action") or "").strip()
    no_action = not reply.tool_calls and (not action or action.startswith("exit_"))
    return no_action and _EXIT.match(reply.content) is not None


def _refused_replies(own: Mapping[int, _Entry], steps: Sequence[Json]) -> dict[int, list[Message]]:
    """Number of an entry -> the refused replies, each with its error, that came before it.

    A step that no reply in the history belongs to was refused if nothing was executed in it or the next prompt ends
    with it. What no accepted reply follows stands in front of the last reply: the agent's own word on giving up.
    """
    waiting: dict[tuple[str, str], deque[int]] = defaultdict(deque)
    replies = [n for n, entry in own.items() if entry.get("role") == "assistant" and not _is_demonstration(entry)]
    for n in replies:
        waiting[_words(own[n], "content", f"history[{n}]")].append(n)
    calling = any(own[n].get("tool_calls") for n in replies)
    before: dict[int, list[Message]] = defaultdict(list)
    refused: list[Message] = []
    for number, step in enumerate(steps):
        place = f"trajectory[{number}]"
        fields = an_object(step, place)
        following = steps[number + 1] if number + 1 < len(steps) else None
        words = _words(fields, "response", place)
        if waiting[words]:
            before[waiting[words].popleft()] += refused
            refused = []
            continue
        error = _error_after(words[0], following, f"trajectory[{number + 1}].query")
        executed = bool(fields.get("state")) or bool(fields.get("observation"))
        if error is not None or not (executed or _is_v0(fields)):
            refused += _refused(words[0], error, calling)
    if refused and replies:
        before[replies[-1]] += refused
    return before


def _words(fields: Mapping[str, Json], key: str, place: str) -> tuple[str, str]:
    return text_of(fields.get(key), f"{place}.{key}"), text_of(fields.get("action"), f"{place}.action")


def _is_v0(step: Mapping[str, Json]) -> bool:
    return "messages" not in step and "query" not in step


def _error_after(response: str, step: Json, place: str) -> str | None:
    """The error with which the next prompt ends, if it asks again after `response`."""
    query = step.get("query") if isinstance(step, Mapping) else None
    if not isinstance(query, list) or len(query) < 2:
        return None
    said, error = (an_object(message, place) for message in query[-2:])
    asks_again = said.get("message_type") == "assistant" and error.get("message_type") == "user"
    if not asks_again or text_of(said.get("content"), place) != response:
        return None
    return text_of(error.get("content"), place)


def _refused(response: str, error: str | None, calling: bool) -> list[Message]:
    provenance = Provenance.MODEL if response else Provenance.ABORTED
    reply = Message(
        role=Role.ASSISTANT,
        content=response,
        provenance=Provenance.MALFORMED_CALL if calling else provenance,
    )
    if error is None:
        return [reply, Message(role=Role.USER, content=NOT_RECORDED, provenance=Provenance.SYNTHETIC)]
    return [reply, Message(role=Role.USER, content=error)]


FORMAT = RowFormat(name="swe_agent", recognises=recognises, transcript=transcript)
