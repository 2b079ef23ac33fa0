"""Streams of a reply: however its ids come in, what is shown put together is the whole, and nothing is taken back."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.serve.parsing import ParsedTurn, parse
from megatron_klong.serve.stop_strings import cut
from megatron_klong.serve.turn_stream import Part, TextStream, TurnStream
from megatron_klong.trajectory.sampled import decode
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.unit.serve.scripted import call, letters, written

SCHEMAS = {"bash": {"command": {"type": "string"}}}
PIECES = (
    *("<think>", "\n<think>", "</think>", "</think>\n", "so be it", " ", "\n", " \n\t", "é€🙂", "a\ufffdb"),
    *(call("bash", command="ls €"), call("none"), "<tool_call>", "</tool_call>", "<arg_key>", "<|user|>"),
    *("<tool_call>bash\n<arg_key>command</arg_key>\n<arg_value>ls", "</arg_value>\n", "think>", "<"),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["so be it, so be it bash command"] * 2, vocabulary_size=290, folder=folder)
    return load_tokenizer(folder)


@st.composite
def replies(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Turns well-formed and not, in large tokens and in small ones; single bytes and ids of no text among them."""
    ids: list[int] = []
    for _ in range(draw(st.integers(0, 8))):
        piece = draw(st.sampled_from(PIECES) | st.integers(0, tokenizer.vocabulary_size + 5))
        if isinstance(piece, int):
            ids.append(piece)
        elif piece in tokenizer.control or draw(st.booleans()):
            ids += written(tokenizer, piece)
        else:
            ids += tokenizer.encode(piece)
    return ids


@st.composite
def stops(draw: st.DrawFn, tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """Strings that the reply holds, and others that begin or end as if it did."""
    text = decode(tokenizer, ids)
    found = []
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        found.append(text[start : start + draw(st.integers(1, 12))] + draw(st.sampled_from(["", "", "x", " "])))
    return tuple(string for string in found if string)


def in_chunks(draw: st.DrawFn, ids: Sequence[int]) -> list[Sequence[int]]:
    borders = sorted({0, len(ids), *draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)))})
    return [ids[start:end] for start, end in pairwise(borders)] or [ids]


def expected(ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str]) -> ParsedTurn:
    """What `parse` makes of the tokens before the first stop string and of what it leaves of the token it begins in."""
    left = cut(decode(tokenizer, ids), stop)
    whole = max(n for n in range(len(ids) + 1) if left.startswith(decode(tokenizer, ids[:n])))
    rest = left[len(decode(tokenizer, ids[:whole])) :]
    # of a control token there are no parts
    kept = [] if rest and ids[whole] in tokenizer.control.values() else letters(tokenizer, rest)
    return parse([*ids[:whole], *kept], tokenizer, SCHEMAS)


def put_together(parts: Sequence[Part], name: str) -> str:
    return "".join(text for part, text in parts if part == name)


@given(st.data())
def test_a_turn_in_parts_is_the_turn_up_to_its_first_stop_string(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(replies(tokenizer))
    stop = data.draw(stops(tokenizer, ids))
    stream = TurnStream(tokenizer, schemas=SCHEMAS, stop=stop)
    parts = [part for chunk in in_chunks(data.draw, ids) for part in stream.feed(chunk)]
    rest, turn = stream.finish(ids)
    whole = expected(ids, tokenizer, stop)
    assert put_together([*parts, *rest], "reasoning") == turn.reasoning == whole.reasoning
    assert put_together([*parts, *rest], "content") == turn.content == whole.content
    assert all(text for _, text in parts)
    assert len(turn.calls) == len(whole.calls)
    for one, other in zip(turn.calls, whole.calls, strict=True):
        # one that was cut cannot be read, and what stands after the cut is no matter
        assert one == other or (one.error and other.error and one is turn.calls[-1])


@given(st.data())
def test_a_text_in_parts_is_the_text_up_to_its_first_stop_string(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(replies(tokenizer))
    stop = data.draw(stops(tokenizer, ids))
    stream = TextStream(tokenizer, stop=stop)
    parts = [stream.feed(chunk) for chunk in in_chunks(data.draw, ids)]
    assert "".join([*parts, stream.finish(ids)]) == cut(decode(tokenizer, ids), stop)


def test_long_replies_are_whole_although_they_are_not_read_at_every_token(tokenizer: Tokenizer) -> None:
    ids = written(tokenizer, "<think>" + "€ so" * 5 + "</think>" + (content := "be it " * 300))
    turns, texts = TurnStream(tokenizer), TextStream(tokenizer)
    shown = [part for token in ids for part in turns.feed([token])]
    text = "".join(texts.feed([token]) for token in ids)
    assert len(text) > 0.95 * len(decode(tokenizer, ids))
    assert text + texts.finish(ids) == decode(tokenizer, ids)
    rest, turn = turns.finish(ids)
    assert put_together([*shown, *rest], "content") == turn.content == content.strip()


def shown_after_each(tokenizer: Tokenizer, pieces: Sequence[str], stop: Sequence[str] = ()) -> list[list[Part]]:
    """What each piece of a reply adds, and what its end does."""
    stream = TurnStream(tokenizer, schemas=SCHEMAS, stop=stop)
    ids = [written(tokenizer, piece) for piece in pieces]
    return [*(list(stream.feed(part)) for part in ids), stream.finish([one for part in ids for one in part])[0]]


def test_reasoning_and_content_are_shown_as_they_come(tokenizer: Tokenizer) -> None:
    pieces = ["\n<think>", "so ", "be it", "</think>\n", "done", ".\n", "Yes"]
    assert shown_after_each(tokenizer, pieces) == [
        [],
        [("reasoning", "so")],
        [("reasoning", " be it")],
        [],
        [("content", "done")],
        [("content", ".")],
        [("content", "\nYes")],
        [],
    ]


def test_content_waits_where_it_may_still_turn_out_to_be_reasoning(tokenizer: Tokenizer) -> None:
    assert shown_after_each(tokenizer, ["hm", "</think>", "so"]) == [[], [("reasoning", "hm")], [("content", "so")], []]
    assert shown_after_each(tokenizer, ["so", " be it"]) == [[], [], [("content", "so be it")]]


def test_what_stands_before_the_reasoning_is_never_shown(tokenizer: Tokenizer) -> None:
    assert shown_after_each(tokenizer, ["x", "<think>y", "</think>", "z"])[1:] == [
        [("reasoning", "y")],
        [],
        [("content", "z")],
        [],
    ]


def test_the_beginning_of_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    pieces = ["<think></think>", "ab", "c", "x"]
    assert shown_after_each(tokenizer, pieces, ["bcd"])[1:] == [[("content", "a")], [], [("content", "bcx")], []]
    assert shown_after_each(tokenizer, [*pieces[:3], "de"], ["bcd"])[1:] == [[("content", "a")], [], [], []]


def test_a_stop_string_may_reach_into_a_call(tokenizer: Tokenizer) -> None:
    pieces = ["<think></think>", "ab", "\n<tool_call>", "bash"]
    assert shown_after_each(tokenizer, pieces, ["b\n<tool_call>bash"])[1:] == [[("content", "a")], [], [], []]


def test_calls_that_were_whole_before_the_stop_string_are_kept(tokenizer: Tokenizer) -> None:
    stream = TurnStream(tokenizer, schemas=SCHEMAS, stop=["rm"])
    ids = written(tokenizer, "<think></think>" + call("bash", command="ls") + call("bash", command="rm"))
    _, turn = stream.finish(ids)
    assert [(call.name, dict(call.arguments), call.error is None) for call in turn.calls] == [
        ("bash", {"command": "ls"}, True),
        ("bash", {}, False),
    ]
