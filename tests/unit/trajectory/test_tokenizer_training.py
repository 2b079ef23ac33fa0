"""Small trained tokenizers: their size, what may merge, and the texts they are made of."""

from pathlib import Path

import pytest

from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS, TokenizerError, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import read_texts, train_tokenizer


def test_bytes_and_control_tokens_are_the_smallest_vocabulary(tmp_path: Path) -> None:
    smallest = 256 + len(CONTROL_TOKENS)
    with pytest.raises(TokenizerError, match=f"vocabulary size {smallest - 1} is below {smallest}, the bytes and"):
        train_tokenizer(["ab"], vocabulary_size=smallest - 1, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert train_tokenizer(["ab" * 9], vocabulary_size=smallest, folder=tmp_path) == smallest
    assert len(load_tokenizer(tmp_path).encode("abab")) == 4


def test_training_stops_when_nothing_is_left_to_merge(tmp_path: Path) -> None:
    made = train_tokenizer(["ab ab"], vocabulary_size=1000, folder=tmp_path)  # "ab", and "Ġab" of the second word
    assert made == 256 + len(CONTROL_TOKENS) + 2


def test_a_set_phrase_becomes_one_token_where_only_what_is_isolated_is_cut(tmp_path: Path) -> None:
    texts = ["run the tests now7run the tests now7"] * 4
    train_tokenizer(texts, vocabulary_size=400, folder=tmp_path / "phrases", isolated=r"\d")
    train_tokenizer(texts, vocabulary_size=400, folder=tmp_path / "words")
    phrases, words = load_tokenizer(tmp_path / "phrases"), load_tokenizer(tmp_path / "words")
    assert len(phrases.encode("run the tests now")) == 1
    assert len(words.encode("run the tests now")) == 4
    assert len(phrases.encode("run the tests now7run the tests now")) == 3  # the digit is kept apart
    assert phrases.decode(phrases.encode("now7 é")) == "now7 é"


def test_texts_are_read_folder_by_folder_in_a_stable_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "b/deep/3.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(read_texts([tmp_path / "b", tmp_path / "a.txt"])) == ["b/1.txt", "b/2.txt", "b/deep/3.txt", "a.txt"]


def test_texts_that_are_not_there_or_not_utf8_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder of texts"):
        list(read_texts([tmp_path / "absent"]))
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(UnicodeDecodeError):
        list(read_texts([tmp_path]))
