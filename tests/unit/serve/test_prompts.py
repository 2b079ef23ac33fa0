"""Prompts of chat: equal to what is trained on, which is the model's template; errors name the message."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_klong.serve.parsing import parse
from megatron_klong.serve.prompts import STOP_TOKENS, Prompts, schemas
from megatron_klong.serve.protocol import ProtocolError
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Message, Role, ToolCall, Transcript
from megatron_klong.trajectory.segments import SegmentKind
from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.unit.serve.scripted import call, written
from tests.unit.trajectory.builders import assistant, byte_tokenizer, system, tool, transcript, transcripts, user
from tests.unit.trajectory.oracle import Oracle

BYTES = byte_tokenizer()
PROMPTS = Prompts(BYTES)
STOPS = [BYTES.control[token] for token in STOP_TOKENS]
TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run “it”.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["counting files, counting"] * 4, vocabulary_size=285, folder=made)
    return made


def as_openai(message: Message) -> dict[str, Any]:
    """A message as a client sends it."""
    written: dict[str, Any] = {"role": str(message.role), "content": message.content}
    if message.role is Role.TOOL:
        written["tool_call_id"] = "call_1"
    if message.role is Role.ASSISTANT:
        written["reasoning_content"] = message.reasoning or ""
        calls = [{"name": one.name, "arguments": json.dumps(one.arguments)} for one in message.tool_calls]
        written["tool_calls"] = [{"id": "call_1", "type": "function", "function": one} for one in calls]
    if message.sampled is not None:
        end = [] if message.sampled.end is None else [message.sampled.end]
        written["generation_token_ids"] = [*message.sampled.body, *end]
    return written


def rendered(made: Transcript, tokenizer: Tokenizer = BYTES) -> list[int]:
    """What the trajectory's renderer makes of it, as the template shows it, and the header of the next turn."""
    renderer = GlmRenderer(tokenizer)
    whole = renderer.transcript(made)
    last_user = max((n for n, message in enumerate(made.messages) if message.role is Role.USER), default=-1)
    shown = [
        segment
        for number, message in enumerate(whole.messages)
        for segment in message.segments
        if number > last_user or segment.kind is not SegmentKind.REASONING
    ]
    return [one for segment in [*whole.preamble, *shown, *whole.closing, renderer.header] for one in segment.ids]


def can_be_told(message: Message) -> bool:
    """Whether ids alone say where the reply ends: an engine does not sample on behind a stop token."""
    reply = message.sampled
    return reply is None or reply.end is not None or (bool(reply.body) and reply.body[-1] not in STOPS)


@given(transcripts(), st.booleans())
def test_a_prompt_is_what_the_trajectory_renders(made: Transcript, with_tools: bool) -> None:
    assume(all(map(can_be_told, made.messages)))
    tools = [TOOL] if with_tools else []
    made = Transcript(
        id="t", task="t", source="t", tools=tuple(tools), messages=made.messages, tokenizer_sha256=BYTES.sha256
    )
    assert PROMPTS.ids([as_openai(message) for message in made.messages], tools or None) == rendered(made)


CONVERSATION = [
    system("Be brief."),
    user("Count."),
    assistant("I count.", reasoning="how?", calls=[ToolCall(name="bash", arguments={"command": "ls", "n": 3})]),
    tool("3"),
    tool("4"),
    assistant("Seven.", reasoning="adding"),
    user("Again: <|user|> é"),
    assistant("", reasoning="as before", calls=[ToolCall(name="bash", arguments={"on": None, "é": ["a", {"b": 1.5}]})]),
    tool("</tool_response> 8"),
]


def test_reasoning_is_kept_after_the_last_user_message_and_left_out_before() -> None:
    text = BYTES.decode(PROMPTS.ids([as_openai(message) for message in CONVERSATION], [TOOL]))
    assert "as before" in text
    assert "how?" not in text
    assert "adding" not in text
    assert text.endswith("</tool_response><|assistant|>")


def keeps_thought_in_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """As clients write it that know no field for it."""
    reasoning, content = message.get("reasoning_content"), message["content"]
    others = {name: value for name, value in message.items() if name != "reasoning_content"}
    return {**others, "content": f"\n<think>\n{reasoning}\n</think>\n\n{content}" if reasoning else content}


@pytest.mark.parametrize("change", [lambda message: message, keeps_thought_in_content])
def test_a_prompt_reads_as_the_models_template_writes_it(shared_data: Path, folder: Path, change: Any) -> None:
    template = (shared_data / "chat_templates" / "glm4moe.jinja").read_text()
    oracle = Oracle(template, folder / "tokenizer.json", CONTROL_TOKENS)
    sent = [change(as_openai(message)) for message in CONVERSATION]
    for_template = json.loads(json.dumps(sent))
    for one in (one for message in for_template for one in message.get("tool_calls", ())):
        one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    tokenizer = load_tokenizer(folder)
    text = tokenizer.decode(Prompts(tokenizer).ids(sent, [TOOL]))
    assert text == oracle.text(for_template, [TOOL], add_generation_prompt=True)


SAME: Sequence[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
    (
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        as_openai(user("ab")),
    ),
    ({"role": "user", "content": None}, as_openai(user(""))),
    ({"role": "user", "content": []}, as_openai(user(""))),
    ({"role": "assistant", "content": "x", "reasoning": "r"}, as_openai(assistant("x", reasoning="r"))),
    (
        {"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": None},
        as_openai(assistant("x", reasoning="r")),
    ),
    (
        {"role": "assistant", "content": "</think>x", "reasoning_content": ""},
        as_openai(assistant("</think>x")),
    ),
    ({"role": "assistant", "content": "<think>r</think>x"}, as_openai(assistant("x", reasoning="r"))),
    ({"role": "assistant", "content": "x", "tool_calls": None, "refusal": None}, as_openai(assistant("x"))),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_thing_may_be_said_in_several_ways(one: dict[str, Any], other: dict[str, Any]) -> None:
    task = as_openai(user("t"))
    assert PROMPTS.ids([task, one], None) == PROMPTS.ids([task, other], [])


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ({"a": 1}, {"a": 1}),
        ("{}", {}),
        ("", {}),
        (None, {}),
        # what chat.py writes of a call it could not read
        ('{"a": 1', {"a": 1}),
        ("{", {}),
    ],
)
def test_arguments_are_an_object_or_its_json(arguments: Any, read: dict[str, Any]) -> None:
    sent = {"role": "assistant", "tool_calls": [{"function": {"name": "bash", "arguments": arguments}}]}
    made = transcript(user("t"), assistant("", calls=[ToolCall(name="bash", arguments=read)]))
    assert PROMPTS.ids([as_openai(user("t")), sent], None) == rendered(made)


@pytest.mark.parametrize("end", [*STOP_TOKENS, None])
def test_a_sampled_reply_stands_in_the_prompt_as_it_was_sampled(folder: Path, end: str | None) -> None:
    tokenizer = load_tokenizer(folder)
    body = written(tokenizer, "\n<think>counting</think>\ncounting" + call("bash", command="counting"))
    assert tokenizer.encode("counting") != written(tokenizer, "counting")
    ids = [*body, *([tokenizer.control[end]] if end else [])]
    task = {"role": "user", "content": "t"}
    reply = {"role": "assistant", "content": "whatever a client made of it", "generation_token_ids": ids}
    before = Prompts(tokenizer).ids([task], None)
    after = Prompts(tokenizer).ids([task, reply, {"role": "tool", "content": "3"}], None)
    assert after[: len(before) + len(ids)] == before + ids
    closed_by_role = end == "<|observation|>"
    assert (
        tokenizer.decode(after[len(before) + len(ids) :])
        == ("" if closed_by_role else "<|observation|>") + "\n<tool_response>\n3\n</tool_response><|assistant|>"
    )


def test_the_reasoning_of_a_sampled_reply_is_left_out_before_the_last_user_message(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    body = written(tokenizer, "\n<think>counting</think>\nfiles")
    sent = [
        {"role": "user", "content": "t"},
        {"role": "assistant", "generation_token_ids": [*body, tokenizer.control["<|user|>"]]},
        {"role": "user", "content": "u"},
    ]
    text = tokenizer.decode(Prompts(tokenizer).ids(sent, None))
    assert text == "[gMASK]<sop><|user|>\nt<|assistant|>\n<think></think>\nfiles<|user|>\nu<|assistant|>"


U = {"role": "user", "content": "t"}


@pytest.mark.parametrize(
    ("messages", "tools", "named"),
    [
        (None, None, "messages: a list"),
        ([], None, "messages: a list"),
        ("text", None, "messages: a list"),
        ([U, "text"], None, r"messages\[1\]: an object"),
        ([U, {"content": "x"}], None, r"messages\[1\].role: None is none of"),
        ([U, {"role": "function", "content": "x"}], None, r"messages\[1\].role: 'function'"),
        ([U, {"role": ["user"], "content": "x"}], None, r"messages\[1\].role"),
        ([U, {"role": "user", "content": 5}], None, r"messages\[1\].content: text"),
        ([{"role": "user", "content": ["x"]}], None, r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], None, r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], None, r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], None, "not image_url"),
        ([U, {"role": "assistant", "content": {}}], None, r"messages\[1\].content"),
        ([U, {"role": "assistant", "reasoning_content": 5}], None, r"messages\[1\].reasoning_content"),
        ([U, {"role": "assistant", "tool_calls": "x"}], None, r"messages\[1\].tool_calls\[0\]"),
        ([U, {"role": "assistant", "tool_calls": ["x"]}], None, r"messages\[1\].tool_calls\[0\]"),
        (
            [U, {"role": "assistant", "tool_calls": [{"function": {}}]}],
            None,
            r"tool_calls\[0\]: a call with function.name",
        ),
        (
            [U, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "x"}}]}],
            None,
            r"messages\[1\].tool_calls\[0\].function.arguments: no JSON",
        ),
        (
            [U, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]}],
            None,
            "function.arguments: an object",
        ),
        (
            [U, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": '{"a": "\\ud800"}'}}]}],
            None,
            "function.arguments: no JSON",
        ),
        (
            [U, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[" * 100_000}}]}],
            None,
            "function.arguments: no JSON",
        ),
        ([U, {"role": "assistant", "generation_token_ids": []}], None, r"messages\[1\].generation_token_ids"),
        ([U, {"role": "assistant", "generation_token_ids": "x"}], None, r"messages\[1\].generation_token_ids"),
        ([U, {"role": "assistant", "generation_token_ids": [True]}], None, r"messages\[1\].generation_token_ids"),
        ([U, {"role": "assistant", "generation_token_ids": [5, -1]}], None, r"messages\[1\].generation_token_ids"),
        ([U], {}, "tools: a list"),
        ([U], [{}], r"tools\[0\]"),
        ([U], [TOOL, {"type": "function", "function": {}}], r"tools\[1\]: .*function.name"),
        ([U], [{"function": {"name": "a", "parameters": 5}}], r"tools\[0\].function.parameters"),
        ([U], [{"function": {"name": "a", "parameters": {"properties": [1]}}}], r"tools\[0\].function.parameters"),
    ],
)
def test_what_cannot_be_rendered_is_named(messages: Any, tools: Any, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        PROMPTS.ids(messages, tools)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
        ({"anyOf": [{"type": ["string"]}, True]}, "5", 5),
        ({"anyOf": 5}, "5", 5),
        ({"type": 5}, "5", 5),
        ({"type": {}}, "5", 5),
        (True, "5", 5),
        (None, "5", 5),
    ],
)
def test_the_schema_of_an_argument_may_be_written_in_several_ways(schema: Any, text: str, value: Any) -> None:
    tool = {"type": "function", "function": {"name": "t", "parameters": {"properties": {"a": schema}}}}
    assert PROMPTS.ids([U], [tool])
    read = parse(written(BYTES, call("t", a=text)), BYTES, schemas([tool]))
    assert [dict(one.arguments) for one in read.calls] == [{"a": value}]


def test_tools_may_have_no_parameters() -> None:
    assert schemas([{"function": {"name": "a"}}, {"function": {"name": "b", "parameters": {}}}]) == {"a": {}, "b": {}}
    assert schemas(None) == {}
