"""All formats together: each recognises its own and nothing else, and every real file is read or refused for cause."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.trajectory.importers import read_transcripts
from megatron_klong.trajectory.importers.checks import check
from megatron_klong.trajectory.importers.refusal import MalformedRow, Refusal, RefusalReason
from megatron_klong.trajectory.importers.registry import ROW_FORMATS, SESSION_FORMATS
from megatron_klong.trajectory.schema import Message, Role, ToolCall, Transcript

ASKED = {"role": "user", "content": "t"}
SAID = {"role": "assistant", "content": "a"}
ROWS: dict[str, list[Any]] = {
    "klong_episode": [{"format": "klong-episode", "version": 1, "messages": [ASKED, SAID]}],
    "atif": [
        {
            "schema_version": "ATIF-v1.5",
            "session_id": "s",
            "agent": {"name": "a", "version": "1"},
            "steps": [
                {"step_id": 1, "source": "user", "message": "t"},
                {"step_id": 2, "source": "agent", "message": "a"},
            ],
        }
    ],
    "swe_agent": [{"history": [{**ASKED, "agent": "m"}, {**SAID, "agent": "m"}], "trajectory": [], "info": {}}],
    "mini_swe_agent": [
        {"trajectory_format": "mini-swe-agent-1.1", "info": {}, "messages": [ASKED, SAID]},
        [ASKED, {**SAID, "content": "```bash\nls\n```"}, {**ASKED, "content": "<returncode>0</returncode>"}],
    ],
    "openhands": [
        {
            "instance_id": "i",
            "instruction": "t",
            "history": [
                {"id": 0, "source": "user", "action": "message", "args": {"content": "t"}, "message": "t"},
                {"id": 1, "source": "agent", "action": "message", "args": {"content": "a"}, "message": "a"},
            ],
        }
    ],
    "gemini_cli": [
        {
            "sessionId": "s",
            "projectHash": "p",
            "messages": [
                {"id": "1", "type": "user", "content": "t"},
                {"id": "2", "type": "gemini", "content": "a"},
            ],
        }
    ],
    "anthropic_messages": [
        {"messages": [ASKED, {**SAID, "content": [{"type": "tool_use", "id": "1", "name": "n", "input": {}}]}]},
    ],
    "glm": [
        {"messages": [ASKED, {**SAID, "tool_calls": [{"tool_call_id": "1", "name": "n", "arguments": "{}"}]}]},
        {"messages": [ASKED, SAID, {"role": "tool", "content": [{"output": "o"}]}]},
    ],
    "openai_messages": [
        [ASKED, SAID],
        {"messages": [ASKED, {**SAID, "content": None}], "tools": []},
        {"conversations": [ASKED, {**SAID, "content": [{"type": "text", "text": "a"}]}]},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "t"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
        [{"from": "human", "value": "t"}, {"from": "gpt", "value": "a"}],
    ],
    "completion": [
        {"prompt": "t", "completion": "a"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"instruction": "t", "input": "", "output": "a", "history": []},
    ],
}
SESSIONS: dict[str, list[Any]] = {
    "claude_code": [
        {"type": "user", "uuid": "1", "parentUuid": None, "sessionId": "s", "message": ASKED},
        {"type": "assistant", "uuid": "2", "parentUuid": "1", "sessionId": "s", "message": {**SAID, "id": "m"}},
    ],
    "codex": [
        {"timestamp": "2025-01-01T00:00:00Z", "type": "session_meta", "payload": {"id": "s", "cwd": "/"}},
        {
            "timestamp": "2025-01-01T00:00:01Z",
            "type": "response_item",
            "payload": {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        },
    ],
    "pi": [
        {"type": "session", "id": "s", "timestamp": "2025-01-01T00:00:00Z", "cwd": "/"},
        {"type": "message", "timestamp": "2025-01-01T00:00:01Z", "message": ASKED},
    ],
    "openhands_events": [
        {
            "kind": "MessageEvent",
            "id": "1",
            "source": "user",
            "timestamp": "2025-01-01T00:00:00",
            "llm_message": {"role": "user", "content": [{"type": "text", "text": "t"}]},
        }
    ],
}


def claims(value: Any) -> list[str]:
    """The formats that call a value theirs: as a row, and, if it is a list of objects, as a session."""
    found = [format.name for format in ROW_FORMATS if format.recognises(value)]
    if isinstance(value, list) and value and all(isinstance(line, Mapping) for line in value):
        found += [format.name for format in SESSION_FORMATS if format.recognises(value)]
    return found


def test_every_format_has_an_example_here() -> None:
    assert [format.name for format in ROW_FORMATS] == list(ROWS)
    assert [format.name for format in SESSION_FORMATS] == list(SESSIONS)


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_a_row_is_claimed_by_its_format_alone(name: str, row: Any) -> None:
    assert claims(row) == [name]
    assert isinstance(row, list) or claims([row]) == []


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_is_claimed_by_its_format_alone(name: str) -> None:
    lines = SESSIONS[name]
    assert claims(lines) == [name]
    assert [claims(line) for line in lines] == [[]] * len(lines)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "klong_episode"])
def test_the_importer_names_its_format(tmp_path: Path, name: str) -> None:
    for row in ROWS[name]:
        (tmp_path / "a.json").write_text(json.dumps([row]))
        if not isinstance(row, list):
            items = list(read_transcripts(tmp_path / "a.json"))
            assert [item.format if isinstance(item, Transcript) else "refused" for item in items] in (
                [name],
                ["refused"],
            )


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "type", "id"]), inner, max_size=2)
    ),
    max_leaves=3,
)
EXAMPLES = [(name, row) for name, rows in ROWS.items() for row in rows]


@settings(max_examples=300)
@given(example=st.sampled_from(EXAMPLES), data=st.data())
def test_a_row_with_a_spoilt_field_is_read_or_refused(example: tuple[str, Any], data: st.DataObject) -> None:
    spoilt = _spoilt(json.loads(json.dumps(example[1])), data)
    for format in ROW_FORMATS:
        if format.recognises(spoilt):
            try:
                made = format.transcript(spoilt, "source", 0)
            except MalformedRow:
                continue
            refusal = check(made)
            assert refusal is None or refusal.detail
    for session in SESSION_FORMATS:
        session.recognises([spoilt] if isinstance(spoilt, dict) else [{}])


@settings(max_examples=200)
@given(name=st.sampled_from(sorted(SESSIONS)), data=st.data())
def test_a_session_with_a_spoilt_field_is_read_or_refused(name: str, data: st.DataObject) -> None:
    lines = [_spoilt(json.loads(json.dumps(line)), data) for line in SESSIONS[name]]
    lines = [line for line in lines if isinstance(line, dict)]
    for format in SESSION_FORMATS:
        if lines and format.recognises(lines):
            try:
                made = list(format.transcripts(iter(lines), "source"))
            except MalformedRow:
                continue
            assert all(isinstance(transcript, Transcript) for transcript in made)
            refusals = [refusal for refusal in map(check, made) if refusal is not None]
            assert all(refusal.detail for refusal in refusals)


def _spoilt(value: Any, data: st.DataObject) -> Any:
    """The value with something in it replaced by something else."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: _spoilt(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 9)):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], _spoilt(value[place], data), *value[place + 1 :]]
    return data.draw(junk)


def calling(*ids: str | None) -> Message:
    return Message(role=Role.ASSISTANT, tool_calls=tuple(ToolCall(name="n", arguments={}, id=one) for one in ids))


def result(identity: str | None) -> Message:
    return Message(role=Role.TOOL, content="r", tool_call_id=identity)


SPEECH = Message(role=Role.ASSISTANT, content="a")
QUESTION = Message(role=Role.USER, content="t")


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ([QUESTION], RefusalReason.NO_TURN, "no assistant message"),
        ([result("1"), SPEECH], RefusalReason.MALFORMED, "messages[0]: a tool's result before any turn"),
        ([SPEECH, result("1")], RefusalReason.MALFORMED, "messages[1]: a tool's result after a turn that called none"),
        ([calling("1"), result("2")], RefusalReason.MALFORMED, "messages[1]: a tool's result for the call '2'"),
        ([calling("1"), calling("2"), result("1")], RefusalReason.MALFORMED, "its call is in an earlier turn"),
        ([SPEECH, Message(role=Role.USER, reasoning="r")], RefusalReason.MALFORMED, "only assistants have them"),
        ([calling("1", "2"), result("2"), result("1"), SPEECH], None, ""),
        ([calling(None), result("1")], None, ""),
        ([calling("1"), result(None), QUESTION, SPEECH], None, ""),
        ([calling("1"), QUESTION, result("1")], None, ""),
    ],
)
def test_one_check_decides_what_a_transcript_is(
    messages: list[Message], reason: RefusalReason | None, detail: str
) -> None:
    refusal = check(Transcript(id="i", task="t", source="s", tools=(), messages=tuple(messages)))
    assert (refusal and refusal.reason) == reason
    assert refusal is None or detail in refusal.detail


def test_a_session_is_read_up_to_a_damaged_line(tmp_path: Path) -> None:
    lines = [json.dumps(line) for line in SESSIONS["claude_code"]]
    more = json.dumps({**SESSIONS["claude_code"][1], "uuid": "3", "parentUuid": "2", "message": {**SAID, "id": "n"}})
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, more[:-20], more]))
    made, refusal = read_transcripts(tmp_path / "a.jsonl")
    assert isinstance(made, Transcript)
    assert (made.format, made.turns) == ("claude_code", 1)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefusalReason.TRUNCATED
    assert "line 3" in refusal.detail
    assert "1 lines after it are not" in refusal.detail


def test_a_session_may_be_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SESSIONS["claude_code"], indent=1))
    (made,) = read_transcripts(tmp_path / "a.json")
    assert isinstance(made, Transcript)
    assert made.format == "claude_code"


# file -> format, transcripts, turns; or the reason of its one refusal
REAL: dict[str, tuple[str, int, int] | RefusalReason] = {
    "trajectories/aider/20240725_214144_rl_lr_adaptation_aider.txt": RefusalReason.PLAIN_TEXT,
    "trajectories/atif/04-heston-haiku.result.json": RefusalReason.UNKNOWN_FORMAT,
    "trajectories/atif/04-heston-haiku.trajectory.json": ("atif", 1, 59),
    "trajectories/atif/07-codex.trajectory.json": ("atif", 1, 7),
    "trajectories/claude_code/agentcmd_full-session-four.jsonl": ("claude_code", 1, 30),
    "trajectories/claude_code/entire_b6f735fbac66.jsonl": ("claude_code", 3, 220),
    "trajectories/codex/rollout-2025-09-24T19-22-20.jsonl": ("codex", 1, 132),
    "trajectories/gemini/session-2025-10-27T19-55.json": ("gemini_cli", 1, 15),
    "trajectories/glm/trajectory_search.json": ("glm", 1, 5),
    "trajectories/inspect/metr_small.eval": ("inspect", 6, 76),
    "trajectories/mini_swe_agent/github_issue.traj.json": ("mini_swe_agent", 1, 10),
    "trajectories/mini_swe_agent/local.traj.json": ("mini_swe_agent", 1, 2),
    "trajectories/openai_messages/swe-gym_openhands_sampled.json": ("openai_messages", 5, 88),
    "trajectories/openhands/multi_swe_bench_output.jsonl": ("openhands", 3, 105),
    "trajectories/pi/large-session.jsonl": ("pi", 1, 453),
    "trajectories/sharegpt/glaive_toolcall_en_demo.json": ("sharegpt", 300, 957),
    "trajectories/swe_agent/marshmallow-1867_function_calling.traj": ("swe_agent", 1, 13),
    "trajectories/swe_agent/pandas_pr_53856.traj": ("swe_agent", 1, 17),
    "trajectories/swe_agent/pydicom-1458_old_thought_action.traj": ("swe_agent", 1, 12),
    "paperbench/runs/rice_gpt-4.1/rollout.eval": ("inspect", 1, 94),
}


def test_every_real_file_is_read_or_refused_for_its_reason(shared_data: Path) -> None:
    files = [file for file in (shared_data / "trajectories").rglob("*") if file.is_file()]
    files += (shared_data / "paperbench" / "runs").glob("*/rollout.eval")
    found: dict[str, tuple[str, int, int] | RefusalReason] = {}
    for file in files:
        items = list(read_transcripts(file))
        made = [item for item in items if isinstance(item, Transcript)]
        refusals = [item for item in items if isinstance(item, Refusal)]
        assert bool(made) != bool(refusals), (file, refusals)
        name = str(file.relative_to(shared_data))
        if refusals:
            (refusal,) = refusals
            found[name] = refusal.reason
        else:
            (format,) = {transcript.format for transcript in made}
            found[name] = (format, len(made), sum(transcript.turns for transcript in made))
            assert len({transcript.id for transcript in made}) == len(made)
    for name, what in sorted(found.items()):
        print(f"{name:70} {what}")
    assert found == REAL


def test_refusals_of_real_files_say_what_they_are(shared_data: Path) -> None:
    (log,) = read_transcripts(shared_data / "trajectories/aider/20240725_214144_rl_lr_adaptation_aider.txt")
    assert isinstance(log, Refusal)
    assert "aider chat log" in log.detail
    (outcome,) = read_transcripts(shared_data / "trajectories/atif/04-heston-haiku.result.json")
    assert isinstance(outcome, Refusal)
    assert "task_name, trial_name" in outcome.detail
    grades = shared_data / "paperbench/runs/rice_gpt-4.1"
    assert {
        Counter(item.reason for item in read_transcripts(file) if isinstance(item, Refusal)).most_common()[0]
        for file in grades.glob("*.json")
    } == {(RefusalReason.UNKNOWN_FORMAT, 1)}
