"""ATIF export: its rules hold for every transcript, and its reader gives the transcript back."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.serve.turns import SampledTurn, write_turns
from megatron_klong.trajectory.atif_writer import to_atif
from megatron_klong.trajectory.episode import write_episode
from megatron_klong.trajectory.importers import atif
from megatron_klong.trajectory.schema import Message, Provenance, Reading, Role, Sampled, ToolCall, Transcript
from tests.unit.trajectory.builders import assistant, bash, tool, transcript, transcripts, user
from tests.unit.trajectory.test_episode import record

ROOT = {"schema_version", "session_id", "trajectory_id", "agent", "steps", "final_metrics", "extra"}
STEP = {"step_id", "timestamp", "source", "message", "observation", "extra"}
AGENT_STEP = STEP | {"reasoning_content", "tool_calls", "metrics", "is_copied_context", "llm_call_count"}
CALL = {"tool_call_id", "function_name", "arguments", "extra"}
RESULT = {"source_call_id", "content", "extra"}
METRICS = {"completion_tokens", "completion_token_ids", "logprobs"}


def written(made: Transcript, log_probs: dict[int, list[float]] | None = None) -> dict[str, Any]:
    """As a reader of the file gets it."""
    found = to_atif(made, agent_name="klong", agent_version="1", model_name="m", log_probs=log_probs)
    parsed: dict[str, Any] = json.loads(json.dumps(found))
    return parsed


@st.composite
def any_transcripts(draw: st.DrawFn) -> Transcript:
    """With messages of every provenance, ids of calls, times, and results that stand behind a user's words."""
    made = draw(transcripts())
    messages: list[Message] = []
    for number, message in enumerate(made.messages):
        changes: dict[str, Any] = {"time_seconds": draw(st.none() | st.just(1.5e9 + number + 0.25))}
        if message.role is Role.ASSISTANT:
            changes["provenance"] = draw(st.sampled_from([Provenance.MODEL, *Provenance]))
            if draw(st.booleans()):
                calls = [replace(call, id=f"c{number}.{n}") for n, call in enumerate(message.tool_calls)]
                changes["tool_calls"] = tuple(calls)
        if message.role is Role.TOOL:
            owner = next((m for m in reversed(messages) if m.role is Role.ASSISTANT), assistant())
            changes["tool_call_id"] = draw(st.sampled_from([None, "gone", *(call.id for call in owner.tool_calls)]))
        messages.append(replace(message, **changes))
        if draw(st.integers(0, 9)) == 0:
            messages.append(tool("late"))
    return replace(made, messages=tuple(messages), score=draw(st.none() | st.floats(0, 1)))


@settings(max_examples=50)
@given(made=any_transcripts())
def test_the_rules_of_the_format_hold(made: Transcript) -> None:
    found = written(made)
    assert set(found) == ROOT
    assert set(found["agent"]) <= {"name", "version", "model_name", "tool_definitions"}
    assert [step["step_id"] for step in found["steps"]] == list(range(1, len(found["steps"]) + 1))
    for step in found["steps"]:
        assert set(step) <= (AGENT_STEP if step["source"] == "agent" else STEP)
        assert isinstance(step["message"], str)
        ids = [call["tool_call_id"] for call in step.get("tool_calls", [])]
        assert all(isinstance(identifier, str) for identifier in ids)
        assert all(set(call) <= CALL and isinstance(call["arguments"], dict) for call in step.get("tool_calls", []))
        for result in step.get("observation", {"results": []})["results"]:
            assert set(result) <= RESULT
            assert result.get("source_call_id") in [*ids, None]
        if step.get("llm_call_count") == 0:
            assert not {"metrics", "reasoning_content"} & set(step)
        assert set(step.get("metrics", {})) <= METRICS


@settings(max_examples=50)
@given(made=any_transcripts())
def test_reading_what_was_written_gives_the_transcript_back(made: Transcript) -> None:
    again = atif.transcript(written(made), "test", 0)
    assert again.messages == made.messages
    assert again == replace(made, format="atif")


@settings(max_examples=50)
@given(made=any_transcripts())
def test_a_reader_that_knows_only_atif_trains_on_nothing_that_is_not_trained(made: Transcript) -> None:
    agent_steps = [step for step in written(made)["steps"] if step["source"] == "agent"]
    replies = [message for message in made.messages if message.role is Role.ASSISTANT]
    for step, message in zip(agent_steps, replies, strict=True):
        is_model_output = not step.get("is_copied_context") and step.get("llm_call_count") != 0
        assert is_model_output == message.trained


def every_key(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from every_key(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from every_key(inner)


def test_sampled_ids_go_with_their_log_probabilities() -> None:
    reply = replace(assistant("hi"), sampled=Sampled(body=(5, 6), end=7))
    cut = replace(assistant("hi"), sampled=Sampled(body=(8,), end=None))
    made = transcript(user("t"), reply, user("go on"), cut)
    steps = written(made, {1: [-0.5, -0.25, -1.0]})["steps"]
    assert steps[1]["metrics"] == {
        "completion_tokens": 3,
        "completion_token_ids": [5, 6, 7],
        "logprobs": [-0.5, -0.25, -1.0],
    }
    assert steps[3]["metrics"] == {"completion_tokens": 1, "completion_token_ids": [8]}


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        ({1: [-0.5]}, "message 1 has 2 sampled ids, 1 log-probabilities"),
        ({0: [-0.5]}, "message 0, which was not sampled"),
        ({9: [-0.5]}, "message 9, which was not sampled"),
    ],
)
def test_log_probabilities_of_other_ids_are_refused(log_probs: dict[int, list[float]], message: str) -> None:
    made = transcript(user("t"), replace(assistant("hi"), sampled=Sampled(body=(5,), end=6)))
    with pytest.raises(ValueError, match=message):
        written(made, log_probs)


def test_a_transcript_without_messages_is_refused() -> None:
    with pytest.raises(ValueError, match="no messages"):
        written(transcript())


def test_a_plain_transcript_needs_no_marks_of_ours() -> None:
    call = ToolCall(id="c", name="bash", arguments={"cmd": "ls"})
    result = Message(role=Role.TOOL, content="a", tool_call_id="c")
    steps = written(transcript(user("t"), assistant("so", reasoning="hm", calls=[call]), result))["steps"]
    assert "extra" not in set(every_key(steps))
    assert steps[1]["observation"] == {"results": [{"source_call_id": "c", "content": "a"}]}


def test_the_program_turns_episode_records_into_trajectories(tmp_path: Path) -> None:
    made = transcript(user("t"), assistant(calls=[bash("ls")]), tool("a", Reading.COMPLETE), assistant("done"))
    episode = write_episode(record(made), tmp_path)
    command = [sys.executable, "tools/export_atif.py", "--episodes", str(episode), "--out", str(tmp_path / "atif")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (file,) = (tmp_path / "atif").iterdir()
    assert ran.stdout.strip() == str(file)
    assert file.name == "t__m__1.trajectory.json"
    again = atif.transcript(json.loads(file.read_text()), "test", 0)
    assert (again.id, again.task, again.score, again.messages) == ("t/m/1", "t", 0.5, made.messages)


def test_the_program_adds_the_log_probabilities_of_sampled_turns(tmp_path: Path) -> None:
    reply = replace(assistant("hi"), sampled=Sampled(body=(104, 105), end=256))
    whole = record(transcript(user("t"), reply))
    keyed = whole.model_copy(update={"turns": [whole.turns[0].model_copy(update={"key": "k"})]})
    sampled = SampledTurn(
        key="k",
        prompt_tokens=1,
        prompt_sha256="",
        ids=(104, 105, 256),
        log_probs=(-0.5, -0.25, -1.0),
        stopped=True,
        policy_epoch=(),
    )
    write_turns([sampled], tmp_path / "a.turns.jsonl")
    command = [sys.executable, "tools/export_atif.py", "--episodes", str(write_episode(keyed, tmp_path))]
    command += ["--turns", str(tmp_path / "a.turns.jsonl"), "--out", str(tmp_path / "atif")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    steps = json.loads(Path(ran.stdout.strip()).read_text())["steps"]
    assert steps[1]["metrics"]["completion_token_ids"] == [104, 105, 256]
    assert steps[1]["metrics"]["logprobs"] == [-0.5, -0.25, -1.0]


def test_the_program_names_the_record_it_cannot_read(tmp_path: Path) -> None:
    broken = tmp_path / "a.episode.json"
    broken.write_text("{")
    command = [sys.executable, "tools/export_atif.py", "--episodes", str(broken), "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert str(broken) in ran.stderr
