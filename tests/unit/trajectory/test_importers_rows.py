"""Rows of conversations: OpenAI messages in their variants, ShareGPT, GLM's own, prompts with answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.trajectory.glm import tools_text
from megatron_klong.trajectory.importers import completion, glm, openai_messages, read_transcripts, sharegpt
from megatron_klong.trajectory.importers.refusal import MalformedRow, Refusal
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript

ASKED = {"role": "user", "content": "t"}


def replies(made: Transcript) -> list[Message]:
    return [message for message in made.messages if message.role is Role.ASSISTANT]


def real(shared_data: Path, name: str) -> list[Transcript]:
    items = list(read_transcripts(shared_data / "trajectories" / name))
    assert not [item for item in items if isinstance(item, Refusal)]
    return [item for item in items if isinstance(item, Transcript)]


# -- OpenAI messages


def openai(*messages: dict[str, Any], **fields: Any) -> Transcript:
    return openai_messages.transcript({"messages": [ASKED, *messages], **fields}, "s", 0)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"content": "a", "tool_calls": None, "function_call": None}, Message(role=Role.ASSISTANT, content="a")),
        (
            {"content": None, "function_call": {"name": "n", "arguments": '{"k": 1}'}},
            Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="n", arguments={"k": 1}),)),
        ),
        (
            {"tool_calls": [{"id": "1", "index": 0, "function": {"name": "n", "arguments": {"k": [1]}}}]},
            Message(role=Role.ASSISTANT, tool_calls=(ToolCall(id="1", name="n", arguments={"k": [1]}),)),
        ),
        (
            {"tool_calls": [{"id": "1", "function": {"name": "n", "arguments": ""}}]},
            Message(role=Role.ASSISTANT, tool_calls=(ToolCall(id="1", name="n", arguments={}),)),
        ),
        (
            {"content": "<think>\nr\n</think>\n\na </think>"},
            Message(role=Role.ASSISTANT, content="a </think>", reasoning="r"),
        ),
        (
            {"content": "<think>r</think>a", "reasoning": "own"},
            Message(role=Role.ASSISTANT, content="<think>r</think>a", reasoning="own"),
        ),
        ({"content": "a", "weight": 0}, Message(role=Role.ASSISTANT, content="a", trained=False)),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, Message(role=Role.ASSISTANT, content="no")),
    ],
)
def test_openai_replies(message: dict[str, Any], wanted: Message) -> None:
    assert replies(openai({"role": "assistant", **message})) == [wanted]


@pytest.mark.parametrize("arguments", ["[1]", '{"k": ', "3", "words"])
def test_a_call_that_cannot_be_read_shows_its_text_and_is_not_trained(arguments: str) -> None:
    (reply,) = replies(
        openai({"role": "assistant", "tool_calls": [{"function": {"name": "n", "arguments": arguments}}]})
    )
    assert reply.tool_calls[0].arguments == {"arguments": arguments}
    assert (reply.provenance, reply.trained) == (Provenance.MALFORMED_CALL, False)


def test_openai_rows_say_task_score_and_tools() -> None:
    said = {"role": "assistant", "content": "a"}
    made = openai(said, instance_id="owner__repo-12_3", resolved=True, functions=[{"name": "n"}], system="s")
    assert (made.task, made.score) == ("owner__repo-12", 1.0)
    assert made.tools == ({"type": "function", "function": {"name": "n"}},)
    assert made.messages[0] == Message(role=Role.SYSTEM, content="s")
    assert openai(said, instance_id="plain_3").task == "plain_3"
    assert openai(said).task == "s#0"


@pytest.mark.parametrize(
    ("message", "detail"),
    [
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            r"messages\[1\]\.content\[0\]: a part of type im",
        ),
        ({"role": "user", "tool_calls": [{}]}, r"messages\[1\]\.tool_calls: on a message of role 'user'"),
        ({"role": "assistant", "tool_calls": "x"}, r"messages\[1\]\.tool_calls: not a list"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\]: no function name"),
    ],
)
def test_openai_messages_that_cannot_be_used_name_the_field(message: dict[str, Any], detail: str) -> None:
    with pytest.raises(MalformedRow, match=detail):
        openai(message)


def test_the_real_openai_rows(shared_data: Path) -> None:
    made = real(shared_data, "openai_messages/swe-gym_openhands_sampled.json")
    # The run's number is no part of the task: five runs of five instances.
    assert [one.task for one in made][:2] == ["python__mypy-15976", "Project-MONAI__MONAI-5686"]
    assert {one.score for one in made} == {1.0}
    turns = [reply for one in made for reply in replies(one)]
    assert [sum(len(turn.tool_calls) == count for turn in turns) for count in (0, 1, 2, 4)] == [8, 75, 4, 1]
    assert sum(message.role is Role.TOOL for one in made for message in one.messages) == 82
    assert all(isinstance(tool, dict) and tool["type"] == "function" for one in made for tool in one.tools)


# -- ShareGPT


def said(*pairs: tuple[str, Any], **fields: Any) -> Transcript:
    return sharegpt.transcript({"conversations": [{"from": a, "value": b} for a, b in pairs], **fields}, "s", 0)


def test_neighbours_without_anything_seen_between_them_are_one_turn() -> None:
    call = json.dumps({"name": "n", "arguments": {"k": 1}})
    made = said(
        ("human", "t"), ("gpt", "let me"), ("function_call", call), ("function_call", call), ("observation", "o")
    )
    assert [message.role for message in made.messages] == [Role.USER, Role.ASSISTANT, Role.TOOL]
    assert made.messages[1].content == "let me"
    assert [dict(one.arguments) for one in made.messages[1].tool_calls] == [{"k": 1}, {"k": 1}]


@pytest.mark.parametrize(
    ("value", "calls", "provenance"),
    [
        ('[{"name": "a", "arguments": "{}"}, {"name": "b"}]', [("a", {}), ("b", {})], Provenance.MODEL),
        ("a(k=1)", [("unknown_call", {"arguments": "a(k=1)"})], Provenance.MALFORMED_CALL),
        ('{"arguments": {}}', [("unknown_call", {"arguments": '{"arguments": {}}'})], Provenance.MALFORMED_CALL),
        ('{"name": "a", "arguments": "k="}', [("a", {"arguments": "k="})], Provenance.MALFORMED_CALL),
    ],
)
def test_sharegpt_calls(value: str, calls: list[tuple[str, dict[str, Any]]], provenance: Provenance) -> None:
    reply = said(("human", "t"), ("function_call", value), ("observation", "o")).messages[1]
    assert [(call.name, dict(call.arguments)) for call in reply.tool_calls] == calls
    assert reply.provenance is provenance


def test_the_real_sharegpt_rows(shared_data: Path) -> None:
    made = real(shared_data, "sharegpt/glaive_toolcall_en_demo.json")
    roles = [message.role for one in made for message in one.messages]
    assert [roles.count(role) for role in (Role.USER, Role.ASSISTANT, Role.TOOL)] == [746, 746 + 211, 211]
    calls = [call for one in made for reply in replies(one) for call in reply.tool_calls]
    assert len(calls) == 211
    assert all(reply.trained for one in made for reply in replies(one))
    tools = [tool for one in made for tool in one.tools]
    assert len(tools) == 219
    assert all(tool["type"] == "function" and "parameters" in tool["function"] for tool in tools)
    assert sum(not one.tools for one in made) == 109  # "[]"


# -- GLM's own


def test_the_real_glm_trajectory(shared_data: Path) -> None:
    (made,) = real(shared_data, "glm/trajectory_search.json")
    raw = json.loads((shared_data / "trajectories/glm/trajectory_search.json").read_text())["messages"]
    # The system text was the template's list of tools: it renders to the same text from `tools`.
    assert made.messages[0].role is Role.USER
    assert tools_text(made.tools) == "<|system|>\n" + raw[0]["content"]
    assert [tool["name"] for tool in made.tools] == ["search", "open", "finish"]
    # Every output is a result of its own, behind its turn, in the order of the calls.
    assert [len(reply.tool_calls) for reply in replies(made)] == [5, 1, 6, 1, 1]
    results = [message for message in made.messages if message.role is Role.TOOL]
    calls = [call for reply in replies(made) for call in reply.tool_calls]
    assert [result.tool_call_id for result in results] == [call.id for call in calls[:13]]
    assert results[4].content == raw[3]["content"][4]["output"]
    assert all(reply.reasoning and reply.trained for reply in replies(made))


def test_outputs_that_do_not_match_their_calls_are_refused() -> None:
    call = {"tool_call_id": "1", "name": "n", "arguments": "{}"}
    outputs = {"role": "tool", "content": [{"output": "a"}, {"output": "b"}]}
    row = {"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}, outputs]}
    with pytest.raises(MalformedRow, match=r"messages\[2\]\.content: 2 outputs for 1 calls"):
        glm.transcript(row, "s", 0)


# -- prompts with answers


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "p", "completion": "c"}, [("user", "p", True), ("assistant", "c", True)]),
        (
            {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "r"]]},
            [
                ("system", "s", True),
                ("user", "q", True),
                ("assistant", "r", True),
                ("user", "i\nx", True),
                ("assistant", "o", True),
            ],
        ),
        (
            {
                "prompt": [ASKED, {"role": "assistant", "content": "shown"}, ASKED],
                "completion": [{"role": "assistant", "content": "c"}],
            },
            [("user", "t", True), ("assistant", "shown", False), ("user", "t", True), ("assistant", "c", True)],
        ),
    ],
)
def test_prompts_with_answers(row: dict[str, Any], messages: list[tuple[str, str, bool]]) -> None:
    made = completion.transcript(row, "s", 0)
    assert [(str(message.role), message.content, message.trained) for message in made.messages] == messages


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"history": True}, "history: bool where a list belongs"),
        ({"history": [["q", "r"], ["q"]]}, r"history\[1\]: not a prompt and its answer"),
        ({"history": ["qr"]}, r"history\[0\]: not a prompt and its answer"),
        ({"history": [["q", 3]]}, r"history\[0\]\[1\]: neither text nor messages"),
        ({"input": ["x"]}, "input: not text"),
        ({"system": 3}, "system: not text"),
    ],
)
def test_damage_around_a_pair_is_named_with_its_field(fields: dict[str, Any], detail: str) -> None:
    row = {"instruction": "i", "output": "o", **fields}
    assert completion.recognises(row)
    with pytest.raises(MalformedRow, match=detail):
        completion.transcript(row, "s", 0)


def test_preference_pairs_are_not_taken_for_answers() -> None:
    assert not completion.recognises({"prompt": "p", "chosen": "c", "rejected": "r"})
