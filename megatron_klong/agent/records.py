"""Inspect AI logs -> episode records, one file an episode.

Always: every sample of a log yields a record; one that was cut or broke has the ending that says so.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalSample, read_eval_log, resolve_sample_attachments
from inspect_ai.model import ChatMessage
from pydantic_core import from_json

from megatron_klong.agent.ending import Ending
from megatron_klong.agent.failures import explain_failure
from megatron_klong.agent.messages import to_message, turn_record
from megatron_klong.agent.scaffold import STORE_KEY
from megatron_klong.agent.violations import find_violations
from megatron_klong.sandbox.egress.rules import Blacklist
from megatron_klong.serve.turns import TurnStore
from megatron_klong.trajectory.episode import (
    EpisodeRecord,
    FailureRecord,
    MessageRecord,
    PolicyRecord,
    ViolationRecord,
    write_episode,
)


def export_records(log_file: Path, folder: Path, turns: TurnStore | None = None) -> list[Path]:
    """Write a record for every sample of a log; `turns`: what was sampled, if a policy of our own played."""
    log = read_eval_log(str(log_file), resolve_attachments=True)
    samples = log.samples or []
    return [write_episode(record_of(sample, log.eval.model, log_file.name, turns), folder) for sample in samples]


def record_of(sample: EvalSample, model: str, log_name: str, turns: TurnStore | None = None) -> EpisodeRecord:
    """The record of one sample; `model` is Inspect's model name. Raises UnknownTurn for a turn `turns` lacks."""
    # not of the events, whose messages are many times those of the sample
    sample = resolve_sample_attachments(sample.model_copy(update={"events": []}), "full")
    metadata = sample.metadata or {}
    notes = sample.store.get(STORE_KEY) or {}
    ending, error = _ending(sample, notes)
    played = [turn for message in sample.messages if (turn := turn_record(message))]
    seconds = (sample.total_time or 0.0) + notes.get("seconds_before", 0.0)
    record = EpisodeRecord(
        task=str(metadata.get("task", sample.id)),
        model=model.rsplit("/", 1)[-1],
        epoch=metadata.get("rollout") or sample.epoch,
        ending=ending,
        error=error,
        score=_score(sample),
        seconds=seconds,
        refused_requests=notes.get("refused_requests", 0),
        windows=1 + max((turn.window for turn in played if turn.window is not None), default=-1),
        messages=[_message_record(message, turns) for message in sample.messages],
        tools=from_json(notes.get("tools", "[]")),
        turns=played,
        context=PolicyRecord.model_validate(notes["context"]) if "context" in notes else None,
        tokenizer_sha256=notes.get("tokenizer_sha256"),
        log=log_name,
        sample=sample.uuid or str(sample.id),
    )
    return record.model_copy(update={"failure": _failure(record), "violations": _violations(record, metadata)})


def _failure(record: EpisodeRecord) -> FailureRecord | None:
    unjudged = record.ending == Ending.FINISHED and record.score is None
    if unjudged or record.ending == Ending.SUSPENDED:
        return None
    found = explain_failure(record)
    if found is None:
        return None
    return FailureRecord(category=found.category, message=found.message, excerpt=found.excerpt)


def _violations(record: EpisodeRecord, metadata: Mapping[str, Any]) -> list[ViolationRecord]:
    file = Path(str(metadata.get("folder", ""))) / "blacklist.txt"
    if not file.is_file():  # a log read elsewhere, without its tasks
        return []
    messages = [message.message() for message in record.messages]
    return [
        ViolationRecord(kind=found.kind, message=found.message, rule=found.rule, excerpt=found.text)
        for found in find_violations(messages, Blacklist.read(file))
        if found.is_violation
    ]


def _message_record(message: ChatMessage, turns: TurnStore | None) -> MessageRecord:
    turn = turn_record(message)
    sampled = turns[turn.key].reply if turns is not None and turn and turn.key else None
    return MessageRecord.of(replace(to_message(message, sampled), halved=turn.halved if turn else 0))


def _score(sample: EvalSample) -> float | None:
    values = [score.value for score in (sample.scores or {}).values()]
    if not values or not isinstance(values[0], int | float) or math.isnan(values[0]):  # NaN: Inspect's "not scored"
        return None
    return float(values[0])


def _ending(sample: EvalSample, notes: dict[str, Any]) -> tuple[Ending, str | None]:
    if not notes:
        return Ending.SANDBOX_FAILED, sample.error.message if sample.error else "never started"
    if notes["ending"]:
        return Ending(notes["ending"]), notes["error"]
    if sample.limit and sample.limit.type == "time":
        return Ending.HARD_TIMED_OUT, None
    return Ending.AGENT_FAILED, sample.error.message if sample.error else "cut short"
