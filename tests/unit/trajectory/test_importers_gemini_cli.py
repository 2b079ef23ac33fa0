"""Gemini CLI sessions: turns with their results inside, display thoughts, failed and cancelled calls.

The counts of the real file were taken from its messages with Python that shares nothing with the importer.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from megatron_klong.trajectory.importers import read_transcripts, registry
from megatron_klong.trajectory.importers.gemini_cli import FORMAT
from megatron_klong.trajectory.importers.pairing import NO_RESULT
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Provenance, Role, ToolCall, Transcript
from tests.unit.trajectory.logs import (
    Row,
    assert_results_follow_their_calls,
    calls,
    contents,
    count,
    damaged,
    provenances,
)


def message(kind: str, content: Any, **more: Any) -> Row:
    return {"id": "x", "timestamp": "2026-01-01T00:00:01Z", "type": kind, "content": content, **more}


def use(call: str, *responses: Any, **more: Any) -> Row:
    parts = [{"functionResponse": {"id": call, "name": "ls", "response": response}} for response in responses]
    return {"id": call, "name": "ls", "args": {"path": call}, "result": parts, "status": "success", **more}


def session(*messages: Row) -> Row:
    return {"sessionId": "s1", "projectHash": "h", "messages": list(messages)}


def read(*messages: Row) -> Transcript:
    assert FORMAT.recognises(session(*messages))
    made = FORMAT.transcript(session(*messages), "a.json", 0)
    assert_results_follow_their_calls(made)
    assert (made.format, made.source, made.id, made.task) == ("gemini_cli", "a.json", "s1", "s1")
    return made


MESSAGES = [
    message("user", "task"),
    message(
        "gemini",
        "look",
        thoughts=[{"subject": "Looking", "description": "I am"}],
        toolCalls=[use("c1", {"output": "a.py"}), use("c2", {"error": "no"}), use("c3", {"output": "x", "code": 1})],
    ),
    message("gemini", "done"),
]


def test_calls_and_the_results_inside_them_become_turn_and_tool_messages() -> None:
    made = read(*MESSAGES)
    assert contents(made) == ["task", "look", "a.py", "no", '{"output": "x", "code": 1}', "done"]
    assert made.messages[1].tool_calls[0] == ToolCall(name="ls", arguments={"path": "c1"}, id="c1")
    assert [m.tool_call_id for m in made.messages[2:5]] == ["c1", "c2", "c3"]
    assert made.messages[0].time_seconds == 1767225601.0


def test_thoughts_are_a_display_text_and_not_reasoning() -> None:
    assert read(*MESSAGES).messages[1].reasoning is None


def test_a_cancelled_call_has_no_result_and_parts_that_are_no_text_are_named() -> None:
    image = {"inlineData": {"mimeType": "image/png", "data": ""}}
    mixed = use("c2", {"output": "seen"})
    mixed["result"].append(image)
    made = read(
        message("user", [{"text": "t"}, image]),
        message("gemini", "", toolCalls=[use("c1", status="cancelled"), mixed]),
    )
    assert contents(made) == ["t\n[inlineData]", "", NO_RESULT, "seen\n[inlineData]"]


def test_errors_are_marked_notes_are_not_messages_and_silence_is_a_cut() -> None:
    made = read(message("user", "t"), message("info", "v2"), message("error", "quota"), message("gemini", ""))
    assert contents(made) == ["t", "quota", ""]
    assert [m.provenance for m in made.messages[1:]] == [Provenance.API_ERROR, Provenance.ABORTED]


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        (message("robot", "x"), r"messages\[0\].type: 'robot' is no known message type"),
        (message("gemini", "", toolCalls=[{}]), r"messages\[0\].toolCalls\[0\].name: nothing where text belongs"),
        (message("gemini", "", toolCalls=3), r"messages\[0\].toolCalls: int where a list belongs"),
        (message("user", "x", timestamp="noon"), r"messages\[0\].timestamp: 'noon'"),
    ],
)
def test_damage_is_named_with_its_field(broken: Row, field: str) -> None:
    with pytest.raises(MalformedRow, match=field):
        FORMAT.transcript(session(broken), "a.json", 0)


@given(messages=damaged([*MESSAGES, message("user", "more"), message("gemini", "", toolCalls=[use("c4")])]))
def test_lost_and_doubled_messages_never_break_the_order_of_calls_and_results(messages: list[Row]) -> None:
    assert_results_follow_their_calls(FORMAT.transcript(session(*messages), "a.json", 0))


def test_the_real_session(shared_data: Path) -> None:
    (file,) = (shared_data / "trajectories" / "gemini").glob("*.json")
    value = json.loads(file.read_text(encoding="utf-8"))
    assert FORMAT.recognises(value)
    made = FORMAT.transcript(value, "a.json", 0)
    assert_results_follow_their_calls(made)
    assert (made.turns, calls(made), count(made, Role.TOOL), count(made, Role.USER)) == (15, 13, 13, 3)
    assert provenances(made) == {Provenance.MODEL: 15}
    assert NO_RESULT not in contents(made)  # the cancelled and the failed call have an error for a result
    assert contents(made, Role.TOOL)[0].startswith("Directory ")
    # Why thoughts are no reasoning: 46 words shown for 36 tokens thought, and none for 461.
    thinking = [(m["tokens"]["thoughts"], m.get("thoughts")) for m in value["messages"] if m["type"] == "gemini"]
    assert len(thinking[0][1][0]["description"].split()) > thinking[0][0] == 36
    assert (461, []) in thinking
    assert not any(m.reasoning for m in made.messages)


def test_the_reader_of_files_finds_it(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ROW_FORMATS", (FORMAT,))
    (file,) = (shared_data / "trajectories" / "gemini").glob("*.json")
    (made,) = read_transcripts(file)
    assert isinstance(made, Transcript)
    assert made.turns == 15


@pytest.mark.parametrize("value", [None, [], {"messages": []}, {"sessionId": "s", "messages": [{"role": "user"}]}])
def test_other_values_are_not_claimed(value: Any) -> None:
    assert not FORMAT.recognises(value)


def test_parts_that_are_plain_text_and_a_response_of_another_name_are_shown_as_they_are() -> None:
    call = {**use("c1", {"listing": "a.py"}), "result": [*use("c1", {"listing": "a.py"})["result"], "and more"]}
    made = read(message("user", ["t", {"text": "u"}]), message("gemini", "", toolCalls=[call]), message("gemini", "y"))
    assert contents(made) == ["t\nu", "", '{"listing": "a.py"}\nand more', "y"]
