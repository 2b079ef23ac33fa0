"""OpenHands V1 events: hand-written after the upstream definitions, for no published file is at hand."""

import json
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.trajectory.importers.checks import check
from megatron_klong.trajectory.importers.openhands_events import FORMAT
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript


def text(*words: str) -> list[dict[str, Any]]:
    return [{"cache_prompt": False, "type": "text", "text": word} for word in words]


def event(kind: str, identity: str, source: str = "environment", **more: Any) -> dict[str, Any]:
    return {"id": identity, "timestamp": "2026-06-16T05:39:48.5", "source": source, "kind": kind, **more}


def act(identity: str, response: str, call: str, arguments: str = "{}", **more: Any) -> dict[str, Any]:
    return event(
        "ActionEvent",
        identity,
        "agent",
        **{
            "thought": [],
            "reasoning_content": None,
            "thinking_blocks": [],
            "action": {"kind": "TerminalAction"},
            "tool_name": "terminal",
            "tool_call_id": call,
            "tool_call": {"id": call, "name": "terminal", "arguments": arguments, "origin": "completion"},
            "llm_response_id": response,
            **more,
        },
    )


def seen(identity: str, call: str, content: Any, **more: Any) -> dict[str, Any]:
    observation = {"kind": "TerminalObservation", "content": content, "is_error": False, **more}
    return event("ObservationEvent", identity, tool_name="terminal", tool_call_id=call, observation=observation)


def said(identity: str, source: str, role: str, words: str, **more: Any) -> dict[str, Any]:
    extended = more.pop("extended_content", [])
    message = {"role": role, "content": text(words), "thinking_blocks": [], **more}
    return event("MessageEvent", identity, source, llm_message=message, extended_content=extended)


SYSTEM = event(
    "SystemPromptEvent",
    "e1",
    "agent",
    system_prompt=text("You are an agent.")[0],
    dynamic_context=text("Host: a.")[0],
    tools=[
        {"title": "terminal", "description": "Runs.", "action_type": "TerminalAction", "kind": "TerminalTool"},
        {"title": "Edit files", "description": "Edits.", "action_type": "A", "kind": "FileEditorTool"},
        {
            "title": "fetch",
            "description": "Gets.",
            "kind": "MCPToolDefinition",
            "mcp_tool": {"name": "fetch", "inputSchema": {"type": "object"}},
        },
    ],
)
STATE = event("ConversationStateUpdateEvent", "e0", key="full_state", value={"id": "conversation-1"})
TASK = said("e2", "user", "user", "Fix it.", extended_content=text("Use tabs."))
ACT = act("e3", "r1", "a", '{"command": "ls", "security_risk": "LOW"}', thought=text("I look."), reasoning_content="hm")
SEEN = seen("e4", "a", text("a.py"))
DONE = said("e5", "agent", "assistant", "Done.")
EVENTS: list[dict[str, Any]] = [STATE, SYSTEM, TASK, ACT, SEEN, DONE]


def read(*events: dict[str, Any]) -> Transcript:
    lines = deepcopy(list(events))
    assert FORMAT.recognises(lines[:20])
    (made,) = FORMAT.transcripts(iter(lines), "events.jsonl")
    assert made.turns == 0 or check(made) is None
    return made


def replies(made: Transcript) -> list[Message]:
    return [message for message in made.messages if message.role is Role.ASSISTANT]


def test_a_conversation_is_what_its_prompts_were_made_of() -> None:
    made = read(*EVENTS)
    assert (made.id, made.task, made.format) == ("conversation-1", "conversation-1", "openhands_events")
    assert [(message.role, message.content) for message in made.messages] == [
        (Role.SYSTEM, "You are an agent.\nHost: a."),
        (Role.USER, "Fix it.\nUse tabs."),
        (Role.ASSISTANT, "I look."),
        (Role.TOOL, "a.py"),
        (Role.ASSISTANT, "Done."),
    ]
    reply = made.messages[2]
    assert (reply.reasoning, reply.time_seconds) == ("hm", 1781588388.5)  # a time without zone is read as UTC
    assert reply.tool_calls[0].arguments == {"command": "ls", "security_risk": "LOW"}  # the model's, not the program's


def test_tools_are_named_as_the_model_calls_them() -> None:
    functions = [tool["function"] for tool in read(*EVENTS).tools]
    assert [function["name"] for function in functions] == ["terminal", "file_editor", "fetch"]
    assert [function.get("parameters") for function in functions] == [None, None, {"type": "object"}]
    openai = {"type": "function", "function": {"name": "bash", "parameters": {}}}
    assert read({**SYSTEM, "tools": [openai]}, TASK, DONE).tools == (openai,)


def test_parallel_calls_of_one_response_are_one_turn() -> None:
    first = act("e3", "r1", "a", thought=text("Both."), thinking_blocks=[{"type": "thinking", "thinking": "hm"}])
    made = read(TASK, first, STATE, act("e4", "r1", "b"), seen("e5", "b", text("B")), seen("e6", "a", text("A")), DONE)
    assert made.turns == 2
    assert (made.messages[1].content, made.messages[1].reasoning) == ("Both.", "hm")
    assert [call.id for call in made.messages[1].tool_calls] == ["a", "b"]
    assert [message.content for message in made.messages[2:]] == ["A", "B", "Done."]


def test_results_that_interleave_with_parallel_calls_stand_behind_the_turn() -> None:
    made = read(
        TASK, act("e3", "r1", "a"), seen("e4", "a", text("A")), act("e5", "r1", "b"), seen("e6", "b", text("B"))
    )
    assert [message.role for message in made.messages] == [Role.USER, Role.ASSISTANT, Role.TOOL, Role.TOOL]


def test_reasoning_repeated_in_the_text_is_there_once() -> None:
    repeated = act("e3", "r1", "a", thought=text("<think>hm\n</think>\n\nI look."), reasoning_content="hm\n")
    other = act("e5", "r2", "b", thought=text("<think>x</think>I look."), reasoning_content="hm")
    made = read(TASK, repeated, SEEN, other)
    assert [(reply.reasoning, reply.content) for reply in replies(made)] == [
        ("hm\n", "I look."),
        ("hm", "<think>x</think>I look."),
    ]


def test_errors_and_rejections_answer_their_calls() -> None:
    failed = event("AgentErrorEvent", "e4", "agent", tool_name="terminal", tool_call_id="a", error="No such tool.")
    rejected = event("UserRejectObservation", "e6", tool_name="terminal", tool_call_id="b", rejection_reason="No!")
    made = read(
        TASK,
        act("e3", "r1", "a", action=None),
        failed,
        act("e5", "r2", "b"),
        rejected,
        act("e7", "r3", "c"),
        seen("e8", "c", text("boom"), is_error=True),
    )
    assert [message.content for message in made.messages if message.role is Role.TOOL] == [
        "No such tool.",
        "Action rejected: No!",
        "[An error occurred during execution.]\nboom",
    ]


def test_a_command_shows_directory_and_exit_code_and_a_picture_a_mark() -> None:
    shell = {"exit_code": 2, "working_dir": "/w", "prefix": "", "suffix": "\n[done]", "py_interpreter_path": None}
    made = read(
        TASK,
        ACT,
        seen("e4", "a", text("a.py"), metadata=shell),
        act("e5", "r2", "b"),
        seen("e6", "b", [*text("page"), {"type": "image", "image_urls": ["data:..."]}]),
        act("e7", "r3", "c"),
        seen("e8", "c", None, output="early version"),
    )
    assert [message.content for message in made.messages if message.role is Role.TOOL] == [
        "a.py\n[done]\n[Current working directory: /w]\n[Command finished with exit code 2]",
        "page\n[image]",
        "early version",
    ]


def test_a_condensation_leaves_the_events_and_adds_the_summary() -> None:
    condensed = event(
        "Condensation", "e5", forgotten_event_ids=["e3", "e4"], summary="Looked.", summary_offset=2, llm_response_id="s"
    )
    made = read(*EVENTS[:5], event("CondensationRequest", "e6"), condensed, DONE)
    assert made.turns == 2
    assert (made.messages[4].role, made.messages[4].content) == (Role.USER, "Looked.")
    assert made.messages[4].provenance is Provenance.COPIED
    assert len(read(*EVENTS[:5], {**condensed, "summary": None}, DONE).messages) == 5


def test_events_for_people_are_left_out() -> None:
    unseen = [
        event("PauseEvent", "u1", "user"),
        event("InterruptEvent", "u2", "user"),
        event("ConversationErrorEvent", "u3", code="X", detail="y"),
        event("TokenEvent", "u4", "agent", prompt_token_ids=[1], response_token_ids=[2]),
        event("HookExecutionEvent", "u5", "hook", hook_event_type="Stop"),
    ]
    assert len(read(*EVENTS[:4], *unseen, *EVENTS[4:]).messages) == 5


def test_who_speaks_in_the_models_name_without_being_it() -> None:
    made = read(TASK, said("e3", "user", "assistant", "I said this before."), DONE)
    assert [reply.provenance for reply in replies(made)] == [Provenance.SYNTHETIC, Provenance.MODEL]


def test_a_call_without_result_and_a_result_without_call_come_out_valid() -> None:
    made = read(TASK, ACT, seen("e4", "z", text("who?")), act("e5", "r2", "b", '{"command": "l'), DONE)
    assert [message.role for message in made.messages[1:]] == [
        Role.ASSISTANT,
        Role.TOOL,
        Role.ASSISTANT,
        Role.TOOL,
        Role.ASSISTANT,
        Role.TOOL,
        Role.ASSISTANT,
    ]
    assert [reply.provenance for reply in replies(made)] == [
        Provenance.MODEL,
        Provenance.SYNTHETIC,
        Provenance.MALFORMED_CALL,
        Provenance.MODEL,
    ]


def test_one_unreadable_call_of_several_keeps_the_turn_from_training() -> None:
    (reply,) = replies(read(TASK, act("e3", "r1", "a"), act("e4", "r1", "b", "[1]")))
    assert (len(reply.tool_calls), reply.provenance) == (2, Provenance.MALFORMED_CALL)


def test_the_transcript_is_the_path_to_the_last_event() -> None:
    left = {**said("e3", "agent", "assistant", "Left behind."), "parent_id": "e2"}
    taken = {**said("e4", "agent", "assistant", "Taken."), "parent_id": "e2"}
    made = read({**TASK, "parent_id": "__root__"}, left, taken)
    assert [message.content for message in made.messages[1:]] == ["Taken."]
    again = {**said("e3", "user", "user", "From the start."), "parent_id": "__root__"}
    assert [message.content for message in read(TASK, again, DONE).messages] == ["From the start.", "Done."]
    # events from before there were parents follow each other
    assert len(read(TASK, said("e3", "agent", "assistant", "Old."), {**DONE, "parent_id": "e3"}).messages) == 3


def test_a_module_before_the_class_is_read_too() -> None:
    early = [{**line, "kind": f"openhands.sdk.event.llm_convertible.{line['kind']}"} for line in EVENTS[1:]]
    assert read(*early).turns == 2


@pytest.mark.parametrize(
    ("events", "detail"),
    [
        ([TASK, event("NewEvent", "e3")], "event 2.kind: NewEvent is of an unknown version"),
        ([TASK, event("ACPToolCallEvent", "e3", "agent")], "that agent's own log"),
        ([{**ACT, "tool_call": None}], "event 1.tool_call"),
        ([{**ACT, "llm_response_id": None}], "event 1.llm_response_id"),
        ([{**SEEN, "observation": "x"}], "event 1.observation"),
        ([{**TASK, "llm_message": {"role": "oracle"}}], "oracle"),
        ([{**TASK, "timestamp": "noon"}], "timestamp"),
        ([{**TASK, "parent_id": "e5"}, DONE], "event 1.parent_id"),
        (["x"], "event 1"),
    ],
)
def test_damage_is_refused_with_the_field(events: list[Any], detail: str) -> None:
    with pytest.raises(MalformedRow, match=detail):
        list(FORMAT.transcripts(iter(events), "events.jsonl"))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"type": "message", "role": "user"}],
        [{"kind": "Unheard"}],
        [{"kind": 3}],
        [{"action": "run", "source": "agent"}],
        [TASK, {"type": "session_meta"}],
    ],
)
def test_other_lines_are_not_taken_for_it(lines: list[dict[str, Any]]) -> None:
    assert not FORMAT.recognises(lines)


@given(st.lists(st.booleans(), min_size=11, max_size=11), st.booleans())
def test_a_damaged_log_is_read_or_refused(kept: list[bool], linked: bool) -> None:
    log = [
        *EVENTS[:5],
        act("e5", "r2", "b"),
        act("e6", "r2", "c"),
        seen("e7", "c", text("C")),
        seen("e8", "b", text("B")),
        event("Condensation", "e9", summary="s"),
        {**DONE, "id": "e10"},
    ]
    if linked:
        log = [
            {**line, "parent_id": before["id"]} for before, line in zip([{"id": "__root__"}, *log], log, strict=False)
        ]
    lines = json.loads(json.dumps([line for line, keep in zip(log, kept, strict=True) if keep]))
    try:
        (made,) = FORMAT.transcripts(iter(lines), "events.jsonl")
    except MalformedRow:
        return
    assert made.turns == 0 or check(made) is None
