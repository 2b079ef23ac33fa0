"""mini-swe-agent runs: fenced commands, calls, the Responses API, and bare lists of messages."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.trajectory.importers.checks import check
from megatron_klong.trajectory.importers.mini_swe_agent import FORMAT
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Provenance, Role, Transcript

SYSTEM = {"role": "system", "content": "One command a reply."}
TASK = {"role": "user", "content": "Fix it.", "extra": {"timestamp": 1_700_000_000.5}}
LOOK = {"role": "assistant", "content": "I look.\n\n```mswea_bash_command\nls\n```"}
SEEN = {"role": "user", "content": "<returncode>0</returncode>\n<output>\na.py\n</output>"}
BARE: list[dict[str, Any]] = [SYSTEM, TASK, LOOK, SEEN]


def wrapped(*messages: dict[str, Any], **more: object) -> dict[str, Any]:
    return deepcopy(
        {"info": {"exit_status": ""}, "messages": messages, "trajectory_format": "mini-swe-agent-1.1", **more}
    )


def call(identity: str, arguments: str) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": "bash", "arguments": arguments}}


def read(row: object, source: str = "runs/repo__x-1.traj.json") -> Transcript:
    assert FORMAT.recognises(row)
    made = FORMAT.transcript(row, source, 0)
    assert made.turns == 0 or check(made) is None
    return made


@pytest.mark.parametrize("row", [BARE, wrapped(*BARE)])
def test_a_fenced_command_is_text_and_its_output_a_user_message(row: object) -> None:
    made = read(row)
    assert (made.task, made.turns, made.format) == ("repo__x-1", 1, "mini_swe_agent")
    assert [message.role for message in made.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.USER]
    assert [message.content for message in made.messages] == [raw["content"] for raw in BARE]
    assert not made.messages[2].tool_calls
    assert made.messages[1].time_seconds == 1_700_000_000.5


def test_calls_are_calls_and_a_human_may_command_too() -> None:
    acting = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [call("a", '{"command": "ls"}')],
    }
    human = {"role": "user", "content": "User command: \n```bash\npwd\n```", "extra": {"actions": [{"command": "pwd"}]}}
    made = read(wrapped(SYSTEM, TASK, acting, {"role": "tool", "tool_call_id": "a", "content": "a.py"}, human, SEEN))
    assert made.messages[2].reasoning == "hm"
    assert made.messages[2].tool_calls[0].arguments == {"command": "ls"}
    assert made.messages[3].tool_call_id == "a"
    assert [message.role for message in made.messages[4:]] == [Role.USER, Role.USER]


def test_how_a_run_ended_went_to_no_model() -> None:
    end = {"role": "exit", "content": "LimitsExceeded", "extra": {"exit_status": "LimitsExceeded"}}
    made = read(wrapped(*BARE, end))
    assert len(made.messages) == 4
    assert made.score is None


def test_a_format_error_stays_as_the_model_saw_it_without_the_reply_behind_it() -> None:
    error = {
        "role": "user",
        "content": "Give EXACTLY ONE action.",
        "extra": {"interrupt_type": "FormatError", "model_response": "I think."},
    }
    made = read(wrapped(SYSTEM, TASK, error, LOOK, SEEN))
    assert [message.content for message in made.messages[2:4]] == ["Give EXACTLY ONE action.", LOOK["content"]]
    assert made.turns == 1


def test_a_reply_of_the_responses_api_is_one_turn() -> None:
    reply = {
        "object": "response",
        "output": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}], "content": None},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "a", "id": "fc_1", "name": "bash", "arguments": '{"command": "ls"}'},
            {"type": "function_call", "call_id": "b", "id": "fc_2", "name": "bash", "arguments": '{"command": "pwd"}'},
        ],
        "extra": {"timestamp": 5.0},
    }
    task = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]}
    outputs = [{"type": "function_call_output", "call_id": name, "output": name.upper()} for name in "ba"]
    made = read(wrapped(task, reply, *outputs))
    assert made.messages[0].content == "Fix it."
    assert (made.messages[1].content, made.messages[1].reasoning, made.messages[1].time_seconds) == (
        "I look.",
        None,
        5.0,
    )
    assert [call.id for call in made.messages[1].tool_calls] == ["a", "b"]
    assert [message.content for message in made.messages[2:]] == ["A", "B"]  # in the order of the calls


def test_what_is_unpaired_is_marked_and_what_is_unreadable_not_trained() -> None:
    acting = {"role": "assistant", "content": "", "tool_calls": [call("a", "ls"), call("b", "{}")]}
    made = read(wrapped(TASK, acting, {"role": "tool", "tool_call_id": "b", "content": "B"}, LOOK))
    assert made.messages[1].provenance is Provenance.MALFORMED_CALL
    assert [message.content for message in made.messages[2:4]] == ["[no result recorded]", "B"]


@pytest.mark.parametrize(
    "other",
    [
        None,
        [],
        "",
        [{"role": "user", "content": "t"}, {"role": "assistant", "content": "```bash\nls\n```"}],
        [{"role": "assistant", "content": "Run this:\n```bash\nls\n```"}, {"role": "user", "content": "thanks"}],
        [{"role": "assistant", "content": "hello"}, SEEN],
        {"messages": BARE},
        [BARE],
        {"trajectory_format": None, "messages": []},
    ],
)
def test_plain_chats_are_not_taken_for_it(other: object) -> None:
    assert not FORMAT.recognises(other)


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"trajectory_format": "mini-swe-agent-1.1"}, "messages: nothing"),
        (wrapped({"role": "user", "content": {"a": 1}}), r"messages\[0\].content"),
        (wrapped({"content": "x"}), r"messages\[0\].role"),
        (wrapped({"role": "oracle", "content": "x"}), "oracle"),
        (wrapped({"object": "response", "output": None}), r"messages\[0\].output"),
        (wrapped({**TASK, "extra": {"timestamp": "noon"}}), "timestamp"),
    ],
)
def test_damage_is_refused_with_the_field(row: object, detail: str) -> None:
    with pytest.raises(MalformedRow, match=detail):
        FORMAT.transcript(row, "x.traj.json", 0)


@given(st.lists(st.booleans(), min_size=8, max_size=8))
def test_a_damaged_list_is_read_or_refused(kept: list[bool]) -> None:
    acting = {"role": "assistant", "content": "", "tool_calls": [call("a", "{}"), call("b", "{}")]}
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in "ab"]
    messages = [*BARE, acting, *results, {"role": None}]
    try:
        made = FORMAT.transcript(wrapped(*(m for m, keep in zip(messages, kept, strict=True) if keep)), "x", 0)
    except MalformedRow:
        return
    assert made.turns == 0 or check(made) is None


@pytest.mark.parametrize(
    ("name", "turns", "returncodes", "last"),
    [("github_issue", 10, 9, "diff --git"), ("local", 2, 1, "")],
)
def test_the_real_bare_lists(shared_data: Path, name: str, turns: int, returncodes: int, last: str) -> None:
    file = shared_data / "trajectories" / "mini_swe_agent" / f"{name}.traj.json"
    rows = json.loads(file.read_text())
    made = read(rows, str(file))
    assert (made.task, made.turns, len(made.messages)) == (name, turns, 2 + 2 * turns)
    replies = [message for message in made.messages if message.role is Role.ASSISTANT]
    assert sum("```mswea_bash_command\n" in reply.content and not reply.tool_calls for reply in replies) == turns
    assert sum(message.content.startswith("<returncode>") for message in made.messages) == returncodes
    assert made.messages[-1].role is Role.USER
    assert made.messages[-1].content.startswith(last)
    assert all(reply.trained for reply in replies)


def test_the_real_openai_rows_are_not_taken_for_it(shared_data: Path) -> None:
    (file,) = (shared_data / "trajectories" / "openai_messages").glob("*.json")
    for row in json.loads(file.read_text()):
        assert not FORMAT.recognises(row)
        assert not FORMAT.recognises(row["messages"])
