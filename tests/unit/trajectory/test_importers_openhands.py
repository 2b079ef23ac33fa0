"""OpenHands V0: turns from responses, observations as the prompt had them, older files."""

import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.trajectory.importers.checks import check
from megatron_klong.trajectory.importers.openhands import FORMAT
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript

BASH = {"type": "function", "function": {"name": "execute_bash", "parameters": {}}}


def metadata(response: str, *calls: tuple[str, str], content: str | None = None) -> dict[str, Any]:
    """What an action of a response carries: the whole response, and (in the last field) which call it is."""
    made = [
        {
            "id": name,
            "type": "function",
            "function": {"name": "execute_bash", "arguments": json.dumps({"command": command})},
        }
        for name, command in calls
    ]
    message = {"role": "assistant", "content": content, "tool_calls": made}
    return {
        "function_name": "execute_bash",
        "tool_call_id": calls[0][0],
        "model_response": {"id": response, "choices": [{"index": 0, "message": message}]},
        "total_calls_in_response": len(calls),
    }


def action(kind: str, number: int, source: str = "agent", **more: Any) -> dict[str, Any]:
    args = more.pop("args", {})
    return {"id": number, "source": source, "timestamp": "2025-04-30T16:32:54", "action": kind, "args": args, **more}


def observation(kind: str, number: int, content: str, **more: Any) -> dict[str, Any]:
    extras = more.pop("extras", {})
    return {"id": number, "source": "agent", "observation": kind, "content": content, "extras": extras, **more}


SYSTEM = action("system", 0, args={"content": "You are an agent.", "tools": [BASH]})
TASK = action("message", 1, "user", args={"content": "Fix it."})
LOOK = metadata("r1", ("a", "ls"), content="I look.")
ACT = action("run", 5, args={"command": "ls", "thought": "I look."}, tool_call_metadata=LOOK)
SHELL = {"exit_code": 0, "working_dir": "/w", "py_interpreter_path": "/py", "prefix": "", "suffix": "\n[done]"}
SEEN = observation("run", 6, "a.py", extras={"metadata": SHELL}, tool_call_metadata=LOOK, cause=5)
HISTORY = [SYSTEM, TASK, ACT, SEEN]


def row(*events: dict[str, Any], **more: object) -> dict[str, Any]:
    return deepcopy({"instance_id": "x-1", "history": list(events), "metadata": {}, "test_result": {}, **more})


def read(value: object) -> Transcript:
    assert FORMAT.recognises(value)
    made = FORMAT.transcript(value, "output.jsonl", 3)
    assert made.turns == 0 or check(made) is None
    return made


def replies(made: Transcript) -> list[Message]:
    return [message for message in made.messages if message.role is Role.ASSISTANT]


def test_a_turn_is_the_response_behind_an_action() -> None:
    made = read(row(*HISTORY))
    assert (made.id, made.task, made.score, made.tools) == ("x-1#3", "x-1", None, (BASH,))
    assert [message.role for message in made.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL]
    (reply,) = replies(made)
    assert (reply.content, reply.time_seconds) == ("I look.", 1746030774.0)  # a time without zone is read as UTC
    assert reply.tool_calls[0].arguments == {"command": "ls"}
    assert made.messages[3].tool_call_id == "a"
    assert made.messages[3].content == (
        "a.py\n[done]\n[Current working directory: /w]\n[Python interpreter: /py]\n[Command finished with exit code 0]"
    )


def test_several_actions_of_one_response_are_one_turn_with_its_results_in_order() -> None:
    both = metadata("r1", ("a", "ls"), ("b", "pwd"), content="Both.")
    second = {**both, "tool_call_id": "b"}
    made = read(
        row(
            TASK,
            action("run", 5, tool_call_metadata=both),
            action("run", 7, tool_call_metadata=second),
            observation("run", 9, "B", tool_call_metadata=second),
            observation("run", 10, "A", tool_call_metadata=both),
        )
    )
    (reply,) = replies(made)
    assert [call.id for call in reply.tool_calls] == ["a", "b"]
    assert [message.content for message in made.messages[2:]] == ["A", "B"]


def test_reasoning_and_unreadable_arguments_of_a_response() -> None:
    broken = deepcopy(LOOK)
    message = broken["model_response"]["choices"][0]["message"]
    message["tool_calls"][0]["function"]["arguments"] = '{"command": "l'
    message["reasoning_content"] = "hm"
    (reply,) = replies(read(row(TASK, {**ACT, "tool_call_metadata": broken})))
    assert (reply.reasoning, reply.provenance) == ("hm", Provenance.MALFORMED_CALL)


def test_a_finish_is_the_models_turn_and_a_message_between_users_and_agent_is_whose_it_is() -> None:
    finish = action(
        "finish", 9, args={"final_thought": "Done."}, tool_call_metadata=metadata("r2", ("f", "-"), content="Done.")
    )
    said = action("message", 7, args={"content": "Which file?"})
    made = read(row(*HISTORY, said, action("message", 8, "user", args={"content": "a.py"}), finish))
    assert [(reply.content, reply.trained) for reply in replies(made)][1:] == [("Which file?", True), ("Done.", True)]
    assert made.messages[-2].content == "a.py"
    assert made.messages[-1].tool_calls[0].id == "f"


def test_what_no_model_saw_is_left_out() -> None:
    unseen = [
        action("recall", 2, "user", args={"query": "q"}),
        action("change_agent_state", 3, "environment", args={"agent_state": "running"}),
        observation("agent_state_changed", 4, ""),
        action("null", 4),
        observation("null", 4, ""),
    ]
    assert len(read(row(SYSTEM, TASK, *unseen, ACT, SEEN)).messages) == 4


RECALL = observation(
    "recall",
    4,
    "Added workspace context",
    extras={
        "repo_instructions": "Use tabs.",
        "date": "",
        "microagent_knowledge": [{"name": "git", "content": "Push."}],
    },
)


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({}, False),
        ({"metadata": {"agent_config": {"enable_prompt_extensions": True}}}, True),
        ({"metadata": {"agent_config": {"enable_prompt_extensions": False}}}, False),
    ],
)
def test_a_recall_is_shown_only_where_the_agent_ran_with_prompt_extensions(more: dict[str, Any], shown: bool) -> None:
    made = read(row(SYSTEM, TASK, RECALL, ACT, SEEN, **more))
    found = [message for message in made.messages if message.provenance is Provenance.SYNTHETIC]
    assert [message.content for message in found] == (["Use tabs.\n\nPush."] if shown else [])


def test_a_condensation_leaves_the_events_and_adds_the_summary() -> None:
    condensed = action(
        "condensation", 7, args={"forgotten_event_ids": [5, 6], "summary": "Looked.", "summary_offset": 1}
    )
    second = action("run", 8, tool_call_metadata=metadata("r2", ("b", "pwd")))
    made = read(row(*HISTORY, condensed, second))
    assert made.turns == 2
    assert (made.messages[4].role, made.messages[4].content) == (Role.USER, "Looked.")
    assert made.messages[4].provenance is Provenance.COPIED
    without = action("condensation", 7, args={"forgotten_events_start_id": 5, "forgotten_events_end_id": 6})
    assert len(read(row(*HISTORY, without, second)).messages) == 5


def test_errors_and_rejections_read_as_the_model_read_them() -> None:
    made = read(
        row(
            TASK,
            ACT,
            observation("error", 6, "No such tool.", tool_call_metadata=LOOK),
            observation("error", 7, "Bad call."),
            action("run", 8, tool_call_metadata=metadata("r2", ("b", "rm"))),
            observation("user_rejected", 9, "No!", tool_call_metadata=metadata("r2", ("b", "rm"))),
        )
    )
    assert [(message.role, message.content) for message in made.messages[2:]] == [
        (Role.TOOL, "No such tool.\n[Error occurred in processing last action]"),
        (Role.USER, "Bad call.\n[Error occurred in processing last action]"),
        (Role.ASSISTANT, ""),
        (Role.TOOL, "OBSERVATION:\nNo!\n[Last action has been rejected by the user]"),
    ]


def test_a_long_observation_is_cut_as_the_prompt_cut_it() -> None:
    long = observation("run", 6, "a" * 6 + "b" * 6, extras={"metadata": {}}, tool_call_metadata=LOOK)
    made = read(row(TASK, ACT, long, metadata={"llm_config": {"max_message_chars": 6}}))
    assert made.messages[-1].content == "aaa\n[... Observation truncated due to length ...]\nbbb"


def test_a_command_of_the_user_is_the_users() -> None:
    run = action("run", 2, "user", args={"command": "pwd"})
    made = read(row(TASK, run, observation("run", 3, "/w", extras={"metadata": {}}), ACT, SEEN))
    assert [message.content for message in made.messages[1:3]] == [
        "User executed the command:\npwd",
        "\nObserved result of command executed by user:\n/w",
    ]


def test_a_call_without_result_and_a_result_without_call_come_out_valid() -> None:
    stray = observation("run", 6, "who?", extras={"metadata": {}}, tool_call_metadata=metadata("r9", ("z", "-")))
    made = read(row(TASK, ACT, stray, action("message", 7, "user", args={"content": "Go on."})))
    assert [message.role for message in made.messages] == [
        Role.USER,
        Role.ASSISTANT,
        Role.TOOL,
        Role.ASSISTANT,
        Role.TOOL,
        Role.USER,
    ]
    assert made.messages[2].content == "[no result recorded]"
    assert made.messages[3].provenance is Provenance.SYNTHETIC


OLD = [  # a resolver file: fields of an event beside each other, no id, no source, no response
    {"content": "Fix it.", "action": "message", "wait_for_response": False},
    {"command": "ls", "thought": "I look.", "action": "run"},
    {"content": "a.py", "command_id": -1, "command": "ls", "exit_code": 0, "observation": "run"},
    {"code": "1+1", "thought": "I add.", "action": "run_ipython"},
    {"content": "2", "code": "1+1", "observation": "run_ipython"},
    {"content": "Which one?", "action": "message", "wait_for_response": True},
    {"outputs": {}, "thought": "Done.", "action": "finish"},
]


@pytest.mark.parametrize("pairs", [False, True])
def test_a_resolver_file_without_ids_and_sources(pairs: bool) -> None:
    history: list[Any] = [OLD[:1], OLD[1:3], OLD[3:5], OLD[5:6], OLD[6:]] if pairs else OLD
    value = {"issue": {"owner": "o", "repo": "r", "number": 5}, "instruction": "Fix it.", "history": history}
    made = read(value)
    assert made.task == "o/r#5"
    assert [(message.role, message.content, message.provenance) for message in made.messages] == [
        (Role.USER, "Fix it.", Provenance.MODEL),
        (Role.ASSISTANT, "I look.\n<execute_bash>\nls\n</execute_bash>", Provenance.MODEL),
        (Role.USER, "OBSERVATION:\na.py\n[Command -1 finished with exit code 0]", Provenance.MODEL),
        (Role.ASSISTANT, "I add.\n<execute_ipython>\n1+1\n</execute_ipython>", Provenance.MODEL),
        (Role.USER, "OBSERVATION:\n2", Provenance.MODEL),
        (Role.ASSISTANT, "Which one?", Provenance.MODEL),
        (Role.ASSISTANT, "Done.", Provenance.SYNTHETIC),  # what it said in place of the action is not known
    ]


def test_a_bare_list_of_events_is_one_transcript() -> None:
    made = read(HISTORY)
    assert (made.id, made.turns) == ("output.jsonl#3", 1)


@pytest.mark.parametrize(
    ("more", "score"),
    [
        ({"test_result": {"git_patch": "diff"}}, None),
        ({"test_result": {"report": {"resolved": True}}}, 1.0),
        ({"report": {"resolved": False}}, 0.0),
    ],
)
def test_only_a_report_gives_a_score(more: dict[str, Any], score: float | None) -> None:
    assert read(row(*HISTORY, **more)).score == score


def test_the_instruction_is_the_task_where_the_history_lacks_it() -> None:
    made = read(row(SYSTEM, ACT, SEEN, instruction="Fix it."))
    assert [message.content for message in made.messages[:2]] == ["You are an agent.", "Fix it."]
    assert len(read(row(*HISTORY, instruction="Fix it.")).messages) == 4


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (row(*HISTORY, history=None), "history: nothing"),
        (row({**ACT, "action": 3}), r"history\[0\].action"),
        (row({**ACT, "tool_call_metadata": {"model_response": {"id": "r", "choices": []}}}), r"choices\[0\]"),
        (row({**TASK, "args": "x"}), r"history\[0\].args"),
        (row({**SEEN, "content": ["x"]}), r"history\[0\].content"),
        (row({**SEEN, "timestamp": "noon"}), "timestamp"),
        (row({"observation": None, "action": None}), "neither an action"),
    ],
)
def test_damage_is_refused_with_the_field(value: object, detail: str) -> None:
    assert FORMAT.recognises(value)
    with pytest.raises(MalformedRow, match=detail):
        FORMAT.transcript(value, "x", 0)


@pytest.mark.parametrize(
    "other",
    [
        None,
        [],
        "",
        {"history": [{"role": "user", "content": "t"}], "trajectory": []},
        {"messages": [], "instance_id": "x"},
        [{"role": "assistant", "content": "", "action": "ls"}, {"role": "user", "content": ""}],
        [{"kind": "ActionEvent", "source": "agent"}],
        {"history": [1, 2]},
    ],
)
def test_other_values_are_not_taken_for_it(other: object) -> None:
    assert not FORMAT.recognises(other)


@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_damaged_history_is_read_or_refused(kept: list[bool]) -> None:
    both = metadata("r2", ("b", "ls"), ("c", "pwd"))
    events = [
        *HISTORY,
        RECALL,
        action("condensation", 7, args={"summary": "s"}),
        action("run", 8, tool_call_metadata=both),
        action("run", 9, tool_call_metadata={**both, "tool_call_id": "c"}),
        observation("run", 10, "B", tool_call_metadata=both),
        observation("run", 11, "C", tool_call_metadata={**both, "tool_call_id": "c"}),
        {"observation": "run", "content": 7},
        *OLD[1:2],
    ]
    try:
        made = FORMAT.transcript(row(*(e for e, keep in zip(events, kept, strict=True) if keep)), "x", 0)
    except MalformedRow:
        return
    assert made.turns == 0 or check(made) is None


def real(shared_data: Path) -> list[dict[str, Any]]:
    file = shared_data / "trajectories" / "openhands" / "multi_swe_bench_output.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_real_rows_turn_by_turn(shared_data: Path) -> None:
    made = [read(value) for value in real(shared_data)]
    assert [transcript.task for transcript in made] == [f"ponylang__ponyc-{n}" for n in (4595, 4593, 4588)]
    assert [transcript.turns for transcript in made] == [23, 33, 49]
    counts = [Counter(message.role for message in transcript.messages) for transcript in made]
    # two rows end with a finish, which has no result; the third ran out of turns
    assert [count[Role.TOOL] for count in counts] == [22, 32, 49]
    assert [count[Role.USER] for count in counts] == [1, 2, 2]
    assert all(
        count[Role.SYSTEM] == 1 and len(transcript.tools) == 4 for count, transcript in zip(counts, made, strict=True)
    )
    assert [replies(transcript)[-1].tool_calls[0].name for transcript in made] == ["finish", "finish", "execute_bash"]
    assert all(len(reply.tool_calls) == 1 and reply.trained for transcript in made for reply in replies(transcript))
    assert all(transcript.score is None for transcript in made)


def test_the_real_error_observations_answer_no_call(shared_data: Path) -> None:
    for value in real(shared_data)[1:]:
        (text,) = [
            message.content for message in read(value).messages if message.content.startswith("Parameter 'command'")
        ]
        assert text.endswith("\n[Error occurred in processing last action]")


def test_the_real_recall_was_not_shown(shared_data: Path) -> None:
    first = real(shared_data)[0]
    (recall,) = [event for event in first["history"] if event.get("observation") == "recall"]
    knowledge = [item["content"] for item in recall["extras"]["microagent_knowledge"]]
    assert [len(text) for text in knowledge] == [2004, 1962]
    assert [event["id"] for event in first["history"][:5]] == [0, 1, 2, 4, 5]  # ids skip
    assert not any(text in message.content for text in knowledge for message in read(first).messages)


def test_the_real_token_counts_leave_no_room_for_the_recall(shared_data: Path) -> None:
    """The first prompts of a row with 3966 characters of recall and of two without have the same tokens to spare."""
    spare: list[float] = []
    for value in real(shared_data):
        system, task = value["history"][0]["args"], value["history"][1]["args"]
        first = next(event for event in value["history"] if event.get("tool_call_metadata"))
        tokens = first["tool_call_metadata"]["model_response"]["usage"]["prompt_tokens"]
        characters = len(system["content"]) + len(json.dumps(system["tools"])) + len(task["content"])
        spare.append(tokens - characters / 4)
    assert max(spare) - min(spare) < 3966 / 4 / 10


def test_the_real_thought_that_differs_is_the_responses(shared_data: Path) -> None:
    first = real(shared_data)[0]
    (think,) = [event for event in first["history"] if event.get("action") == "think"]
    message = think["tool_call_metadata"]["model_response"]["choices"][0]["message"]
    assert think["args"]["thought"] != message["content"]
    assert message["content"] in [reply.content for reply in replies(read(first))]


def test_the_real_commands_show_directory_and_exit_code(shared_data: Path) -> None:
    ends = [
        sum("\n[Command finished with exit code " in message.content for message in read(value).messages)
        for value in real(shared_data)
    ]
    assert ends == [13, 12, 24]
