"""Reading replies: what was rendered is read back, and nothing a model may sample raises."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.serve.parsing import UNNAMED, parse
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.sampled import sampled_segments
from megatron_klong.trajectory.schema import Message, Role, ToolCall
from megatron_klong.trajectory.segments import SegmentKind
from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer

# no lone surrogates: they are no text; control tokens spelled out are
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["<think>", "</tool_call>", "a\nb", "<|user|>"]
)
NAMES = st.from_regex(r"[a-z_]{1,9}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | TEXT, max_size=3) | st.dictionaries(NAMES, inner | TEXT, max_size=3),
    max_leaves=5,
)
CALLS = st.lists(
    st.builds(
        lambda name, texts, others: ToolCall(name=name, arguments={**texts, **others}),
        NAMES,
        st.dictionaries(NAMES.map("text_{}".format), TEXT, max_size=2),
        st.dictionaries(NAMES.map("json_{}".format), JSON, max_size=2),
    ),
    max_size=3,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some text to merge, some text"], vocabulary_size=290, folder=folder)
    return load_tokenizer(folder)


def written(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` as ids, its control tokens in place."""
    ids: list[int] = []
    while text:
        found = next((token for token in CONTROL_TOKENS if text.startswith(token)), None)
        length = len(found) if found else min((i for t in CONTROL_TOKENS if (i := text.find(t)) > 0), default=len(text))
        ids += [tokenizer.control[found]] if found else tokenizer.encode(text[:length])
        text = text[length:]
    return ids


@given(reasoning=TEXT, content=TEXT, calls=CALLS)
def test_what_was_rendered_is_read_back(
    tokenizer: Tokenizer, reasoning: str, content: str, calls: list[ToolCall]
) -> None:
    message = Message(role=Role.ASSISTANT, reasoning=reasoning, content=content, tool_calls=tuple(calls))
    renderer = GlmRenderer(tokenizer)
    ids = [identifier for segment in renderer.message(message, None).segments for identifier in segment.ids][1:]
    schemas: dict[str, dict[str, Any]] = {call.name: {} for call in calls}
    for call in calls:
        schemas[call.name] |= {key: {"type": "string"} for key in call.arguments if key.startswith("text_")}
    read = parse(ids, tokenizer, schemas)
    assert (read.reasoning, read.content) == (reasoning.strip(), content.strip())
    assert [(call.name, dict(call.arguments), call.error) for call in read.calls] == [
        (call.name, call.arguments, None) for call in calls
    ]
    thought = [segment.ids for segment in sampled_segments(ids, tokenizer) if segment.kind is SegmentKind.REASONING]
    assert "".join(map(tokenizer.decode, thought)) == reasoning.strip()


@given(st.data())
def test_nothing_that_can_be_sampled_raises(tokenizer: Tokenizer, data: st.DataObject) -> None:
    control = st.sampled_from(sorted(tokenizer.control.values()))
    ids = data.draw(st.lists(control | st.integers(0, tokenizer.vocabulary_size + 9), max_size=30))
    read = parse(ids, tokenizer)
    assert [identifier for segment in sampled_segments(ids, tokenizer) for identifier in segment.ids] == ids
    assert all(call.name for call in read.calls)


@pytest.mark.parametrize(
    ("text", "name", "fault"),
    [
        ("<tool_call>bash\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n", "bash", "not closed"),
        ("<tool_call>bash\n<arg_key>a</arg_key>\n<arg_value>1\n</tool_call>", "bash", "not followed"),
        ("<tool_call>bash\n<arg_key>a</arg_key>\n</tool_call>", "bash", "not followed"),
        ("<tool_call>\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", UNNAMED, "name"),
        ('<tool_call>{"name":\n"bash"}</tool_call>', UNNAMED, "name"),
        ("<tool_call>bash\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\nx\n</tool_call>", "bash", "between"),
        (
            "<tool_call>bash\n" + "<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n" * 2 + "</tool_call>",
            "bash",
            "twice",
        ),
        ("<tool_call>bash\n<tool_call>bash\n</tool_call>", "bash", "not closed"),
    ],
)
def test_a_malformed_call_is_a_call_with_an_error(tokenizer: Tokenizer, text: str, name: str, fault: str) -> None:
    call = parse(written(tokenizer, "\n<think>hm</think>\n" + text), tokenizer).calls[0]
    assert call.name == name
    assert fault in (call.error or "")


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({}, "5", 5),
        ({}, "five", "five"),
        ({}, '"five"', '"five"'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({}, "NaN", "NaN"),
        ({}, "[" * 100_000, "[" * 100_000),
    ],
)
def test_the_schema_says_what_is_text(tokenizer: Tokenizer, schema: dict[str, Any], text: str, value: object) -> None:
    ids = written(tokenizer, "<tool_call>t\n<arg_key>a</arg_key>\n<arg_value>" + text + "</arg_value>\n</tool_call>")
    assert parse(ids, tokenizer, {"t": {"a": schema}}).calls[0].arguments == {"a": value}


def test_reasoning_that_was_cut_is_all_reasoning(tokenizer: Tokenizer) -> None:
    read = parse(written(tokenizer, "\n<think>so far"), tokenizer)
    assert (read.reasoning, read.content, read.calls) == ("so far", "", ())


def test_without_think_tags_all_is_content(tokenizer: Tokenizer) -> None:
    read = parse(written(tokenizer, "\nhello"), tokenizer)
    assert (read.reasoning, read.content) == ("", "hello")
