"""pi sessions: aborted and failed turns, compaction, branches, commands of the user.

The counts of the real file were taken from its rows with a few lines of Python that share nothing with the importer.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from megatron_klong.trajectory.importers import read_transcripts, registry
from megatron_klong.trajectory.importers.pairing import NO_RESULT
from megatron_klong.trajectory.importers.pi import FORMAT
from megatron_klong.trajectory.importers.refusal import MalformedRow, Refusal
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

HEADER = {"type": "session", "id": "s1", "timestamp": "2026-01-01T00:00:00Z", "cwd": "/w", "provider": "p"}


def message(role: str, content: Any, **more: Any) -> Row:
    return {
        "type": "message",
        "timestamp": "2026-01-01T00:00:01Z",
        "message": {"role": role, "content": content, **more},
    }


def text(said: str) -> Row:
    return {"type": "text", "text": said}


def use(call: str) -> Row:
    return {"type": "toolCall", "id": call, "name": "bash", "arguments": {"command": call}}


def user(said: str) -> Row:
    return message("user", [text(said)])


def model(*blocks: Row, stop: str = "stop", **more: Any) -> Row:
    return message("assistant", list(blocks), stopReason=stop, **more)


def result(call: str, said: str = "ok") -> Row:
    return message("toolResult", [text(said)], toolCallId=call, toolName="bash", isError=False)


def tree(*rows: tuple[str, str | None, Row]) -> list[Row]:
    return [HEADER, *({**row, "id": key, "parentId": parent} for key, parent, row in rows)]


SESSION = [
    HEADER,
    user("task"),
    {"type": "thinking_level_change", "thinkingLevel": "high"},
    model({"type": "thinking", "thinking": "hm", "thinkingSignature": "x"}, text("look"), use("c1"), stop="toolUse"),
    result("c1"),
    {"type": "model_change", "provider": "q", "modelId": "n"},
    model(text("done")),
]


def read(*rows: Row) -> list[Transcript]:
    assert FORMAT.recognises(rows[:20])
    made = list(FORMAT.transcripts(iter(rows), "a.jsonl"))
    for transcript in made:
        assert_results_follow_their_calls(transcript)
        assert (transcript.format, transcript.source) == ("pi", "a.jsonl")
    return made


def test_a_session_is_read_across_a_change_of_model() -> None:
    (made,) = read(*SESSION)
    assert (made.id, made.task) == ("s1", "s1")
    task, turn, answer, done = made.messages
    assert (task.role, task.content, task.time_seconds) == (Role.USER, "task", 1767225601.0)
    assert (turn.reasoning, turn.content) == ("hm", "look")
    assert turn.tool_calls == (ToolCall(name="bash", arguments={"command": "c1"}, id="c1"),)
    assert (answer.role, answer.content, answer.tool_call_id) == (Role.TOOL, "ok", "c1")
    assert (done.content, done.provenance) == ("done", Provenance.MODEL)


@pytest.mark.parametrize(
    ("turn", "provenance", "content"),
    [
        (model(stop="aborted", errorMessage="Request was aborted"), Provenance.ABORTED, ""),
        (model(text("I w"), stop="aborted"), Provenance.ABORTED, "I w"),
        (model(text("I w"), stop="length"), Provenance.ABORTED, "I w"),
        (model(text("I w"), use("c"), stop="error", errorMessage="terminated"), Provenance.ABORTED, "I w"),
        (model(stop="error", errorMessage="overloaded"), Provenance.API_ERROR, "overloaded"),
        (model(), Provenance.MODEL, ""),
    ],
)
def test_turns_that_were_cut_off_or_failed(turn: Row, provenance: Provenance, content: str) -> None:
    (made,) = read(HEADER, user("t"), turn, user("on"))
    assert (made.messages[1].provenance, made.messages[1].content) == (provenance, content)
    assert made.messages[1].trained is (provenance is Provenance.MODEL)
    assert made.messages[-1].content == "on"


def test_commands_of_the_user_are_user_messages_unless_kept_out_of_the_context() -> None:
    ran = {"command": "ls", "output": "a.py", "exitCode": 2, "cancelled": False}
    rows = (message("bashExecution", None, **ran), message("bashExecution", None, **ran, excludeFromContext=True))
    (made,) = read(HEADER, *rows, user("t"), model(text("y")))
    assert contents(made) == ["I ran this command:\nls\nIts output:\na.py\n(exit code 2)", "t", "y"]


def test_compaction_begins_a_transcript_with_summary_and_kept_entries() -> None:
    compaction = {"type": "compaction", "summary": "so far", "firstKeptEntryIndex": 3}
    rows = (HEADER, user("task"), model(text("one")), user("and"), model(text("two")))
    before, after = read(*rows, compaction, user("more"), model(text("on")))
    assert contents(before) == ["task", "one", "and", "two"]
    assert contents(after) == ["so far", "and", "two", "more", "on"]
    assert after.id == "s1/compacted-1"
    assert after.messages[0].provenance is Provenance.COPIED
    assert provenances(after) == {Provenance.COPIED: 1, Provenance.MODEL: 1}


def test_a_tree_is_followed_to_its_last_entry_and_other_branches_stand_apart() -> None:
    main, branch = read(
        *tree(
            ("1", None, user("task")),
            ("2", "1", model(text("one"))),
            ("3", "2", user("try this")),
            ("4", "3", model(text("wrong"))),
            ("5", "2", {"type": "branch_summary", "fromId": "4", "summary": "it failed"}),
            ("6", "5", user("try that")),
            ("7", "6", model(text("right"))),
            ("8", "7", {"type": "compaction", "summary": "so far", "firstKeptEntryId": "7"}),
        )
    )
    assert contents(main) == ["task", "one", "it failed", "try that", "right"]
    assert contents(branch) == ["task", "one", "try this", "wrong"]
    assert provenances(branch) == {Provenance.COPIED: 1, Provenance.MODEL: 1}


def test_replies_repeated_from_the_session_it_was_forked_off_are_copied() -> None:
    fork = {**HEADER, "id": "s2", "timestamp": "2026-01-01T00:00:02Z", "parentSession": "/x/2026-01-01_s1.jsonl"}
    late = {**model(text("new")), "timestamp": "2026-01-01T00:00:03Z"}
    (made,) = read(fork, *SESSION[1:], late)
    assert (made.id, made.task) == ("s2", "s1")
    assert provenances(made) == {Provenance.COPIED: 2, Provenance.MODEL: 1}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (message("robot", "x"), "line 2: message.role: 'robot' is no known role"),
        (message("user", 3), "line 2: message.content: int where a list belongs"),
        (model({"type": "hologram"}), r"line 2: message.content\[0\].type: 'hologram' is no block"),
        ({"type": "compaction"}, "line 2: summary: nothing where text belongs"),
    ],
)
def test_damage_is_named_with_its_line_and_field(row: Row, field: str) -> None:
    with pytest.raises(MalformedRow, match=field):
        list(FORMAT.transcripts(iter([HEADER, row, model(text("y"))]), "a.jsonl"))


@given(
    rows=damaged(
        [
            *SESSION,
            model(text("I w"), use("c2"), use("c3"), stop="aborted"),
            user("more"),
            {"type": "compaction", "summary": "so far", "firstKeptEntryIndex": 3},
            model(use("c4"), stop="toolUse"),
            result("c4"),
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


def test_the_real_session(shared_data: Path) -> None:
    rows = rows_of(shared_data / "trajectories" / "pi" / "large-session.jsonl")
    assert FORMAT.recognises(rows[:1])
    (made,) = FORMAT.transcripts(iter(rows), "a.jsonl")
    assert_results_follow_their_calls(made)
    assert (made.turns, calls(made), count(made, Role.USER)) == (453, 391, 88)
    # 21 turns aborted, 14 of them empty, and one cut by an error after 16 calls. Of the 391 calls 373 have a result.
    assert provenances(made) == {Provenance.MODEL: 431, Provenance.ABORTED: 22}
    empty = [m for m in made.messages if m.role is Role.ASSISTANT and not m.content and not m.tool_calls]
    assert len(empty) == 14
    assert all(message.provenance is Provenance.ABORTED for message in empty)
    (failed,) = [m for m in made.messages if len(m.tool_calls) == 16]
    assert failed.provenance is Provenance.ABORTED
    assert contents(made, Role.TOOL).count(NO_RESULT) == 18
    assert count(made, Role.TOOL) == 373 + 18
    assert sum(bool(message.reasoning) for message in made.messages) == 1


def test_the_reader_of_files_finds_it(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SESSION_FORMATS", (FORMAT,))
    made = list(read_transcripts(shared_data / "trajectories" / "pi/large-session.jsonl"))
    assert [item.turns for item in made if isinstance(item, Transcript)] == [453]
    assert len(made) == 1


def test_a_line_cut_by_a_crash_ends_the_session_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SESSION_FORMATS", (FORMAT,))
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, SESSION)) + '\n{"type": "mess')
    made, refusal = read_transcripts(file)
    assert isinstance(made, Transcript)
    assert contents(made) == ["task", "look", "ok", "done"]
    assert isinstance(refusal, Refusal)


def test_only_this_format_is_claimed(shared_data: Path) -> None:
    for other in ("claude_code/entire_b6f735fbac66.jsonl", "codex/rollout-2025-09-24T19-22-20.jsonl"):
        assert not FORMAT.recognises(rows_of(shared_data / "trajectories" / other)[:20])
    assert not FORMAT.recognises([])
    assert not FORMAT.recognises([{"type": []}])


def test_what_an_extension_said_and_summaries_among_the_messages_are_context() -> None:
    (made,) = read(
        HEADER,
        user("t"),
        {"type": "custom_message", "customType": "todo", "content": "two left", "timestamp": "2026-01-01T00:00:01Z"},
        {"type": "message", "message": {"role": "branchSummary", "summary": "it was tried"}},
        message("user", "plain text"),
        model(text("y")),
    )
    assert contents(made) == ["t", "two left", "it was tried", "plain text", "y"]
    assert [one.role for one in made.messages] == [Role.USER] * 4 + [Role.ASSISTANT]
    assert made.messages[2].provenance is Provenance.COPIED
