"""ATIF (Agent Trajectory Interchange Format, v1.0 to v1.8): one trajectory object -> transcript.

A step is a message and the results of its calls. What a step does not show as what the model said or saw is undone
or marked:
- converters of session logs (claude-code, codex) wrote a step for each block of a reply, and for a call a text of
  their own ("Executed Bash <id>"): the text is left out, the call joins the step whose reply it belongs to;
- is_copied_context is context; llm_call_count 0, or more than 1 (several replies as one), is no reply of the model;
- reasoning of codex is a summary, which is not what the model thought: it is missing reasoning;
- a call that the provider ran itself (no id, no result) has arguments the converter made up;
- trajectories of subagents, their steps among the agent's own, images and audio are refused: no transcript holds them.
ATIF has no field for the task. Runs of one task must share one, so it is made from the text of the task.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from megatron_klong.trajectory.atif_writer import EXTRA_KEY
from megatron_klong.trajectory.importers.fields import a_list, a_text, an_id, an_object
from megatron_klong.trajectory.importers.formats import Json, RowFormat
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Reading, Role, Sampled, ToolCall, Transcript

_VERSIONS = frozenset(f"ATIF-v1.{minor}" for minor in range(9))
_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "agent": Role.ASSISTANT}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """A step as messages. block: whether the step is a call that may belong to the reply of the step before."""

    reply: Message | None  # None: the step is nothing but results
    results: tuple[Message, ...]
    block: bool = False


def recognises(value: Json) -> bool:
    """Whether a parsed value is an ATIF trajectory."""
    return (
        isinstance(value, Mapping)
        and str(value.get("schema_version", "")).startswith("ATIF-")
        and isinstance(value.get("steps"), Sequence)
    )


def transcript(value: Json, source: str, number: int) -> Transcript:
    """Convert one trajectory. Raises MalformedRow."""
    version = value["schema_version"]
    if version not in _VERSIONS:
        raise MalformedRow(f"schema_version: {version} is not known, ATIF-v1.0 to v1.8 are; convert it to one of them")
    if value.get("subagent_trajectories"):
        raise MalformedRow("subagent_trajectories: runs of other agents; write each to a file of its own, then drop it")
    agent = _object(value, "agent", "trajectory")
    ours = _ours(value)
    tokenizer_sha256 = ours.get("tokenizer_sha256")
    summaries = agent.get("name") == "codex"
    turns: list[_Turn] = []
    steps = value["steps"]
    has_metrics = any(isinstance(step, Mapping) and step.get("metrics") for step in steps)
    for index, step in enumerate(steps):
        turn = _turn(step, f"steps[{index}]", ids_are_known=tokenizer_sha256 is not None, summaries=summaries)
        if turn.block and turns and _joins(turns[-1], has_metrics=has_metrics):
            turn = _joined(turns.pop(), turn)
        turns.append(turn)
    messages = tuple(message for turn in turns for message in ((turn.reply,) if turn.reply else ()) + turn.results)
    if not ours:  # what we wrote is as it was
        messages = paired(messages)
    task = ours.get("task") or _task(messages)
    run = ours.get("id") or value.get("trajectory_id") or value.get("session_id") or task
    return Transcript(
        id=str(run) if "id" in ours else f"{run}#{number}",
        task=str(task),
        source=source,
        tools=tuple(an_object(tool, "agent.tool_definitions") for tool in _list(agent, "tool_definitions", "agent")),
        messages=messages,
        score=ours.get("score"),
        tokenizer_sha256=tokenizer_sha256,
        format=FORMAT.name,
    )


FORMAT = RowFormat(name="atif", recognises=recognises, transcript=transcript)


# -- steps


def _turn(step: Json, place: str, *, ids_are_known: bool, summaries: bool) -> _Turn:
    if not isinstance(step, Mapping) or not isinstance(step.get("source"), str) or step["source"] not in _ROLES:
        raise MalformedRow(f"{place}.source: must be system, user or agent")
    extra = _optional(step, "extra", place)
    if extra.get("is_sidechain"):
        raise MalformedRow(f"{place}.extra.is_sidechain: a subagent's step among the agent's; import the session's log")
    results = _results(step, place)
    text = _text(step.get("message"), f"{place}.message")
    if step["source"] != "agent":
        nothing_but_results = bool(results) and not text
        reply = Message(role=_ROLES[step["source"]], content=text, time_seconds=_time(step, place))
        return _Turn(reply=None if nothing_but_results else reply, results=results)
    calls, well_formed = _calls(step, place)
    written_by_converter = text in {
        written for call in calls for written in (f"Executed {call.name} {call.id}", f"Executed {call.name}")
    }
    run_by_provider = not results and any(call.id == "" for call in calls)
    metrics = _optional(step, "metrics", place)
    reasoning = step.get("reasoning_content")
    provenance = _provenance(step, place, well_formed=well_formed and not run_by_provider)
    reply = Message(
        role=Role.ASSISTANT,
        content="" if written_by_converter else text,
        reasoning=None if summaries or reasoning is None else a_text(reasoning, f"{place}.reasoning_content"),
        tool_calls=calls,
        trained=not step.get("is_copied_context"),
        provenance=provenance,
        time_seconds=_time(step, place),
        sampled=_sampled(metrics, _ours(step), place) if ids_are_known else None,
    )
    return _Turn(reply=reply, results=results, block=written_by_converter and not metrics)


def _joins(before: _Turn, *, has_metrics: bool) -> bool:
    """Whether a call without metrics is one more block of the reply before it.

    Converters give the metrics of a reply to its first block. Where they give none at all, only a text with no call
    yet is surely of the same reply.
    """
    reply = before.reply
    if reply is None or reply.role is not Role.ASSISTANT or reply.provenance is Provenance.COPIED:
        return False
    return has_metrics or not reply.tool_calls


def _joined(before: _Turn, block: _Turn) -> _Turn:
    assert before.reply is not None and block.reply is not None  # noqa: PT018 - both are agent steps
    marks = [turn.provenance for turn in (before.reply, block.reply) if turn.provenance is not Provenance.MODEL]
    reply = replace(
        before.reply,
        tool_calls=before.reply.tool_calls + block.reply.tool_calls,
        provenance=marks[0] if marks else Provenance.MODEL,
    )
    return replace(before, reply=reply, results=before.results + block.results)


def _provenance(step: Mapping[str, Any], place: str, *, well_formed: bool) -> Provenance:
    if "provenance" in _ours(step):
        return _member(Provenance, _ours(step)["provenance"], f"{place}.extra.{EXTRA_KEY}.provenance")
    if step.get("is_copied_context"):
        return Provenance.COPIED
    if step.get("llm_call_count") not in (None, 1):
        return Provenance.SYNTHETIC
    if step.get("model_name") == "<synthetic>":  # how Claude Code names its own error texts
        return Provenance.API_ERROR
    if _optional(step, "extra", place).get("stop_reason") == "max_tokens":
        return Provenance.ABORTED
    return Provenance.MODEL if well_formed else Provenance.MALFORMED_CALL


def _calls(step: Mapping[str, Any], place: str) -> tuple[tuple[ToolCall, ...], bool]:
    """The calls of a step, and whether the model's own arguments of all of them are known."""
    calls: list[ToolCall] = []
    raw = _optional(step, "extra", place).get("raw_arguments")
    well_formed = not isinstance(raw, str) or _is_object(raw)
    for number, call in enumerate(_list(step, "tool_calls", place)):
        here = f"{place}.tool_calls[{number}]"
        if not isinstance(call, Mapping) or not isinstance(call.get("function_name"), str):
            raise MalformedRow(f"{here}.function_name: missing; ATIF wants a string")
        identifier = an_id(call.get("tool_call_id"), f"{here}.tool_call_id")
        if _ours(call).get("made_id"):
            identifier = None
        calls.append(ToolCall(id=identifier, name=call["function_name"], arguments=_object(call, "arguments", here)))
    return tuple(calls), well_formed


def _results(step: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    found: list[Message] = []
    observation = _optional(step, "observation", place)
    made_ids = [
        call.get("tool_call_id")
        for call in _list(step, "tool_calls", place)
        if isinstance(call, Mapping) and _ours(call).get("made_id")
    ]
    for number, result in enumerate(_list(observation, "results", f"{place}.observation")):
        here = f"{place}.observation.results[{number}]"
        if not isinstance(result, Mapping):
            raise MalformedRow(f"{here}: not an object")
        if result.get("content") is None and result.get("subagent_trajectory_ref"):
            raise MalformedRow(f"{here}: what a subagent answered is not in this file; import its trajectory alone")
        ours = _ours(result)
        identifier = an_id(result.get("source_call_id"), f"{here}.source_call_id")
        found.append(
            Message(
                role=Role.TOOL,
                content=_as_shown(_text(result.get("content"), f"{here}.content"), step),
                tool_call_id=ours.get("call_id") if identifier is None or identifier in made_ids else identifier,
                reading=_member(Reading, ours.get("reading", Reading.NONE), f"{here}.extra.{EXTRA_KEY}.reading"),
                time_seconds=_time(ours, here),
            )
        )
    return tuple(found)


def _as_shown(content: str, step: Mapping[str, Any]) -> str:
    """The result without what the claude-code converter appended; it kept what the model was shown beside it."""
    metadata = (step.get("extra") or {}).get("tool_result_metadata")
    raw = metadata.get("raw_tool_result") if isinstance(metadata, Mapping) else None
    shown = raw.get("content") if isinstance(raw, Mapping) else None
    return shown if isinstance(shown, str) and content.startswith(shown.strip()) else content


# -- fields


def _sampled(metrics: Mapping[str, Any], ours: Mapping[str, Any], place: str) -> Sampled | None:
    if metrics.get("completion_token_ids") is None:
        return None
    here = f"{place}.metrics.completion_token_ids"
    ids = a_list(metrics["completion_token_ids"], here)
    if not all(type(identifier) is int for identifier in ids) or (ours.get("sampled_end") and not ids):
        raise MalformedRow(f"{here}: not the token ids of a reply; the file is damaged, export it again")
    if ours.get("sampled_end"):
        return Sampled(body=tuple(ids[:-1]), end=ids[-1])
    return Sampled(body=tuple(ids), end=None)


def _task(messages: Sequence[Message]) -> str:
    """The last thing a user said before the first reply: what stands before it is of the session, such as its date."""
    said = ""
    for message in messages:
        if message.role is Role.ASSISTANT:
            break
        if message.role is Role.USER:
            said = message.content
    return f"prompt-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def _text(content: Json, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise MalformedRow(f"{place}: neither text nor a list of parts")
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise MalformedRow(f"{place}[{number}]: a part of type {kind}; only text can be trained on, leave this out")
    return "\n".join(part["text"] for part in content)


def _time(fields: Mapping[str, Any], place: str) -> float | None:
    stamp = fields.get("timestamp")
    if stamp is None:
        return None
    try:
        moment = datetime.fromisoformat(stamp)
    except (TypeError, ValueError) as error:
        raise MalformedRow(f"{place}.timestamp: {stamp!r} is not an ISO 8601 time") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _list(fields: Mapping[str, Any], key: str, place: str) -> Sequence[Json]:
    return a_list(fields.get(key) or (), f"{place}.{key}")


def _object(fields: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    found = fields.get(key)
    if not isinstance(found, Mapping):
        raise MalformedRow(f"{place}.{key}: not an object")
    return found


def _optional(fields: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    return {} if fields.get(key) is None else _object(fields, key, place)


def _member[Kind: StrEnum](kind: type[Kind], value: Json, place: str) -> Kind:
    try:
        return kind(value)
    except ValueError as error:
        raise MalformedRow(f"{place}: {value!r} is not one of {', '.join(kind)}") from error


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _ours(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """What our own writer added, if it wrote this."""
    extra = fields.get("extra")
    ours = extra.get(EXTRA_KEY) if isinstance(extra, Mapping) else None
    return ours if isinstance(ours, Mapping) else {}
