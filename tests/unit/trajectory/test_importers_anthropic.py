"""Anthropic messages: blocks become turns and results; plain OpenAI rows are left alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from megatron_klong.trajectory.importers import claude_code, read_transcripts, registry
from megatron_klong.trajectory.importers.anthropic_messages import FORMAT
from megatron_klong.trajectory.importers.pairing import NO_RESULT, UNKNOWN_CALL
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript
from tests.unit.trajectory.logs import Row, assert_results_follow_their_calls, contents, damaged, rows_of


def text(said: str) -> Row:
    return {"type": "text", "text": said}


def use(call: str) -> Row:
    return {"type": "tool_use", "id": call, "name": "bash", "input": {"command": call}}


def result(call: str, content: Any = "ok", **more: Any) -> Row:
    return {"type": "tool_result", "tool_use_id": call, "content": content, **more}


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def model(*blocks: Row, **more: Any) -> Row:
    return {"role": "assistant", "content": list(blocks), **more}


THINKING = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
MESSAGES = [
    user("task"),
    model(THINKING, text("look"), use("c1"), use("c2")),
    user([result("c2", [text("two"), {"type": "image", "source": {}}]), result("c1", is_error=True), text("and?")]),
    model(text("done")),
]
ROW: Row = {
    "id": "t1",
    "system": [{**text("You are"), "cache_control": {"type": "ephemeral"}}],
    "messages": MESSAGES,
    "tools": [{"name": "bash", "description": "runs", "input_schema": {"type": "object"}}],
}


def read(*messages: Row) -> Transcript:
    made = FORMAT.transcript({"messages": list(messages)}, "a.jsonl", 3)
    assert_results_follow_their_calls(made)
    return made


def test_a_row_becomes_a_transcript_with_system_prompt_and_tools() -> None:
    assert FORMAT.recognises(ROW)
    made = FORMAT.transcript(ROW, "a.jsonl", 3)
    assert (made.id, made.task, made.source, made.format) == ("t1#3", "t1", "a.jsonl", "anthropic_messages")
    assert [message.role for message in made.messages] == [
        Role.SYSTEM,
        Role.USER,
        Role.ASSISTANT,
        Role.TOOL,
        Role.TOOL,
        Role.USER,
        Role.ASSISTANT,
    ]
    assert contents(made) == ["You are", "task", "look", "ok", "two\n[image]", "and?", "done"]
    function = {"name": "bash", "description": "runs", "parameters": {"type": "object"}}
    assert made.tools == ({"type": "function", "function": function},)


def test_the_reader_of_files_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ROW_FORMATS", (FORMAT,))
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "id": "t2"}))
    assert [item.id for item in read_transcripts(file) if isinstance(item, Transcript)] == ["t1#0", "t2#1"]


def test_several_calls_of_a_turn_and_their_results_stand_in_the_order_of_the_calls() -> None:
    made = read(*MESSAGES)
    assert made.messages[1].tool_calls == (
        ToolCall(name="bash", arguments={"command": "c1"}, id="c1"),
        ToolCall(name="bash", arguments={"command": "c2"}, id="c2"),
    )
    assert [message.tool_call_id for message in made.messages[2:4]] == ["c1", "c2"]


def test_thinking_is_reasoning_without_its_signature_and_redacted_thinking_is_none() -> None:
    made = read(*MESSAGES, user("t"), model(THINKING, {"type": "redacted_thinking", "data": "x"}, text("y")))
    assert made.messages[1].reasoning == "hm"
    assert made.messages[-1].reasoning is None
    assert made.messages[-1].trained


def test_what_the_model_wrote_beyond_the_schema_or_not_to_its_end_is_context_only() -> None:
    made = read(user("t"), model(text("a"), {"type": "server_tool_use", "name": "web_search"}), user("u"))
    assert (made.messages[1].content, made.messages[1].provenance) == (
        "a\n[server_tool_use]",
        Provenance.MALFORMED_CALL,
    )
    made = read(user("t"), model(text("and th"), stop_reason="max_tokens"))
    assert made.messages[1].provenance is Provenance.ABORTED


def test_calls_and_results_without_each_other_stay_and_are_marked() -> None:
    made = read(user([result("gone", "x")]), model(use("lost")), user("on"), model(use("last")))
    assert made.messages[0].provenance is Provenance.SYNTHETIC
    assert made.messages[0].tool_calls == (ToolCall(name=UNKNOWN_CALL, arguments={}, id="gone"),)
    assert contents(made)[1:5] == ["x", "", NO_RESULT, "on"]
    assert made.messages[-1].tool_calls[0].id == "last"  # the session ended here: nothing answers it


def test_a_row_of_a_table_has_its_parts_as_json_text() -> None:
    row = {**{key: json.dumps(ROW[key]) for key in ("messages", "system", "tools")}, "id": "t1", "resolved": True}
    assert FORMAT.recognises(row)
    made, plain = FORMAT.transcript(row, "a.parquet", 3), FORMAT.transcript(ROW, "a.parquet", 3)
    assert (made.messages, made.tools, made.score) == (plain.messages, plain.tools, 1.0)


def test_an_id_used_twice_answers_the_newest_turn() -> None:
    made = read(model(use("c")), user("on"), model(use("c")), user([result("c", "x")]), model(text("y")))
    assert contents(made) == ["", NO_RESULT, "on", "", "x", "y"]


@pytest.mark.parametrize(
    "row",
    [
        None,
        MESSAGES,  # a bare list is OpenAI's
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [user("t"), {"role": "assistant", "content": "y"}]},
        {"messages": [user([text("t")]), model(text("y"))]},
        {"messages": [{"role": "system", "content": "s"}, user("t")], "system": "s"},
        {"messages": [user("t"), {"role": "tool", "content": "x", "tool_call_id": "c"}], "system": "s"},
        {"messages": [user("t"), {**model(text("y")), "tool_calls": [{"function": {"name": "f"}}]}], "system": "s"},
        {"messages": [user("t")], "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [user("t"), {"role": "assistant", "content": "y"}], "system": "s", "tools": ROW["tools"]},
    ],
)
def test_openai_rows_and_other_values_are_not_claimed(row: Any) -> None:
    assert not FORMAT.recognises(row)


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        ({"role": "tool", "content": "x"}, r"messages\[0\].role: 'tool' is none of"),
        (user(3), r"messages\[0\].content: int where a list belongs"),
        (model({"type": "tool_use", "id": "c"}), r"messages\[0\].content\[0\].name: nothing where text belongs"),
        (model({**use("c"), "input": "ls"}), r"messages\[0\].content\[0\].input: str where an object belongs"),
    ],
)
def test_damage_is_named_with_its_field(broken: Row, field: str) -> None:
    with pytest.raises(MalformedRow, match=field):
        FORMAT.transcript({"messages": [broken]}, "a.jsonl", 0)


@given(messages=damaged([*MESSAGES, user("more"), model(use("c3")), user([result("c3")]), model(use("c4"))]))
def test_lost_and_doubled_messages_never_break_the_order_of_calls_and_results(messages: list[Row]) -> None:
    assert_results_follow_their_calls(FORMAT.transcript({"messages": messages}, "a.jsonl", 0))


def test_real_messages_read_as_a_row_and_as_a_session_are_the_same(shared_data: Path) -> None:
    rows = rows_of(shared_data / "trajectories" / "claude_code" / "agentcmd_full-session-four.jsonl")
    (session,) = claude_code.FORMAT.transcripts(iter(rows), "a.jsonl")
    turns: dict[str, Row] = {}
    for row in rows:  # the lines of a message together, as the API had them
        if "message" in row and row["message"]["role"] == "assistant":
            turn = turns.setdefault(row["message"]["id"], {"role": "assistant", "content": []})
            turn["content"] += row["message"]["content"]
        elif "message" in row:
            turns[row["uuid"]] = row["message"]
    row = {"messages": list(turns.values())}
    assert FORMAT.recognises(row)
    made = FORMAT.transcript(row, "a.jsonl", 0)
    assert made.turns == 30

    def untimed(messages: tuple[Message, ...]) -> list[tuple[object, ...]]:
        return [(m.role, m.content, m.reasoning, m.tool_calls, m.tool_call_id, m.provenance) for m in messages]

    assert untimed(made.messages) == untimed(session.messages)


def test_real_openai_rows_are_not_claimed(shared_data: Path) -> None:
    (file,) = (shared_data / "trajectories" / "openai_messages").glob("*.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert len(rows) == 5
    assert not any(FORMAT.recognises(row) for row in rows)


def test_a_system_message_among_the_others_and_a_tool_of_the_provider_stay_as_they_are() -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    bare = {"name": "bash", "input_schema": {"type": "object"}}
    row = {"messages": [{"role": "system", "content": "be kind"}, *MESSAGES], "tools": [search, bare]}
    made = FORMAT.transcript(row, "a.jsonl", 0)
    assert (made.messages[0].role, made.messages[0].content) == (Role.SYSTEM, "be kind")
    named = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}
    assert list(made.tools) == [search, named]
