"""Stop strings: found by the token that completes one, whatever the tokens are, and cut off where the first begins."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.serve.stop_strings import StopStrings, certain, cut
from megatron_klong.trajectory.sampled import decode
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.unit.serve.scripted import letters, written

ALPHABET = "ab€\n"
TEXT = st.text(ALPHABET, max_size=12)
STRINGS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["abab abab €a €a", "ba\nab ba\nab"], vocabulary_size=290, folder=folder)
    return load_tokenizer(folder)


def replies(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Text of large and small tokens, ids that pad the vocabulary, any others."""
    pieces = st.one_of(
        TEXT.map(tokenizer.encode),
        TEXT.map(lambda text: letters(tokenizer, text)),
        st.integers(0, tokenizer.vocabulary_size + 9).map(lambda one: [one]),
    )
    return st.lists(pieces, max_size=6).map(lambda parts: [one for part in parts for one in part])


@given(st.data(), STRINGS)
def test_a_string_is_found_with_the_token_that_completes_it(
    tokenizer: Tokenizer, data: st.DataObject, strings: list[str]
) -> None:
    ids = data.draw(replies(tokenizer))
    stops = StopStrings(strings, tokenizer)
    for length, token in enumerate(ids, 1):
        whole = decode(tokenizer, ids[:length])
        assert stops.hit([token]) == any(string in whole for string in strings)
        if any(string in whole for string in strings):
            break


@given(st.data(), STRINGS, st.integers(1, 5))
def test_tokens_may_come_several_at_once(
    tokenizer: Tokenizer, data: st.DataObject, strings: list[str], at_once: int
) -> None:
    ids = data.draw(replies(tokenizer))
    stops = StopStrings(strings, tokenizer)
    hit = any(stops.hit(ids[place : place + at_once]) for place in range(0, len(ids), at_once))
    assert hit == any(string in decode(tokenizer, ids) for string in strings)


def test_a_string_may_reach_over_characters_and_control_tokens(tokenizer: Tokenizer) -> None:
    stops = StopStrings(["€a</think>b"], tokenizer)
    hits = [stops.hit([token]) for token in written(tokenizer, "ab€a</think>b")]
    assert hits == [False] * (len(hits) - 1) + [True]


@given(TEXT, STRINGS)
def test_a_text_ends_where_the_first_string_begins(text: str, strings: list[str]) -> None:
    left = cut(text, strings)
    assert text.startswith(left)
    assert not any(string in left for string in strings)
    assert left == text or any(text.startswith(string, len(left)) for string in strings)


@given(TEXT, TEXT, STRINGS)
def test_what_is_certain_stays_whatever_comes(text: str, more: str, strings: list[str]) -> None:
    shown = text[: certain(text, strings)]
    assert cut(text + more, strings).startswith(shown)


@given(TEXT, STRINGS)
def test_only_what_may_still_change_is_held_back(text: str, strings: list[str]) -> None:
    left = cut(text, strings)
    held = left[certain(text, strings) :]
    # some string begins with it, or with what follows it up to the end
    assert not held or any(string.startswith(text[certain(text, strings) :]) for string in strings)


@pytest.mark.parametrize(
    ("text", "strings", "shown"),
    [
        ("abc", [], "abc"),
        ("abc\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}", [], "abc"),
        ("abc", ["d"], "abc"),
        ("abc", ["cd"], "ab"),
        ("abc", ["bx", "cd"], "ab"),
        ("abab", ["abac"], "ab"),
        ("ab\N{REPLACEMENT CHARACTER}", ["b€"], "a"),
        ("abcd", ["cd", "abcde"], ""),
        ("abcd", ["cd"], "ab"),
        ("", ["a"], ""),
    ],
)
def test_examples_of_what_is_certain(text: str, strings: list[str], shown: str) -> None:
    assert text[: certain(text, strings)] == shown
