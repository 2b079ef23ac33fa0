"""mini-swe-agent `.traj.json` -> transcript: an object with `trajectory_format`, or a bare list of its messages.

A bare list looks like OpenAI's messages; what tells it is a reply with a fenced shell command that a user message
with the command's `<returncode>` answers. Always:
- a fenced command is text of the reply, as the model wrote it; only calls the model's API returned are tool calls;
- an observation has the role the model saw: user after a fenced command, tool after a call;
- messages of the role `exit` (how the run ended) went to no model and are left out; so is the reply behind a format
  error in v2, which the agent put into no prompt: the error alone is what the model saw;
- a reply of the Responses API is one turn; its reasoning is known only where the API gave it as text, for a summary is
  not what the model said.
Not in a file: the definition of the tool `bash`, and whether the submission was right.
Source of the format: SWE-agent/mini-swe-agent, src/minisweagent/agents/default.py and models/.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from megatron_klong.trajectory.importers.chat_parts import calls_of, reply_of, seconds_of, text_of
from megatron_klong.trajectory.importers.fields import a_list, a_text, an_id, an_object
from megatron_klong.trajectory.importers.formats import Json, RowFormat
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.row_fields import row_task
from megatron_klong.trajectory.importers.swe_agent import task_of_file
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript

_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "tool": Role.TOOL}
_EXIT = "exit"
_COMMAND = re.compile(r"```(?:bash|sh|mswea_bash_command)\s*\n")
_RESULT = "<returncode>"


def recognises(row: Json) -> bool:
    """Whether a parsed value is such a run."""
    if isinstance(row, Mapping):
        return str(row.get("trajectory_format")).startswith("mini-swe-agent")
    if not isinstance(row, Sequence) or not all(isinstance(raw, Mapping) for raw in row):
        return False
    return any(_is_command(said) and _is_result(answer) for said, answer in pairwise(row))


def transcript(row: Json, source: str, number: int) -> Transcript:
    """Convert one run. Raises MalformedRow."""
    fields: Mapping[str, Json] = row if isinstance(row, Mapping) else {"messages": row}
    raws = [an_object(raw, f"messages[{n}]") for n, raw in enumerate(a_list(fields.get("messages"), "messages"))]
    task = row_task(fields) or task_of_file(source)
    return Transcript(
        id=f"{task}#{number}",
        task=task,
        source=source,
        tools=(),
        messages=paired(
            [_message(raw, f"messages[{n}]") for n, raw in enumerate(raws) if raw.get("role") != _EXIT],
        ),
        format=FORMAT.name,
    )


def _is_command(raw: Mapping[str, Json]) -> bool:
    content = raw.get("content")
    return raw.get("role") == "assistant" and isinstance(content, str) and _COMMAND.search(content) is not None


def _is_result(raw: Mapping[str, Json]) -> bool:
    return raw.get("role") == "user" and _RESULT in str(raw.get("content"))


def _message(raw: Mapping[str, Json], place: str) -> Message:
    time = _time(raw, place)
    if raw.get("object") == "response":
        return _response(raw, place, time)
    if raw.get("type") == "function_call_output":
        output = text_of(raw.get("output"), f"{place}.output")
        called = an_id(raw.get("call_id"), f"{place}.call_id")
        return Message(role=Role.TOOL, content=output, tool_call_id=called, time_seconds=time)
    name = a_text(raw.get("role"), f"{place}.role")
    if name == "assistant":
        return reply_of(raw, place, time)
    if name not in _ROLES:
        raise MalformedRow(f"{place}.role: {name!r} is unknown; correct or remove the message")
    return Message(
        role=_ROLES[name],
        content=text_of(raw.get("content"), f"{place}.content"),
        tool_call_id=an_id(raw.get("tool_call_id"), f"{place}.tool_call_id") if name == "tool" else None,
        time_seconds=time,
    )


def _time(raw: Mapping[str, Json], place: str) -> float | None:
    extra = raw.get("extra")
    return seconds_of(extra.get("timestamp"), f"{place}.extra.timestamp") if isinstance(extra, Mapping) else None


def _response(raw: Mapping[str, Json], place: str, time: float | None) -> Message:
    """One turn from the items of a reply of the Responses API."""
    where = f"{place}.output"
    items = [an_object(item, where) for item in a_list(raw.get("output"), where)]
    texts = [text_of(item.get("content"), where) for item in items if item.get("type") == "message"]
    thoughts = [text_of(item.get("content"), where) for item in items if item.get("type") == "reasoning"]
    called = [{**item, "id": item.get("call_id")} for item in items if item.get("type") == "function_call"]
    calls, sound = calls_of(called, where)
    return Message(
        role=Role.ASSISTANT,
        content="".join(texts),
        reasoning="\n".join(filter(None, thoughts)) or None,
        tool_calls=calls,
        provenance=Provenance.MODEL if sound else Provenance.MALFORMED_CALL,
        time_seconds=time,
    )


FORMAT = RowFormat(name="mini_swe_agent", recognises=recognises, transcript=transcript)
