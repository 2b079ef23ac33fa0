"""Codex rollouts: items make turns, events do not; what was injected, aborted, replaced or encrypted.

The counts of the real file were taken from its rows with a few lines of Python that share nothing with the importer.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from megatron_klong.trajectory.importers import read_transcripts, registry
from megatron_klong.trajectory.importers.codex import FORMAT
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
    rows_of,
)

META = {"id": "s1", "cwd": "/w", "cli_version": "0", "instructions": "be kind"}


def line(kind: str, **payload: Any) -> Row:
    return {"timestamp": "2026-01-01T00:00:01Z", "type": kind, "payload": payload}


def item(kind: str, **fields: Any) -> Row:
    return line("response_item", type=kind, **fields)


def said(role: str, *texts: str) -> Row:
    kind = "output_text" if role == "assistant" else "input_text"
    return item("message", role=role, content=[{"type": kind, "text": text} for text in texts])


def call(call_id: str, arguments: str = '{"command": ["ls"]}') -> Row:
    return item("function_call", name="shell", arguments=arguments, call_id=call_id)


def output(call_id: str, text: Any = "ok") -> Row:
    return item("function_call_output", call_id=call_id, output=text)


def reasoning(**fields: Any) -> Row:
    summary = [{"type": "summary_text", "text": "**Looking**"}]
    return item("reasoning", summary=summary, **{"content": None, "encrypted_content": "gAAA", **fields})


def event(kind: str, **fields: Any) -> Row:
    return line("event_msg", type=kind, **fields)


SESSION = [
    line("session_meta", **META),
    said("user", "<environment_context>\n  <cwd>/w</cwd>\n</environment_context>"),
    said("user", "task"),
    event("user_message", message="task"),
    line("turn_context", cwd="/w", model="m"),
    event("agent_reasoning", text="**Looking**"),
    reasoning(),
    said("assistant", "look"),
    event("agent_message", message="look"),
    call("c1"),
    call("c2", '{"command": ["cat", "a"]}'),
    output("c1", '{"output":"a","metadata":{"exit_code":0,"duration_seconds":0.1}}'),
    output("c2"),
    reasoning(),
    said("assistant", "done"),
]


def read(*rows: Row) -> list[Transcript]:
    made = list(FORMAT.transcripts(iter(rows), "a.jsonl"))
    for transcript in made:
        assert_results_follow_their_calls(transcript)
        assert (transcript.format, transcript.source) == ("codex", "a.jsonl")
    return made


def test_items_between_results_are_one_turn_and_events_add_nothing() -> None:
    assert FORMAT.recognises(SESSION)
    (made,) = read(*SESSION)
    assert (made.id, made.task) == ("s1", "s1")
    assert [m.role for m in made.messages] == [
        Role.USER,
        Role.USER,
        Role.ASSISTANT,
        Role.TOOL,
        Role.TOOL,
        Role.ASSISTANT,
    ]
    turn = made.messages[2]
    assert turn.content == "look"
    assert turn.tool_calls == (
        ToolCall(name="shell", arguments={"command": ["ls"]}, id="c1"),
        ToolCall(name="shell", arguments={"command": ["cat", "a"]}, id="c2"),
    )
    assert json.loads(made.messages[3].content)["metadata"]["exit_code"] == 0  # as the model was given it
    assert turn.time_seconds == 1767225601.0


def test_encrypted_reasoning_is_none_and_its_summary_is_not_rendered() -> None:
    (made,) = read(*SESSION)
    assert all(message.reasoning is None for message in made.messages)
    assert not any("Looking" in content for content in contents(made))
    plain = reasoning(content=[{"type": "reasoning_text", "text": "so"}])
    (made,) = read(said("user", "t"), plain, said("assistant", "y"))
    assert made.messages[1].reasoning == "so"


def test_injected_context_stays_a_user_message_and_instructions_are_system_messages() -> None:
    meta = line("session_meta", **META, base_instructions={"text": "You are"})
    (made,) = read(meta, said("developer", "rules"), said("user", "<user_instructions>x</user_instructions>", "y"))
    assert [(m.role, m.content) for m in made.messages] == [
        (Role.SYSTEM, "You are"),
        (Role.SYSTEM, "rules"),
        (Role.USER, "<user_instructions>x</user_instructions>\ny"),
    ]


def test_other_kinds_of_call() -> None:
    exec_action = {"type": "exec", "command": ["ls"]}
    (made,) = read(
        said("user", "t"),
        item("custom_tool_call", name="apply_patch", input="*** Begin", call_id="c1"),
        item("custom_tool_call_output", call_id="c1", output={"content": "patched", "success": True}),
        item("local_shell_call", call_id="c2", status="completed", action=exec_action),
        output("c2", [{"type": "input_text", "text": "seen"}, {"type": "input_image", "image_url": "data:"}]),
        item("web_search_call", status="completed", action={"type": "search", "query": "q"}),
        said("assistant", "found"),
    )
    turns = [m for m in made.messages if m.role is Role.ASSISTANT]
    assert [(c.name, c.arguments) for m in turns for c in m.tool_calls] == [
        ("apply_patch", {"input": "*** Begin"}),
        ("local_shell", exec_action),
        ("web_search", {"type": "search", "query": "q"}),
    ]
    assert [m.content for m in made.messages if m.role is Role.TOOL] == ["patched", "seen\n[input_image]", NO_RESULT]
    assert [m.provenance for m in turns] == [
        Provenance.MODEL,
        Provenance.MODEL,
        Provenance.MALFORMED_CALL,
        Provenance.MODEL,
    ]


def test_a_reply_with_a_part_that_is_no_text_is_context_only() -> None:
    refused = item("message", role="assistant", content=[{"type": "refusal", "refusal": "no"}])
    (made,) = read(said("user", "t"), refused)
    assert (made.messages[1].content, made.messages[1].provenance) == ("[refusal]", Provenance.MALFORMED_CALL)


def test_arguments_that_are_no_object_are_context_only() -> None:
    (made,) = read(said("user", "t"), call("c1", '{"command": ["l'), output("c1"))
    assert made.messages[1].provenance is Provenance.MALFORMED_CALL
    assert made.messages[1].tool_calls[0].arguments == {"arguments": '{"command": ["l'}


@pytest.mark.parametrize(
    ("items", "provenance"),
    [
        ([said("assistant", "I w")], Provenance.ABORTED),
        ([reasoning()], Provenance.ABORTED),
        ([said("assistant", "run"), call("c1")], Provenance.MODEL),
        ([call("c1"), output("c1", "aborted by user")], Provenance.MODEL),
    ],
)
def test_turn_aborted_marks_a_turn_that_was_still_open(items: list[Row], provenance: Provenance) -> None:
    (made,) = read(said("user", "t"), *items, event("turn_aborted", reason="interrupted"), said("user", "on"))
    assert made.messages[1].provenance is provenance
    assert made.turns == 1


def test_an_abort_before_the_first_item_leaves_nothing() -> None:
    (made,) = read(said("user", "t"), event("turn_aborted", reason="interrupted"), said("user", "on"))
    assert contents(made) == ["t", "on"]


def test_compaction_ends_a_transcript() -> None:
    before, after = read(*SESSION, line("compacted", message="summary"), said("assistant", "on"))
    assert contents(before)[-1] == "done"
    assert contents(after) == [contents(before)[0], "task", "summary", "on"]
    assert (after.id, after.task) == ("s1/part-1", "s1")
    assert after.messages[2].provenance is Provenance.COPIED


def test_a_replacement_history_is_what_the_next_transcript_begins_with() -> None:
    history = [said("user", "task")["payload"], said("assistant", "kept")["payload"], {"type": "compaction"}]
    meta = line("session_meta", **META, base_instructions={"text": "You are"})
    compacted = line("compacted", message="", replacement_history=history)
    _, after = read(meta, *SESSION[1:], compacted, said("assistant", "on"))
    assert contents(after) == ["You are", "task", "kept", "[compaction]", "on"]
    assert provenances(after) == {Provenance.COPIED: 1, Provenance.MODEL: 1}


def test_turns_taken_back_are_not_in_the_next_transcript() -> None:
    asked = [said("user", "more"), said("assistant", "bad")]
    before, after = read(*SESSION, *asked, event("thread_rolled_back", num_turns=1), said("user", "else"), reasoning())
    assert contents(before)[-2:] == ["more", "bad"]
    assert contents(after)[-3:] == ["done", "else", ""]
    assert provenances(after) == {Provenance.COPIED: 2, Provenance.ABORTED: 1}


def test_bare_items_of_the_older_generation() -> None:
    header = {"id": "s0", "timestamp": "2025-06-01T00:00:00Z", "instructions": None}
    rows = [header, {"record_type": "state"}, *[row["payload"] for row in SESSION if row["type"] == "response_item"]]
    assert FORMAT.recognises(rows[:1])
    (made,) = read(*rows)
    assert (made.id, made.turns, calls(made)) == ("s0", 2, 2)
    assert made.messages[2].time_seconds is None


def test_a_fork_belongs_to_the_task_of_its_parent() -> None:
    fork = line("session_meta", **{**META, "id": "s2", "forked_from_id": "s1"})
    (made,) = read(fork, *SESSION)
    assert (made.id, made.task) == ("s2", "s1")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (item("message", role="user", content=3), "line 2: content: int where a list belongs"),
        (item("function_call", arguments="{}", call_id="c"), "line 2: name: nothing where text belongs"),
        (line("session_meta"), "line 2: id: nothing where text belongs"),
        ({"type": "response_item", "payload": None}, "line 2: payload: nothing where an object belongs"),
    ],
)
def test_damage_is_named_with_its_line_and_field(row: Row, field: str) -> None:
    with pytest.raises(MalformedRow, match=field):
        list(FORMAT.transcripts(iter([said("user", "t"), row]), "a.jsonl"))


@given(
    rows=damaged(
        [
            *SESSION,
            said("user", "more"),
            call("c3"),
            event("turn_aborted", reason="interrupted"),
            event("thread_rolled_back", num_turns=1),
            line("compacted", message="summary"),
            said("assistant", "on"),
        ]
    )
)
def test_lost_and_doubled_lines_never_break_the_order_of_calls_and_results(rows: list[Row]) -> None:
    try:
        made = list(FORMAT.transcripts(iter(rows), "a.jsonl"))
    except MalformedRow:
        return
    for transcript in made:
        assert_results_follow_their_calls(transcript)


def test_the_real_rollout(shared_data: Path) -> None:
    rows = rows_of(shared_data / "trajectories" / "codex" / "rollout-2025-09-24T19-22-20.jsonl")
    assert FORMAT.recognises(rows[:20])
    (made,) = FORMAT.transcripts(iter(rows), "a.jsonl")
    assert_results_follow_their_calls(made)
    # 132 token counts, one a completion: 123 end in a call, 9 in a message; 125 of them begin with encrypted reasoning.
    assert (made.turns, calls(made), count(made, Role.TOOL)) == (132, 123, 123)
    assert count(made, Role.USER) == 15
    assert sum(text.startswith("<environment_context>") for text in contents(made, Role.USER)) == 2
    assert not any(message.reasoning for message in made.messages)
    # 4 turn_aborted: two behind a rejected patch, whose turn is complete, and two before the first item of a turn.
    assert provenances(made) == {Provenance.MODEL: 132}
    assert contents(made, Role.TOOL).count("patch rejected by user") == 2
    assert NO_RESULT not in contents(made)


def test_the_reader_of_files_finds_it(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SESSION_FORMATS", (FORMAT,))
    made = list(read_transcripts(shared_data / "trajectories" / "codex/rollout-2025-09-24T19-22-20.jsonl"))
    assert [item.turns for item in made if isinstance(item, Transcript)] == [132]
    assert len(made) == 1


def test_only_this_format_is_claimed(shared_data: Path) -> None:
    for other in ("claude_code/entire_b6f735fbac66.jsonl", "pi/large-session.jsonl"):
        assert not FORMAT.recognises(rows_of(shared_data / "trajectories" / other)[:20])
    assert not FORMAT.recognises([])
    assert not FORMAT.recognises([{"messages": [{"role": "user", "content": "t"}]}])
    assert not FORMAT.recognises([{"type": [], "payload": {}}])


def test_the_program_s_own_book_keeping_is_not_shown() -> None:
    rows = [line("session_meta", **META), said("user", "t"), item("ghost_snapshot", commit="c"), said("assistant", "y")]
    (made,) = FORMAT.transcripts(iter(rows), "a.jsonl")
    assert contents(made)[-2:] == ["t", "y"]
