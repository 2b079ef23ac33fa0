"""Claude Code sessions: one turn over several lines, the tree, compaction, side chains, what no model said.

The counts of the real files were taken from their rows with a few lines of Python that share nothing with the importer.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from megatron_klong.trajectory.importers import read_transcripts, registry
from megatron_klong.trajectory.importers.claude_code import FORMAT
from megatron_klong.trajectory.importers.pairing import NO_RESULT, UNKNOWN_CALL
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

SESSION = "s1"


def user(uuid: str, parent: Any, content: Any, **more: Any) -> Row:
    return row(uuid, parent, "user", {"role": "user", "content": content}, **more)


def model(uuid: str, parent: str | None, message: str, *blocks: Row, stop: str | None = None, **more: Any) -> Row:
    body = {"id": message, "role": "assistant", "model": "m", "content": list(blocks), "stop_reason": stop}
    return row(uuid, parent, "assistant", body, **more)


def row(uuid: str, parent: str | None, kind: str, message: Row, **more: Any) -> Row:
    return {
        "type": kind,
        "uuid": uuid,
        "parentUuid": parent,
        "sessionId": SESSION,
        "timestamp": "2026-01-01T00:00:01Z",
        "isSidechain": False,
        "message": message,
        **more,
    }


def text(said: str) -> Row:
    return {"type": "text", "text": said}


def thinking(thought: str) -> Row:
    return {"type": "thinking", "thinking": thought, "signature": "c2ln"}


def use(call: str) -> Row:
    return {"type": "tool_use", "id": call, "name": "Bash", "input": {"command": call}}


def result(call: str, content: Any = "ok", **more: Any) -> Row:
    return {"type": "tool_result", "tool_use_id": call, "content": content, **more}


def boundary(uuid: str, before: str) -> Row:
    return {
        "type": "system",
        "subtype": "compact_boundary",
        "uuid": uuid,
        "parentUuid": None,
        "logicalParentUuid": before,
        "sessionId": SESSION,
    }


def read(*rows: Row) -> list[Transcript]:
    assert FORMAT.recognises(rows[:20])
    made = list(FORMAT.transcripts(iter(rows), "a.jsonl"))
    for transcript in made:
        assert_results_follow_their_calls(transcript)
        assert (transcript.format, transcript.source, transcript.task) == ("claude_code", "a.jsonl", SESSION)
    assert len({transcript.id for transcript in made}) == len(made)
    return made


# One turn with two parallel calls over four lines; the first result hangs beside the path, as in real logs.
PARALLEL = [
    user("u1", None, "task"),
    model("a1", "u1", "m1", thinking("hm")),
    model("a2", "a1", "m1", text("look")),
    model("a3", "a2", "m1", use("c1")),
    model("a4", "a3", "m1", use("c2")),
    user("r2", "a4", [result("c2", "second")]),
    user("r1", "a3", [result("c1", "first")]),
    model("a5", "r2", "m2", text("done")),
]


def test_lines_with_one_message_id_are_one_turn_and_parallel_results_stand_in_the_order_of_their_calls() -> None:
    (made,) = read(*PARALLEL)
    task, turn, first, second, done = made.messages
    assert (task.role, task.content, task.time_seconds) == (Role.USER, "task", 1767225601.0)
    assert (turn.reasoning, turn.content) == ("hm", "look")
    assert turn.tool_calls[0] == ToolCall(name="Bash", arguments={"command": "c1"}, id="c1")
    assert [first.content, second.content] == ["first", "second"]
    assert (done.content, done.provenance) == ("done", Provenance.MODEL)


def test_a_copied_line_says_nothing_new() -> None:
    (made,) = read(*PARALLEL, model("z", "a5", "m1", text("look")), user("u9", "a5", "on"))
    assert contents(made) == ["task", "look", "first", "second", "done", "on"]


def test_text_beside_results_is_a_user_message_behind_them_and_images_are_named() -> None:
    beside = [text("note"), result("c1", [text("out"), {"type": "image", "source": {}}], is_error=True)]
    (made,) = read(user("u", None, "t"), model("a", "u", "m", use("c1")), user("r", "a", beside))
    assert [(m.role, m.content) for m in made.messages[2:]] == [(Role.TOOL, "out\n[image]"), (Role.USER, "note")]


def test_redacted_thinking_is_missing_reasoning() -> None:
    redacted = {"type": "redacted_thinking", "data": "x"}
    (made,) = read(user("u", None, "t"), model("a", "u", "m", thinking("part"), redacted, text("yes")))
    assert (made.messages[1].reasoning, made.messages[1].content) == (None, "yes")
    assert made.messages[1].trained


def test_a_rewound_branch_is_a_transcript_of_its_own_whose_shared_turns_are_copied() -> None:
    main, branch = read(
        user("u1", None, "task"),
        model("a1", "u1", "m1", text("one")),
        user("u2", "a1", "try this"),
        model("a2", "u2", "m2", text("wrong")),
        user("u3", "a1", "try that"),
        model("a3", "u3", "m3", text("right")),
    )
    assert contents(main) == ["task", "one", "try that", "right"]
    assert contents(branch) == ["task", "one", "try this", "wrong"]
    assert (main.id, branch.id) == ("s1", "s1/branch-1")
    assert [m.provenance for m in branch.messages if m.role is Role.ASSISTANT] == [
        Provenance.COPIED,
        Provenance.MODEL,
    ]


def test_a_branch_on_which_the_model_said_nothing_is_not_a_transcript() -> None:
    (made,) = read(
        user("u1", None, "task"),
        user("x1", "u1", "<command-name>/exit</command-name>"),
        model("a1", "u1", "m1", text("one")),
    )
    assert contents(made) == ["task", "one"]


def test_compaction_ends_a_transcript_and_the_next_begins_with_the_summary() -> None:
    before, after = read(
        *PARALLEL,
        boundary("b", "a5"),
        user("u9", "b", "summary", isCompactSummary=True),
        model("a9", "u9", "m9", text("on")),
    )
    assert contents(before)[-1] == "done"
    assert [(m.role, m.content, m.provenance) for m in after.messages] == [
        (Role.USER, "summary", Provenance.COPIED),
        (Role.ASSISTANT, "on", Provenance.MODEL),
    ]
    assert after.id == "s1/compacted-1"


def test_side_chains_are_transcripts_behind_the_session() -> None:
    main, two, one, other = read(
        user("u1", None, "task"),
        user("p1", None, "find", isSidechain=True),
        model("a1", "u1", "m1", use("c1")),
        user("q1", "a1", "count", isSidechain=True, agentId="x"),
        model("p2", "p1", "m2", text("found"), isSidechain=True),
        model("q2", "q1", "m3", text("three"), isSidechain=True, agentId="x"),
        user("s1", "a1", "weigh", isSidechain=True),
        model("s2", "s1", "m4", text("much"), isSidechain=True),
        user("r1", "a1", [result("c1")]),
    )
    assert contents(main) == ["task", "", "ok"]
    assert (two.id, contents(two)) == ("s1/side", ["weigh", "much"])
    assert (one.id, contents(one)) == ("s1/side/branch-1", ["find", "found"])
    assert (other.id, contents(other)) == ("s1/agent-x", ["count", "three"])


@pytest.mark.parametrize(
    ("before", "provenance"),
    [
        ((text("I w"),), Provenance.ABORTED),
        ((thinking("I w"),), Provenance.ABORTED),
        ((text("all"), use("c1")), Provenance.ABORTED),  # no result: it may have been cut in its second call
    ],
)
def test_an_interrupted_turn_is_aborted(before: tuple[Row, ...], provenance: Provenance) -> None:
    interrupt = user("i", "a", [text("[Request interrupted by user]")])
    (made,) = read(user("u", None, "t"), model("a", "u", "m", *before), interrupt)
    assert made.messages[1].provenance is provenance
    assert made.messages[-1].content == "[Request interrupted by user]"


def test_an_interrupt_behind_a_finished_turn_changes_nothing() -> None:
    said = model("a", "u", "m", text("all"), stop="end_turn")
    (made,) = read(user("u", None, "t"), said, user("i", "a", "[Request interrupted by user]"))
    assert made.messages[1].provenance is Provenance.MODEL
    used = (model("a", "u", "m", use("c1")), user("r", "a", [result("c1")]))
    for interrupt in (
        user("i", "r", "[Request interrupted by user for tool use]"),
        user("i", "a", "[Request interrupted by user]"),  # the result hangs beside the path
    ):
        (made,) = read(user("u", None, "t"), *used, interrupt)
        assert [(m.role, m.provenance) for m in made.messages[1:3]] == [
            (Role.ASSISTANT, Provenance.MODEL),
            (Role.TOOL, Provenance.MODEL),
        ]


def test_an_interrupt_between_a_call_and_its_result_changes_nothing() -> None:
    interrupt = user("i", "a", "[Request interrupted by user]")
    (made,) = read(user("u", None, "t"), model("a", "u", "m", use("c1")), interrupt, user("r", "i", [result("c1")]))
    assert contents(made) == ["t", "", "ok", "[Request interrupted by user]"]
    assert made.messages[1].provenance is Provenance.MODEL


def test_what_no_model_wrote_is_marked() -> None:
    error = model("e", "u", "m1", text("API Error: 529"), isApiErrorMessage=True)
    error["message"]["model"] = "<synthetic>"
    canned = model("n", "e", "m2", text("No response requested."), isApiErrorMessage=False)
    canned["message"]["model"] = "<synthetic>"
    older = model("o", "n", "m3", text("hi"), sessionId="s0")
    cut = model("c", "o", "m4", text("and then"), stop="max_tokens")
    silent = model("s", "c", "m5", thinking("hm"))
    (made,) = read(user("u", None, "t"), error, canned, older, cut, silent, user("z", "s", "bye"))
    assert [m.provenance for m in made.messages[1:6]] == [
        Provenance.API_ERROR,
        Provenance.SYNTHETIC,
        Provenance.COPIED,
        Provenance.ABORTED,
        Provenance.ABORTED,
    ]
    assert not any(message.trained for message in made.messages[1:6])


def test_calls_and_results_without_each_other_stay_and_are_marked() -> None:
    (made,) = read(
        user("u", None, "t"),
        model("a", "u", "m1", use("lost"), use("c2")),
        user("r", "a", [result("c2", "two"), result("gone", "three")]),
        model("b", "r", "m2", use("last")),
    )
    assert [(m.role, m.content) for m in made.messages[2:4]] == [(Role.TOOL, NO_RESULT), (Role.TOOL, "two")]
    assert made.messages[4].provenance is Provenance.SYNTHETIC
    assert made.messages[4].tool_calls == (ToolCall(name=UNKNOWN_CALL, arguments={}, id="gone"),)
    assert made.messages[5].content == "three"
    assert made.messages[-1].tool_calls[0].id == "last"  # the session ended here: nothing answers it


def test_rows_without_message_hold_nothing_and_a_missing_parent_is_the_row_before() -> None:
    snapshot = {"type": "file-history-snapshot", "messageId": "x", "snapshot": {}}
    no_message = {"type": "user", "uuid": "n", "parentUuid": "u", "sessionId": SESSION}
    (made,) = read(
        snapshot, user("u", "cut off", "t"), no_message, model("a", "n", "m", text("y")), user("v", "?", "on")
    )
    assert contents(made) == ["t", "y", "on"]


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        (user("u", "u", "t"), "line 1: parents run in a circle"),
        (user("u", None, 3), "line 1: message.content: int where a list belongs"),
        (user("u", None, [{"type": "text"}]), r"line 1: message.content\[0\].text: nothing where text belongs"),
        (user("u", None, "t", timestamp="noon"), "line 1: timestamp: 'noon' is no ISO 8601 time"),
        (user("u", 7, "t"), "line 1: parentUuid: int where text belongs"),
    ],
)
def test_damage_is_named_with_its_line_and_field(broken: Row, field: str) -> None:
    with pytest.raises(MalformedRow, match=field):
        list(FORMAT.transcripts(iter([broken, model("a", "u", "m", text("y"))]), "a.jsonl"))


@given(rows=damaged([*PARALLEL, boundary("b", "a5"), user("u9", "b", "s", isCompactSummary=True), *[
    model("a9", "u9", "m9", text("on"), use("c9")),
    user("i9", "a9", [text("[Request interrupted by user]")]),
    user("p1", "a9", "find", isSidechain=True),
    model("p2", "p1", "m8", text("found"), isSidechain=True),
]]))  # fmt: skip
def test_lost_and_doubled_lines_never_break_the_order_of_calls_and_results(rows: list[Row]) -> None:
    try:
        made = list(FORMAT.transcripts(iter(rows), "a.jsonl"))
    except MalformedRow:
        return
    spoken = {row["message"]["id"] for row in rows if row["type"] == "assistant"}
    own = sum((provenances(transcript) for transcript in made), Counter[Provenance]())
    assert own[Provenance.MODEL] + own[Provenance.ABORTED] == len(spoken)  # each turn once: others are copies
    for transcript in made:
        assert_results_follow_their_calls(transcript)


def test_the_real_session_with_two_compactions(shared_data: Path) -> None:
    rows = rows_of(shared_data / "trajectories" / "claude_code" / "entire_b6f735fbac66.jsonl")
    assert FORMAT.recognises(rows[:1])  # a summary row comes first
    made = list(FORMAT.transcripts(iter(rows), "a.jsonl"))
    for transcript in made:
        assert_results_follow_their_calls(transcript)
    # 528 assistant lines with 220 message ids and 224 calls; boundaries in lines 426 and 767.
    assert [transcript.turns for transcript in made] == [124, 85, 11]
    assert [calls(transcript) for transcript in made] == [118, 97, 9]
    assert [count(transcript, Role.TOOL) for transcript in made] == [118, 97, 9]  # all 18 parallel pairs among them
    assert [count(transcript, Role.USER) for transcript in made] == [11, 4, 2]  # two rows of /exit are on no path
    assert not any(NO_RESULT in contents(transcript) for transcript in made)
    assert [provenances(transcript) for transcript in made] == [
        {Provenance.MODEL: 122, Provenance.SYNTHETIC: 1, Provenance.ABORTED: 1},
        {Provenance.MODEL: 85},
        {Provenance.MODEL: 11},
    ]
    assert sum(bool(message.reasoning) for transcript in made for message in transcript.messages) == 219
    for transcript in made[1:]:
        assert transcript.messages[0].content.startswith("This session is being continued")
        assert transcript.messages[0].provenance is Provenance.COPIED
    first = made[0].messages
    cut = next(n for n, message in enumerate(first) if message.content == "[Request interrupted by user]")
    assert (first[cut - 1].provenance, first[cut - 1].content) == (Provenance.ABORTED, "")  # only its thinking is there
    (canned,) = [message for message in first if message.provenance is Provenance.SYNTHETIC]
    assert canned.content == "No response requested."
    times = [message.time_seconds or 0 for message in first if message.role is Role.ASSISTANT]
    assert times == sorted(times)


def test_the_real_session_without_thinking(shared_data: Path) -> None:
    rows = rows_of(shared_data / "trajectories" / "claude_code" / "agentcmd_full-session-four.jsonl")
    (made,) = FORMAT.transcripts(iter(rows), "a.jsonl")
    assert_results_follow_their_calls(made)
    # 49 assistant lines with 30 message ids; 6 user rows are text, 27 are results.
    assert (made.turns, calls(made), count(made, Role.TOOL), count(made, Role.USER)) == (30, 27, 27, 6)
    assert provenances(made) == {Provenance.MODEL: 30}
    assert not any(message.reasoning for message in made.messages)


def test_the_reader_of_files_finds_it(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SESSION_FORMATS", (FORMAT,))
    made = list(read_transcripts(shared_data / "trajectories" / "claude_code/entire_b6f735fbac66.jsonl"))
    assert [item.turns for item in made if isinstance(item, Transcript)] == [124, 85, 11]
    assert len(made) == 3


def test_only_this_format_is_claimed(shared_data: Path) -> None:
    for other in ("codex/rollout-2025-09-24T19-22-20.jsonl", "pi/large-session.jsonl"):
        assert not FORMAT.recognises(rows_of(shared_data / "trajectories" / other)[:20])
    assert not FORMAT.recognises([])
    assert not FORMAT.recognises([{"messages": [{"role": "user", "content": "t"}]}, {"type": []}])
