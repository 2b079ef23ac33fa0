"""Samples of Inspect AI logs: what the agent said and saw is rebuilt whole, nobody else's words become its turns."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.trajectory.importers import inspect_samples
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Reading, Role, Transcript

type Raw = dict[str, Any]


def said(role: str, text: Any, identifier: str | None = None, **fields: Any) -> Raw:
    return {"id": identifier or f"{role}:{text}", "role": role, "content": text, **fields}


def call(identifier: str, function: str = "bash", **fields: Any) -> Raw:
    return {"id": identifier, "function": function, "arguments": {"cmd": identifier}, **fields}


def result(identifier: str, text: str = "ok", **fields: Any) -> Raw:
    return said("tool", text, f"result of {identifier}", tool_call_id=identifier, **fields)


def model_event(prompt: Sequence[Raw], reply: Raw | None, **fields: Any) -> Raw:
    choices = [] if reply is None else [{"message": reply, "stop_reason": fields.pop("stop_reason", "stop")}]
    return {"event": "model", "model": "m", "input": list(prompt), "output": {"choices": choices}, **fields}


def sample(events: Sequence[Raw], messages: Sequence[Raw], **fields: Any) -> Raw:
    return {"id": "s", "epoch": 2, "messages": list(messages), "events": list(events), **fields}


def read(raw: Raw) -> Transcript:
    return inspect_samples.transcript(raw, {"task": "t", "model": "m"}, "log.eval")


def only_reply(reply: Raw, **fields: Any) -> Message:
    prompt = [said("user", "do it")]
    (message,) = read(sample([model_event(prompt, reply, **fields)], [*prompt, reply])).messages[1:]
    return message


def texts(made: Transcript) -> list[str]:
    return [message.content for message in made.messages]


TASK = said("user", "do it")
FIRST, SECOND = said("assistant", "first", tool_calls=[call("c1")]), said("assistant", "second")


def test_a_sample_becomes_a_transcript_with_the_names_of_its_log() -> None:
    tools = [{"name": "bash", "description": "runs", "parameters": {"type": "object"}, "options": None}]
    times = {"completed": "2026-01-01T00:00:02+00:00", "timestamp": "2026-01-01T00:00:01+00:00"}
    events = [
        model_event([TASK], FIRST, tools=tools, **times),
        {"event": "tool", "id": "c1", "completed": "2026-01-01T00:00:03+00:00"},
    ]
    made = read(sample(events, [TASK, FIRST, result("c1")], scores={"s": {"value": 0.5}}))
    assert (made.id, made.task, made.source, made.format, made.score) == ("t/s#2", "t/s", "log.eval", "inspect", 0.5)
    function = {"name": "bash", "description": "runs", "parameters": {"type": "object"}}
    assert made.tools == ({"type": "function", "function": function},)
    assert [message.role for message in made.messages] == [Role.USER, Role.ASSISTANT, Role.TOOL]
    assert [message.time_seconds for message in made.messages] == [None, 1767225602, 1767225603]
    assert made.messages[1].tool_calls[0].arguments == {"cmd": "c1"}


def test_a_trimmed_run_is_rebuilt_from_its_prompts() -> None:
    """The prompts hold the task and the newest two messages; `messages` holds what the last of them held."""
    run = [TASK]
    events = []
    for number in range(6):
        reply = said("assistant", f"r{number}", tool_calls=[call(f"c{number}")])
        events.append(model_event([TASK, *run[1:][-2:]], reply))
        run += [reply, result(f"c{number}", "ok")]
    made = read(sample(events, [TASK, *run[-2:]]))
    assert texts(made) == [message["content"] for message in run]
    assert made.turns == 6


@settings(max_examples=100)
@given(data=st.data())
def test_any_run_is_rebuilt_however_its_prompts_were_trimmed(data: st.DataObject) -> None:
    """Users and tools repeat themselves, and a pool gives equal messages one id."""
    run, events = [TASK], []
    for number in range(data.draw(st.integers(1, 8))):
        kept = data.draw(st.integers(1, len(run)))
        start = len(run) - kept if run[-kept]["role"] != "tool" else len(run) - kept - 1
        prompt = run if start <= 1 else [TASK, *run[start:]]
        prompt = prompt if any(m["role"] == "assistant" for m in prompt[1:]) else run
        reply = said("assistant", f"r{number}")
        events.append(model_event(prompt, reply))
        run = [*run, reply, said("user", data.draw(st.sampled_from(["go on", "why?", "do it"])))]
    made = read(sample(events, [TASK, *run[-2:]]))
    assert texts(made) == [message["content"] for message in run]


def test_a_summary_in_place_of_history_is_kept_where_it_was_shown() -> None:
    summary = said("user", "so far: nothing")
    events = [model_event([TASK], FIRST), model_event([TASK, summary], SECOND)]
    made = read(sample(events, [TASK, summary, SECOND]))
    assert texts(made) == ["do it", "first", "[no result recorded]", "so far: nothing", "second"]


def test_a_reply_that_was_asked_for_again_is_no_turn() -> None:
    events = [model_event([TASK], SECOND), model_event([TASK], FIRST)]
    assert texts(read(sample(events, [TASK, FIRST, result("c1")]))) == ["do it", "first", "ok"]


def test_a_reply_the_scaffold_edited_stays_as_the_model_said_it() -> None:
    edited = said("assistant", "SECOND", "other")
    events = [model_event([TASK], SECOND), model_event([TASK, edited, said("user", "go on")], FIRST)]
    assert texts(read(sample(events, [TASK]))) == ["do it", "second", "go on", "first"]


def test_calls_that_failed_or_never_ended_are_no_turns() -> None:
    empty = said("assistant", "")
    events = [
        model_event([TASK], empty, error="rate limit"),
        model_event([TASK], empty, pending=True),
        model_event([TASK], None),
        model_event([TASK], SECOND),
    ]
    assert texts(read(sample(events, [TASK, SECOND]))) == ["do it", "second"]


@pytest.mark.parametrize(
    "others",
    [
        {"role": "grader"},
        {"model": "judge"},
        {"span_id": "scoring"},
        {"span_id": "inside scoring"},
        {"span_id": "tool"},
        {"input": [said("user", "is this right?")]},
    ],
)
def test_replies_of_others_are_no_turns(others: Mapping[str, Any]) -> None:
    spans = [
        {"event": "span_begin", "id": "agent", "type": "agent"},
        {"event": "span_begin", "id": "scoring", "type": "scorers"},
        {"event": "span_begin", "id": "inside scoring", "type": "x", "parent_id": "scoring"},
        {"event": "span_begin", "id": "tool", "type": "tool", "parent_id": "agent"},
    ]
    events = [model_event([TASK], FIRST, span_id="agent"), model_event([TASK], said("assistant", "good"))]
    events[1].update(others)
    assert texts(read(sample([*spans, *events], [TASK, FIRST, result("c1")]))) == ["do it", "first", "ok"]


def test_scorers_of_logs_older_than_spans_are_told_by_their_step() -> None:
    step = {"event": "step", "type": "scorer", "name": "judge"}
    judge = model_event([TASK], said("assistant", "good"))
    events = [model_event([TASK], SECOND), {**step, "action": "begin"}, judge, {**step, "action": "end"}]
    assert texts(read(sample(events, [TASK, SECOND]))) == ["do it", "second"]


@pytest.mark.parametrize(
    ("source", "provenance"),
    [
        ("input", Provenance.DEMONSTRATION),
        ("generate", Provenance.COPIED),
        (None, Provenance.SYNTHETIC),
    ],
)
def test_replies_that_came_with_the_prompt_are_context(source: str | None, provenance: Provenance) -> None:
    shown = said("assistant", "example", source=source)
    made = read(sample([model_event([TASK, shown, said("user", "now you")], SECOND)], [TASK, shown]))
    assert [(m.provenance, m.trained) for m in made.messages if m.role is Role.ASSISTANT] == [
        (provenance, False),
        (Provenance.MODEL, True),
    ]


def test_without_events_the_messages_are_all_there_is() -> None:
    made = read(sample([], [TASK, FIRST, result("c1"), SECOND]))
    assert (made.turns, made.messages[-1].provenance) == (2, Provenance.MODEL)


@pytest.mark.parametrize(
    ("parts", "reasoning"),
    [
        ([{"type": "reasoning", "reasoning": "hm", "signature": "abc"}], "hm"),
        ([{"type": "reasoning", "reasoning": "hm", "summary": "short"}], "hm"),
        ([{"type": "reasoning", "reasoning": "gAAAA", "redacted": True}], None),
        ([{"type": "reasoning", "reasoning": "gAAAA", "redacted": True, "summary": "short"}], None),
        ([{"type": "reasoning", "reasoning": "", "summary": "short"}], None),
        ([{"type": "reasoning", "reasoning": "short", "summary": "short"}], None),
        ([{"type": "reasoning", "reasoning": "short", "signature": "rs_1"}], None),
        ([{"type": "reasoning", "reasoning": "a"}, {"type": "reasoning", "reasoning": "b"}], "a\nb"),
        ([{"type": "reasoning", "reasoning": "a"}, {"type": "reasoning", "reasoning": "x", "redacted": True}], None),
    ],
)
def test_reasoning_is_what_the_model_thought_or_missing(parts: list[Raw], reasoning: str | None) -> None:
    message = only_reply(said("assistant", [*parts, {"type": "text", "text": "so"}], "a"))
    assert (message.content, message.reasoning, message.trained) == ("so", reasoning, True)


@pytest.mark.parametrize(
    ("reply", "fields", "provenance"),
    [
        (said("assistant", "x"), {}, Provenance.MODEL),
        (said("assistant", "x"), {"stop_reason": "max_tokens"}, Provenance.ABORTED),
        (said("assistant", "x", tool_calls=[call("c", parse_error="bad")]), {}, Provenance.MALFORMED_CALL),
        (said("assistant", [{"type": "tool_use", "name": "web_search"}], "a"), {}, Provenance.MALFORMED_CALL),
        (
            said("assistant", "no service"),
            {"output": {"error": "503", "choices": [{"message": said("assistant", "no service")}]}},
            Provenance.API_ERROR,
        ),
    ],
)
def test_replies_that_are_not_whole_are_marked(reply: Raw, fields: Raw, provenance: Provenance) -> None:
    message = only_reply(reply, **fields)
    assert (message.provenance, message.trained) == (provenance, provenance is Provenance.MODEL)


def test_a_failed_call_of_a_tool_shows_what_the_model_was_shown() -> None:
    failed = result("c1", "half of the output", error={"type": "timeout", "message": "timed out"})
    made = read(sample([model_event([TASK], FIRST)], [TASK, FIRST, failed]))
    assert texts(made)[-1] == "Error: timed out"


def test_marks_of_our_own_scaffold_are_honoured() -> None:
    shown = result("c1", metadata={"klong_reading": "part"})
    raw = sample([model_event([TASK], FIRST)], [TASK, FIRST, shown], store={"klong_episode": {}})
    made = read({**raw, "metadata": {"task": "paper", "rollout": 7}})
    assert made.messages[-1].reading is Reading.PART
    assert (made.task, made.id) == ("paper", "paper/m/7")  # those of the episode record of the same run


@pytest.mark.parametrize(
    ("scores", "score"),
    [
        ({}, None),
        (None, None),
        ({"a": {"value": 1}}, 1.0),
        ({"a": {"value": True}}, 1.0),
        ({"a": {"value": "C"}}, 1.0),
        ({"a": {"value": "I"}}, 0.0),
        ({"a": {"value": "yes"}}, None),
        ({"a": {"value": float("nan")}}, None),
        ({"a": {"value": {"x": 1}}}, None),
        ({"a": {"value": 1}, "b": {"value": 0}}, None),
    ],
)
def test_one_number_is_a_score(scores: Raw | None, score: float | None) -> None:
    assert read(sample([], [TASK, SECOND], scores=scores)).score == score


IMAGE = [{"type": "image", "image": "data:image/png;base64,"}]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "id: missing"),
        (sample([], [TASK]) | {"messages": "x"}, "messages: not a list of objects"),
        (sample([], [TASK]) | {"events": [3]}, "events: not a list of objects"),
        (sample([], [said("user", IMAGE), SECOND]), r"message 0.content\[0\]: a part of type image"),
        (sample([], [said("user", "attachment://" + "a" * 32), SECOND]), "attachments: a{32} is missing"),
        (sample([model_event([], SECOND, input_refs=[[0, 2]])], []), r"events\[0\].input_refs: \[0, 2\) is outside"),
        (sample([], [TASK, said("assistant", "", tool_calls=[{"id": "c"}])]), r"tool_calls\[0\].function: missing"),
        (sample([], [said("robot", "x")]), "message 0.role: 'robot' is not one of system, user, assistant, tool"),
        (sample([], [FIRST, result("c1", metadata={"klong_reading": "x"})]), "klong_reading: 'x' is not one of none"),
        (sample([model_event([TASK], SECOND, completed="noon")], [TASK]), r"events\[0\].completed: 'noon' is not"),
        (sample([], [{**TASK, "id": []}, SECOND]), "messages.id: list where text belongs"),
        (sample([], [{**TASK, "role": []}, SECOND]), "role: list where text belongs"),
        (sample([], [FIRST, {**result("c1"), "tool_call_id": 3}]), "tool_call_id: int where text belongs"),
        (sample([model_event([TASK], SECOND, model=["m"])], []), r"events\[0\].model: list where text belongs"),
        (sample([model_event([TASK], SECOND, stop_reason=[])], []), r"choices\[0\].stop_reason: list where text"),
        (sample([model_event([], SECOND, input_refs=[3])], []), r"events\[0\].input_refs: 3 is no range"),
        (sample([model_event([], SECOND, input_refs=3)], []), r"events\[0\].input_refs: int where a list belongs"),
        (sample([], [TASK, SECOND], metadata=[]), "metadata: not an object"),
        (
            sample(
                [{"event": "span_begin", "id": "a", "parent_id": "a"}, model_event([TASK], SECOND, span_id="a")], []
            ),
            r"events\[1\].span_id: the span 'a' is inside itself",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_field(raw: Any, message: str) -> None:
    with pytest.raises(MalformedRow, match=message):
        read(raw)
