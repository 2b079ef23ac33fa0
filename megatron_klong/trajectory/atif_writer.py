"""Transcript -> ATIF (Agent Trajectory Interchange Format, v1.7), so that other trainers and viewers can read it.

Always: a step is a message that is no tool result; a result stands in the step that called for it, one without such
a step in a system step of its own; a message that is not trained is marked so that a reader which knows only ATIF
will not train on it either.
What ATIF has no field for stands under `extra["klong"]`, where only `importers/atif.py` looks for it: who made a
message (beyond "copied" and "no model call"), what a result showed of the paper, ids of calls that had none, which
token ended a reply, and the transcript's id, task, score and tokenizer. The source file and the importer are left out.
Source of the format: `harbor.models.trajectories` (laude-institute/harbor), which forbids unknown keys.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_klong.files import write_atomically
from megatron_klong.trajectory.episode import EPISODE_SUFFIX, EpisodeRecord
from megatron_klong.trajectory.schema import Message, Provenance, Reading, Role, ToolCall, Transcript

SCHEMA_VERSION = "ATIF-v1.7"
EXTRA_KEY = "klong"
ATIF_SUFFIX = ".trajectory.json"
_SOURCES = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "agent", Role.TOOL: "system"}


def to_atif(
    transcript: Transcript,
    *,
    agent_name: str,
    agent_version: str,
    model_name: str | None = None,
    log_probs: Mapping[int, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """The transcript as one ATIF trajectory, ready for json.dumps.

    log_probs: by number of the message, one for each sampled id, the token that ended the reply included.
    Raises ValueError for a transcript without messages and for log-probabilities that match no sampled ids.
    """
    if not transcript.messages:
        raise ValueError(f"{transcript.id}: no messages, and ATIF wants a step; leave this transcript out")
    _check_log_probs(transcript, log_probs or {})
    steps: list[dict[str, Any]] = []
    for number, message in enumerate(transcript.messages):
        if message.role is Role.TOOL and steps and steps[-1]["source"] == "agent":
            _add_result(steps[-1], message)
        else:
            steps.append(_step(len(steps) + 1, message, (log_probs or {}).get(number)))
    metrics = [step["metrics"] for step in steps if "metrics" in step]
    return {
        "schema_version": SCHEMA_VERSION,
        "session_id": transcript.id,
        "trajectory_id": transcript.id,
        "agent": _without_none(
            name=agent_name,
            version=agent_version,
            model_name=model_name,
            tool_definitions=[dict(tool) for tool in transcript.tools] or None,
        ),
        "steps": steps,
        "final_metrics": _without_none(
            total_steps=len(steps),
            total_completion_tokens=sum(made["completion_tokens"] for made in metrics) if metrics else None,
        ),
        "extra": _extra(
            id=transcript.id,
            task=transcript.task,
            score=transcript.score,
            tokenizer_sha256=transcript.tokenizer_sha256,
        ),
    }


def write_atif(record: EpisodeRecord, folder: Path, log_probs: Mapping[str, Sequence[float]]) -> Path:
    """Write one episode under the name of its record. log_probs: by key of the turn; may lack turns.

    Raises ValueError as `to_atif` does.
    """
    replies = [number for number, message in enumerate(record.messages) if message.role is Role.ASSISTANT]
    by_message = {
        number: log_probs[turn.key]
        for number, turn in zip(replies, record.turns, strict=False)  # an episode may end before its last record
        if turn.key is not None and turn.key in log_probs
    }
    trajectory = to_atif(
        record.transcript(record.log),
        agent_name="megatron_klong",
        agent_version=str(record.version),
        model_name=record.model,
        log_probs=by_message,
    )
    path = folder / (record.file_name.removesuffix(EPISODE_SUFFIX) + ATIF_SUFFIX)
    write_atomically(path, json.dumps(trajectory, ensure_ascii=False, indent=1))
    return path


def _check_log_probs(transcript: Transcript, log_probs: Mapping[int, Sequence[float]]) -> None:
    for number, values in log_probs.items():
        sampled = transcript.messages[number].sampled if 0 <= number < len(transcript.messages) else None
        if sampled is None:
            raise ValueError(f"{transcript.id}: log-probabilities for message {number}, which was not sampled")
        ids = len(sampled.body) + (sampled.end is not None)
        if len(values) != ids:
            raise ValueError(
                f"{transcript.id}: message {number} has {ids} sampled ids, {len(values)} log-probabilities"
            )


def _step(step_id: int, message: Message, log_probs: Sequence[float] | None) -> dict[str, Any]:
    head = {
        "step_id": step_id,
        **_without_none(timestamp=_timestamp(message.time_seconds)),
        "source": _SOURCES[message.role],
    }
    if message.role is Role.TOOL:  # nothing here called for it
        result = _result(message, None, message.tool_call_id)
        return {**head, "message": "", "observation": {"results": [result]}}
    if message.role is not Role.ASSISTANT:
        return {**head, "message": message.content}
    # ATIF allows neither reasoning nor token ids where no model was called.
    no_model_call = message.provenance is Provenance.SYNTHETIC and message.reasoning is None and message.sampled is None
    copied = not message.trained and not no_model_call
    by_atif = Provenance.SYNTHETIC if no_model_call else Provenance.COPIED if copied else Provenance.MODEL
    calls = [_call(call, f"call_{step_id}_{number}") for number, call in enumerate(message.tool_calls)]
    return {
        **head,
        "message": message.content,
        **_without_none(
            reasoning_content=message.reasoning,
            tool_calls=calls or None,
            metrics=_metrics(message, log_probs),
            is_copied_context=True if copied else None,
            llm_call_count=0 if no_model_call else 1 if message.provenance is Provenance.MODEL else None,
            extra=_extra(
                provenance=str(message.provenance) if message.provenance is not by_atif else None,
                sampled_end=True if message.sampled and message.sampled.end is not None else None,
            ),
        ),
    }


def _call(call: ToolCall, made_id: str) -> dict[str, Any]:
    return {
        "tool_call_id": made_id if call.id is None else call.id,
        "function_name": call.name,
        "arguments": dict(call.arguments),
        **_without_none(extra=_extra(made_id=True if call.id is None else None)),
    }


def _metrics(message: Message, log_probs: Sequence[float] | None) -> dict[str, Any] | None:
    if message.sampled is None:
        return None
    end = [] if message.sampled.end is None else [message.sampled.end]
    ids = [*message.sampled.body, *end]
    return {
        "completion_tokens": len(ids),
        "completion_token_ids": ids,
        **_without_none(logprobs=None if log_probs is None else list(log_probs)),
    }


def _add_result(step: dict[str, Any], message: Message) -> None:
    """Append a result to the step before it, under the id of a call of that step."""
    results = step.setdefault("observation", {"results": []})["results"]
    calls = step.get("tool_calls", [])
    if message.tool_call_id is not None:
        known = any(call["tool_call_id"] == message.tool_call_id and "extra" not in call for call in calls)
        results.append(_result(message, *((message.tool_call_id, None) if known else (None, message.tool_call_id))))
        return
    # Without ids the results stand in the order of the calls.
    call = calls[len(results)] if len(results) < len(calls) else None
    results.append(_result(message, call["tool_call_id"] if call is not None and "extra" in call else None, None))


def _result(message: Message, source_call_id: str | None, call_id: str | None) -> dict[str, Any]:
    reading = None if message.reading is Reading.NONE else str(message.reading)
    return {
        **_without_none(source_call_id=source_call_id),
        "content": message.content,
        **_without_none(
            extra=_extra(call_id=call_id, reading=reading, timestamp=_timestamp(message.time_seconds)),
        ),
    }


def _timestamp(time_seconds: float | None) -> str | None:
    return None if time_seconds is None else datetime.fromtimestamp(time_seconds, UTC).isoformat()


def _extra(**fields: object) -> dict[str, Any] | None:
    found = _without_none(**fields)
    return {EXTRA_KEY: found} if found else None


def _without_none(**fields: object) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
