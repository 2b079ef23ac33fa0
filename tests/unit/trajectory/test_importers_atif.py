"""ATIF: what of a trajectory is the model's, what is the converter's, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.trajectory.importers import atif
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript

CALL = {"tool_call_id": "c1", "function_name": "Bash", "arguments": {"command": "ls"}}


def trajectory(*steps: dict[str, Any], agent: str = "claude-code", **root: Any) -> dict[str, Any]:
    numbered = [{"step_id": number, **step} for number, step in enumerate(steps, start=1)]
    return {
        "schema_version": "ATIF-v1.7",
        "session_id": "run",
        "agent": {"name": agent, "version": "1"},
        "steps": numbered,
        **root,
    }


def said(text: str = "", **fields: Any) -> dict[str, Any]:
    return {"source": "agent", "message": text, **fields}


def asked(text: str) -> dict[str, Any]:
    return {"source": "user", "message": text}


def called(text: str, identifier: str, **fields: Any) -> dict[str, Any]:
    results = {"results": [{"source_call_id": identifier, "content": f"result of {identifier}"}]}
    return said(text, tool_calls=[{**CALL, "tool_call_id": identifier}], observation=results, **fields)


def read(value: dict[str, Any]) -> Transcript:
    assert atif.recognises(value)
    return atif.transcript(value, "a.json", 3)


def replies(made: Transcript) -> list[Message]:
    return [message for message in made.messages if message.role is Role.ASSISTANT]


@pytest.mark.parametrize("value", [None, [], {}, {"steps": []}, {"schema_version": "ATIF-v1.2"}, {"messages": []}])
def test_other_json_is_not_recognised(value: object) -> None:
    assert not atif.recognises(value)


def test_a_step_becomes_a_reply_and_its_results() -> None:
    tools = [{"type": "function", "function": {"name": "Bash"}}]
    value = trajectory(
        {"source": "system", "message": "s"}, asked("t"), called("I look.", "c1", reasoning_content="hm")
    )
    value["agent"]["tool_definitions"] = tools
    value["steps"][2]["timestamp"] = "2026-01-01T00:00:00Z"
    made = read(value)
    assert [message.role for message in made.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL]
    reply, result = made.messages[2:]
    assert (reply.content, reply.reasoning, reply.tool_calls[0].arguments) == ("I look.", "hm", {"command": "ls"})
    assert reply.time_seconds == 1767225600
    assert (result.tool_call_id, result.content) == ("c1", "result of c1")
    assert (made.id, made.source, made.tools, made.format) == ("run#3", "a.json", tuple(tools), "atif")


def test_the_blocks_of_a_reply_are_one_turn_without_the_converters_text() -> None:
    metrics = {"completion_tokens": 9}
    made = read(
        trajectory(
            asked("t"),
            said("I look.", metrics=metrics),
            called("Executed Bash c1", "c1"),
            called("Executed Bash c2", "c2"),
            called("Executed Bash c3", "c3", metrics=metrics),
        )
    )
    first, second = replies(made)
    assert first.content == "I look."
    assert [call.id for call in first.tool_calls] == ["c1", "c2"]
    assert (second.content, [call.id for call in second.tool_calls]) == ("", ["c3"])
    assert [message.tool_call_id for message in made.messages if message.role is Role.TOOL] == ["c1", "c2", "c3"]
    assert first.trained
    assert second.trained


def test_without_metrics_only_a_text_is_joined_by_the_call_after_it() -> None:
    made = read(
        trajectory(asked("t"), said("I look."), called("Executed Bash c1", "c1"), called("Executed Bash", "c2"))
    )
    assert [(reply.content, len(reply.tool_calls)) for reply in replies(made)] == [("I look.", 1), ("", 1)]


def test_text_of_the_model_that_only_looks_like_the_converters_stays() -> None:
    made = read(trajectory(asked("t"), called("Executed Bash c9", "c1")))
    assert replies(made)[0].content == "Executed Bash c9"


@pytest.mark.parametrize(
    ("step", "provenance"),
    [
        (said("x"), Provenance.MODEL),
        (said("x", llm_call_count=1), Provenance.MODEL),
        (said("x", is_copied_context=True), Provenance.COPIED),
        (said("x", llm_call_count=0), Provenance.SYNTHETIC),
        (said("x", llm_call_count=2), Provenance.SYNTHETIC),
        (said("x", model_name="<synthetic>"), Provenance.API_ERROR),
        (said("x", extra={"stop_reason": "max_tokens"}), Provenance.ABORTED),
        (said("x", tool_calls=[CALL], extra={"raw_arguments": '{"command": "l'}), Provenance.MALFORMED_CALL),
        (said("x", tool_calls=[{**CALL, "tool_call_id": ""}]), Provenance.MALFORMED_CALL),
    ],
)
def test_what_the_model_did_not_say_is_marked(step: dict[str, Any], provenance: Provenance) -> None:
    (reply,) = replies(read(trajectory(asked("t"), step)))
    assert reply.provenance is provenance
    assert reply.trained == (provenance is Provenance.MODEL)
    assert reply.content == "x"


def test_a_summary_of_reasoning_is_missing_reasoning() -> None:
    step = said("x", reasoning_content="**Listing files**")
    assert replies(read(trajectory(asked("t"), step)))[0].reasoning == "**Listing files**"
    assert replies(read(trajectory(asked("t"), step, agent="codex")))[0].reasoning is None


def test_ids_of_a_vocabulary_nobody_named_are_not_kept() -> None:
    step = said("x", metrics={"completion_token_ids": [1, 2], "logprobs": [-0.1, -0.2]})
    assert replies(read(trajectory(asked("t"), step)))[0].sampled is None


def test_runs_of_one_task_share_it_whatever_stands_before_the_task() -> None:
    one = read(trajectory(asked("today is Monday"), asked("do it"), said("a")))
    other = read(trajectory(asked("today is Friday"), asked("do it"), said("b"), session_id="second"))
    third = read(trajectory(asked("today is Monday"), asked("do that"), said("a")))
    assert one.task == other.task != third.task
    assert one.id != other.id


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read(trajectory({"source": "user", "message": parts}, said("x"))).messages[0].content == "a\nb"


IMAGE = {"type": "image", "source": {"media_type": "image/png", "path": "a.png"}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (trajectory(asked("t"), schema_version="ATIF-v2.0"), "schema_version: ATIF-v2.0 is not known"),
        (trajectory(said("x"), subagent_trajectories=[trajectory(said("y"))]), "subagent_trajectories: runs of other"),
        (trajectory(said("x", extra={"is_sidechain": True})), r"steps\[0\].extra.is_sidechain: a subagent's step"),
        (
            trajectory(asked("t"), {"source": "user", "message": [IMAGE]}),
            r"steps\[1\].message\[0\]: a part of type image",
        ),
        (
            trajectory(said("x", observation={"results": [{"content": [IMAGE]}]})),
            r"steps\[0\].observation.results\[0\].content\[0\]: a part of type image",
        ),
        (
            trajectory(said("x", observation={"results": [{"subagent_trajectory_ref": [{"trajectory_id": "s"}]}]})),
            r"results\[0\]: what a subagent answered",
        ),
        (trajectory({"source": "robot", "message": ""}), r"steps\[0\].source: must be"),
        (trajectory(said("x", tool_calls=[{**CALL, "arguments": "ls"}])), r"tool_calls\[0\].arguments: not an object"),
        (trajectory(said("x", tool_calls=[{"tool_call_id": "c"}])), r"tool_calls\[0\].function_name: missing"),
        (trajectory(said("x", timestamp="noon")), r"steps\[0\].timestamp: 'noon' is not"),
        (trajectory(said("x", extra={"klong": {"provenance": "god"}})), "provenance: 'god' is not one of model, "),
        (trajectory(said("x", metrics=[])), r"steps\[0\].metrics: not an object"),
        (trajectory(said("x"), agent="a") | {"agent": None}, "trajectory.agent: not an object"),
        (trajectory(said("x", tool_calls=True)), r"steps\[0\].tool_calls: bool where a list belongs"),
        (trajectory(said("x", tool_calls=[None])), r"tool_calls\[0\].function_name: missing"),
        (trajectory(said("x", tool_calls=[{**CALL, "tool_call_id": []}])), r"tool_calls\[0\].tool_call_id: list where"),
        (trajectory(said("x", observation={"results": 3})), r"steps\[0\].observation.results: int where a list"),
        (trajectory(said("x", observation={"results": ["r"]})), r"observation.results\[0\]: not an object"),
        (
            trajectory(said("x", observation={"results": [{"source_call_id": ["c1"]}]})),
            r"results\[0\].source_call_id: list where text belongs",
        ),
        (trajectory(said("x", reasoning_content=3)), r"steps\[0\].reasoning_content: int where text belongs"),
        (trajectory(asked("t"), {"source": "user", "message": 3}), r"steps\[1\].message: neither text nor a list"),
        (
            trajectory(said("x")) | {"agent": {"name": "a", "tool_definitions": [3]}},
            "agent.tool_definitions: int where an object belongs",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_field(value: dict[str, Any], message: str) -> None:
    with pytest.raises(MalformedRow, match=message):
        read(value)


@pytest.mark.parametrize(("ids", "ended"), [(3, False), ([1, "2"], False), ([True], False), ([], True)])
def test_sampled_ids_that_are_none_are_refused(ids: Any, ended: bool) -> None:
    step = said("x", metrics={"completion_token_ids": ids}, extra={"klong": {"sampled_end": ended}})
    with pytest.raises(MalformedRow, match=r"steps\[1\].metrics.completion_token_ids: (int where|not the token ids)"):
        read(trajectory(asked("t"), step, extra={"klong": {"tokenizer_sha256": "bytes"}}))


def test_a_call_after_a_user_s_step_is_no_block_of_an_earlier_reply() -> None:
    made = read(trajectory(said("a", metrics={"m": 1}), asked("t"), called("Executed Bash c1", "c1")))
    assert [len(reply.tool_calls) for reply in replies(made)] == [0, 1]


def real(shared_data: Path, name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((shared_data / "trajectories" / "atif" / name).read_bytes())
    return parsed


def test_the_real_claude_code_run_has_a_turn_for_each_reply_the_provider_billed(shared_data: Path) -> None:
    value = real(shared_data, "04-heston-haiku.trajectory.json")
    billed = [step for step in value["steps"] if "metrics" in step]
    assert sum(step["metrics"]["completion_tokens"] for step in billed) == 44_319  # the total that the file states
    made = read(value)
    assert made.turns == len(billed) == 59
    assert sum(step["source"] == "agent" for step in value["steps"]) == 97
    assert sum(len(message.tool_calls) for message in made.messages) == 58
    assert all(message.trained for message in made.messages)


def test_nothing_of_the_converters_is_left_in_the_real_claude_code_run(shared_data: Path) -> None:
    value = real(shared_data, "04-heston-haiku.trajectory.json")
    assert sum(step["message"].startswith("Executed ") for step in value["steps"]) == 58
    made = read(value)
    assert not any(message.content.startswith("Executed ") for message in replies(made))
    assert sum(not message.content for message in replies(made)) == 20
    results = [message.content for message in made.messages if message.role is Role.TOOL]
    assert results[0] == "(Bash completed with no output)"
    assert not any("\n\n[metadata] {" in result for result in results)


def test_calls_the_provider_ran_itself_are_not_trained_in_the_real_codex_run(shared_data: Path) -> None:
    made = read(real(shared_data, "07-codex.trajectory.json"))
    searches = [message for message in replies(made) if message.provenance is Provenance.MALFORMED_CALL]
    assert [message.tool_calls[0].name for message in searches] == ["web_search_call"] * 2
    assert [message.role for message in made.messages[:3]] == [Role.SYSTEM, Role.USER, Role.USER]
    assert (made.turns, len(made.messages)) == (7, 16)  # two of them say that no result was recorded
    assert [bool(message.content) for message in replies(made)] == [True, False, False, True, True, False, True]
