"""SWE-agent runs: what the model saw and said, over three generations of the format."""

import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.trajectory.importers.checks import check
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.swe_agent import FORMAT, NOT_RECORDED
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript


def entry(role: str, content: object, kind: str, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, "agent": "main", "message_type": kind, **more}


def call(identity: str, command: str) -> dict[str, Any]:
    return {
        "id": identity,
        "type": "function",
        "function": {"name": "bash", "arguments": json.dumps({"command": command})},
    }


def step(response: str, action: str, *, query: list[dict[str, Any]] | None = None, ran: bool = True) -> dict[str, Any]:
    state = {"working_dir": "/repo"} if ran else {}
    observation = "ok" if ran else ""
    return {"response": response, "action": action, "state": state, "observation": observation, "query": query or []}


SYSTEM = entry("system", "You fix bugs.", "system_prompt")
TASK = entry("user", [{"type": "text", "text": "Fix it."}], "observation")
LOOK = entry("assistant", "I look.\n```\nls\n```", "action", action="ls")
SEEN = entry("user", "OBSERVATION:\na.py", "observation")
DONE = entry("assistant", "Done.\n```\nsubmit\n```", "action", action="submit")
END = entry("user", "OBSERVATION:\ndiff", "observation")


def run(history: list[dict[str, Any]], steps: list[dict[str, Any]], **more: object) -> dict[str, Any]:
    return deepcopy({"trajectory": steps, "history": history, "info": {}, "environment": "main", **more})


RUN = run(
    [SYSTEM, TASK, LOOK, SEEN, DONE, END],
    [step(LOOK["content"], "ls"), step(DONE["content"], "submit")],
)


def read(row: object, source: str = "repo__x-1.traj") -> Transcript:
    assert FORMAT.recognises(row)
    made = FORMAT.transcript(row, source, 0)
    assert made.turns == 0 or check(made) is None
    return made


def replies(made: Transcript) -> list[Message]:
    return [message for message in made.messages if message.role is Role.ASSISTANT]


def real(shared_data: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((shared_data / "trajectories" / "swe_agent" / name).read_text())
    return content


def test_fenced_commands_are_text_and_observations_are_user_messages() -> None:
    made = read(RUN)
    assert (made.id, made.task, made.score, made.format) == ("repo__x-1#0", "repo__x-1", None, "swe_agent")
    assert [message.content for message in made.messages] == [
        "You fix bugs.",
        "Fix it.",
        "I look.\n```\nls\n```",
        "OBSERVATION:\na.py",
        "Done.\n```\nsubmit\n```",
        "OBSERVATION:\ndiff",
    ]
    assert all(not message.tool_calls and message.trained for message in replies(made))


def test_function_calls_are_calls_and_their_observations_answer_them() -> None:
    acting = entry("assistant", "I look.", "action", action="ls", tool_calls=[call("a", "ls")])
    seen = entry("tool", [{"type": "text", "text": "OBSERVATION:\na.py"}], "observation", tool_call_ids=["a"])
    made = read(run([SYSTEM, TASK, acting, seen], [step("I look.", "ls")]))
    assert made.messages[2].tool_calls[0].arguments == {"command": "ls"}
    assert (made.messages[3].role, made.messages[3].content) == (Role.TOOL, "OBSERVATION:\na.py")
    assert made.messages[3].tool_call_id == "a"


def test_arguments_that_are_no_object_and_thinking_blocks() -> None:
    broken = {"id": "a", "function": {"name": "bash", "arguments": '{"command": "l'}}
    thinking = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "redacted_thinking", "data": "y"}]
    acting = entry("assistant", "I look.", "action", tool_calls=[broken], thinking_blocks=thinking)
    (reply,) = replies(read(run([TASK, acting], [step("I look.", "")])))
    assert (reply.provenance, reply.trained, reply.reasoning) == (Provenance.MALFORMED_CALL, False, "hm")


@pytest.mark.parametrize("mark", [{"is_demo": True}, {"message_type": "demonstration"}])
def test_demonstrations_are_context_and_never_trained(mark: dict[str, Any]) -> None:
    shown = [{**LOOK, **mark}, {**SEEN, **mark}]
    made = read(run([SYSTEM, *shown, *RUN["history"][1:]], RUN["trajectory"]))
    assert [message.provenance for message in made.messages[1:3]] == [Provenance.DEMONSTRATION] * 2
    assert [reply.trained for reply in replies(made)] == [False, True, True]


def asked_again(said: str, error: str) -> list[dict[str, Any]]:
    return [
        SYSTEM,
        TASK,
        entry("assistant", said, "assistant"),
        entry("user", error, "user"),
    ]


def test_a_refused_reply_stands_where_it_was_said_with_the_error_the_model_read() -> None:
    steps = [
        step("No command.", "", ran=False),
        step("```\nvim\n```", "vim", query=asked_again("No command.", "Give one command."), ran=False),
        step(LOOK["content"], "ls", query=asked_again("```\nvim\n```", "vim is blocked.")),
        step(DONE["content"], "submit"),
    ]
    made = read(run(RUN["history"], steps))
    assert [message.content for message in made.messages[2:7]] == [
        "No command.",
        "Give one command.",
        "```\nvim\n```",
        "vim is blocked.",
        LOOK["content"],
    ]
    assert len(made.messages) == 6 + 4
    assert all(message.provenance is Provenance.MODEL for message in made.messages)


def test_where_the_file_lacks_the_error_a_mark_says_so() -> None:
    steps = [{**step("No command.", "", ran=False), "messages": []}, *RUN["trajectory"]]
    made = read(run(RUN["history"], [{k: v for k, v in s.items() if k != "query"} for s in steps[:1]] + steps[1:]))
    assert [message.content for message in made.messages[2:4]] == ["No command.", NOT_RECORDED]
    assert made.messages[3].provenance is Provenance.SYNTHETIC


def test_v0_files_have_no_refused_replies() -> None:
    steps = [{"response": "Not in the history.", "action": "", "state": "", "observation": ""}]
    assert len(read(run(RUN["history"], steps)).messages) == 6


def test_a_refused_reply_whose_call_is_not_in_the_file_is_not_trained() -> None:
    acting = entry("assistant", "I look.", "action", action="ls", tool_calls=[call("a", "ls")])
    seen = entry("tool", "a.py", "observation", tool_call_ids=["a"])
    steps = [step("Two calls.", "", ran=False), step("I look.", "ls", query=asked_again("Two calls.", "One call!"))]
    made = read(run([SYSTEM, TASK, acting, seen], steps))
    assert [reply.provenance for reply in replies(made)] == [Provenance.MALFORMED_CALL, Provenance.MODEL]


def test_giving_up_is_the_agents_word_and_the_replies_before_it_are_the_models() -> None:
    words = "Exit due to repeated format/blocklist/bash syntax errors"
    gave_up = [entry("assistant", words, "action", action=""), entry("user", "Exited (autosubmitted)", "observation")]
    steps = [step("Bad.", "", ran=False), step("Worse.", "", query=asked_again("Bad.", "No."), ran=False)]
    made = read(run([SYSTEM, TASK, *gave_up], [*steps, step(words, "", ran=False)]))
    assert [(reply.content, reply.provenance) for reply in replies(made)] == [
        ("Bad.", Provenance.MODEL),
        ("Worse.", Provenance.MODEL),
        (words, Provenance.SYNTHETIC),
    ]


@pytest.mark.parametrize(
    ("content", "action", "provenance"),
    [
        ("Exit due to cost limit", "exit_cost", Provenance.SYNTHETIC),
        ("no fence at all", "exit_format", Provenance.MODEL),  # v0 keeps the third bad reply itself
        ("Exit due to cost limit\n```\nls\n```", "ls", Provenance.MODEL),
    ],
)
def test_how_v0_ended_a_run(content: str, action: str, provenance: Provenance) -> None:
    last = {"role": "assistant", "content": content, "action": action, "agent": "main"}
    made = read(run([*RUN["history"][:4], last], []))
    assert replies(made)[-1].provenance is provenance


def test_entries_of_another_agent_are_another_conversation() -> None:
    other = {**entry("assistant", "I summarise.", "action"), "agent": "summarizer"}
    made = read(run([*RUN["history"][:4], other, *RUN["history"][4:]], RUN["trajectory"]))
    assert "I summarise." not in [message.content for message in made.messages]


def test_a_call_without_result_and_a_result_without_call_come_out_valid() -> None:
    acting = entry("assistant", "I look.", "action", action="ls", tool_calls=[call("a", "ls")])
    stray = entry("tool", "what?", "observation", tool_call_ids=["z"])
    made = read(run([SYSTEM, TASK, acting, stray, DONE], []))
    roles = [message.role for message in made.messages[2:]]
    assert roles == [Role.ASSISTANT, Role.TOOL, Role.ASSISTANT, Role.TOOL, Role.ASSISTANT]
    assert made.messages[4].provenance is Provenance.SYNTHETIC


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (run(RUN["history"], [], replay_config={"problem_statement": {"id": "a-1"}}), "a-1"),
        (run(RUN["history"], [], replay_config='{"problem_statement": {"id": "a-2"}}'), "a-2"),
        (run(RUN["history"], [], instance_id="a-3"), "a-3"),
        (run(RUN["history"], [], replay_config=None), "repo__x-1"),
    ],
)
def test_the_task_is_named_by_the_file_or_by_its_name(row: dict[str, Any], name: str) -> None:
    assert read(row).task == name


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"attempts": [RUN]}, "stopped before it chose"),
        (run([SYSTEM, {"role": "oracle", "content": "x"}], []), r"history\[1\].role"),
        (run([SYSTEM, {"content": "x"}], []), r"history\[1\].role"),
        (run([SYSTEM, entry("user", 3, "observation")], []), r"history\[1\].content"),
        (run([SYSTEM], [], replay_config="{"), "replay_config"),
        (run([SYSTEM], "steps"), "trajectory"),  # type: ignore[arg-type]
    ],
)
def test_damage_is_refused_with_the_field(row: object, detail: str) -> None:
    assert FORMAT.recognises(row)
    with pytest.raises(MalformedRow, match=detail):
        FORMAT.transcript(row, "x.traj", 0)


@pytest.mark.parametrize(
    "other",
    [
        None,
        [],
        "history",
        {"history": [], "trajectory": []},
        {"history": [{"id": 0, "action": "run"}], "instruction": "t"},
        {"messages": [{"role": "user", "content": "t"}]},
        {"attempts": [1]},
    ],
)
def test_other_values_are_not_taken_for_it(other: object) -> None:
    assert not FORMAT.recognises(other)


@given(st.lists(st.booleans(), min_size=10, max_size=10), st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_damaged_history_is_read_or_refused(kept: list[bool], kept_steps: list[bool]) -> None:
    acting = entry("assistant", "I look.", "action", action="ls", tool_calls=[call("a", "ls")])
    seen = entry("tool", "a.py", "observation", tool_call_ids=["a"])
    history = [SYSTEM, {**LOOK, "is_demo": True}, TASK, acting, seen, *RUN["history"][2:], {"role": None}]
    steps = [
        step("I look.", "ls"),
        step("Bad.", "", ran=False),
        step(LOOK["content"], "ls", query=asked_again("Bad.", "No.")),
        step(DONE["content"], "submit"),
    ]
    row = run([e for e, keep in zip(history, kept, strict=True) if keep], [])
    row["trajectory"] = [s for s, keep in zip(steps, kept_steps, strict=True) if keep]
    try:
        made = FORMAT.transcript(row, "x.traj", 0)
    except MalformedRow:
        return
    assert made.turns == 0 or check(made) is None


def test_the_real_v1_run_with_calls(shared_data: Path) -> None:
    row = real(shared_data, "pandas_pr_53856.traj")
    made = read(row)
    assert made.task == "pandas-dev__pandas.95280573.pr_53856"  # from replay_config, which is JSON text here
    assert Counter(message.role for message in made.messages) == {
        Role.SYSTEM: 1,
        Role.USER: 1,
        Role.ASSISTANT: 17,
        Role.TOOL: 17,
    }
    names = Counter(call.name for reply in replies(made) for call in reply.tool_calls)
    assert names == {"bash": 9, "str_replace_editor": 6, "submit": 2}
    # 16 of 17 observations carry the prefix of their template; the one of a silent command has another
    observations = [message.content for message in made.messages if message.role is Role.TOOL]
    assert sum(text.startswith("OBSERVATION:\n") for text in observations) == 16
    assert isinstance(row["history"][1]["content"], list)
    assert made.messages[1].content.startswith("<uploaded_files>\n/testbed")


def test_the_real_v1_run_whose_old_observations_were_elided(shared_data: Path) -> None:
    row = real(shared_data, "marshmallow-1867_function_calling.traj")
    elided = [m for m in row["trajectory"][-1]["messages"] if "Old environment output" in str(m["content"])]
    assert len(elided) == 8
    made = read(row)
    assert made.task == "marshmallow-code__marshmallow-1867"
    assert (len(made.messages), made.turns) == (28, 13)
    assert not any("Old environment output" in message.content for message in made.messages)
    # four turns call with one id: each result still stands behind its own
    ids = Counter(message.tool_call_id for message in made.messages if message.role is Role.TOOL)
    assert ids["call_5iDdbOYybq7L19vqXmR0DPaU"] == 4
    for before, after in zip(made.messages[2::2], made.messages[3::2], strict=True):
        assert (before.role, after.role) == (Role.ASSISTANT, Role.TOOL)
        assert before.tool_calls[0].id == after.tool_call_id
    assert [message.content for message in made.messages] == [m["content"] for m in row["history"]]


def test_the_real_v0_run_with_a_demonstration(shared_data: Path) -> None:
    row = real(shared_data, "pydicom-1458_old_thought_action.traj")
    assert isinstance(row["trajectory"][0]["state"], str)
    made = read(row, "pydicom__pydicom-1458.traj")
    assert made.task == "pydicom__pydicom-1458"
    assert (len(made.messages), made.turns) == (26, 12)
    shown = [n for n, message in enumerate(made.messages) if message.provenance is Provenance.DEMONSTRATION]
    assert shown == [1]
    assert (made.messages[1].role, made.messages[1].trained) == (Role.USER, False)
    assert sum(reply.trained and reply.content.endswith("```") for reply in replies(made)) == 12
    assert made.score is None
