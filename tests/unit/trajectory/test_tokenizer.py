"""Tokenizer files: control tokens apart from text, whatever the file's kind."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS, TokenizerError, load_template_tokenizer, load_tokenizer


def write_tokenizer(folder: Path, *, control: bool, merges: tuple[tuple[str, str], ...] = ()) -> Path:
    """A byte-level tokenizer.json, with or without GLM's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    made.decoder = decoders.ByteLevel()
    if control:
        # GLM-4.5 marks some of them special and some not.
        made.add_special_tokens([AddedToken(token) for token in CONTROL_TOKENS[:7]])
        made.add_tokens([AddedToken(token) for token in CONTROL_TOKENS[7:]])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_text_never_becomes_a_control_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, control=True))
    spelled = "a<|user|>b</think>c[gMASK]"
    ids = tokenizer.encode(spelled)
    assert not set(ids) & set(tokenizer.control.values())
    assert tokenizer.decode(ids) == spelled
    assert tokenizer.decode([tokenizer.control["<|user|>"], *tokenizer.encode("x")]) == "<|user|>x"


def test_missing_control_tokens_are_an_error_or_are_added_behind_the_vocabulary(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, control=False)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: the vocabulary lacks 17 .* pass --add-special-tokens"):
        load_tokenizer(folder)
    tokenizer = load_tokenizer(folder, add_special_tokens=True)
    assert sorted(tokenizer.control.values()) == list(range(256, 256 + 17))
    assert tokenizer.vocabulary_size == 256 + 17
    assert tokenizer.sha256 != load_tokenizer(write_tokenizer(tmp_path / "b", control=True)).sha256


def test_a_control_token_that_text_can_forge_is_refused(tmp_path: Path) -> None:
    pairs = [("<", "s"), ("<s", "o"), ("<so", "p"), ("<sop", ">")]
    folder = write_tokenizer(tmp_path, control=False, merges=tuple(pairs))
    with pytest.raises(TokenizerError, match="text that spells <sop> is encoded as that control token"):
        load_tokenizer(folder, add_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", b"\x00", "not a Hugging Face tokenizer.json"),
        ("spm.model", b"nothing", "not a SentencePiece model"),
        ("words.txt", b"a", "neither a tokenizer.json nor a SentencePiece"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="in this folder"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no such file"):
        load_tokenizer(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["gpt-neox-olmo-dolma-v1_5", "torchtitan_test", "mistral-v3/tokenizer.model.v3"])
def test_real_tokenizers_load_and_keep_text(shared_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name, add_special_tokens=True)
    spelled = "def f(x):\n    return x  # <|user|> </think>"
    ids = tokenizer.encode(spelled)
    assert not set(ids) & set(tokenizer.control.values())
    # torchtitan's test tokenizer names no decoder, and without one spaces do not come back.
    assert "".join(tokenizer.decode(ids).split()) == "".join(spelled.split())
    assert len(set(tokenizer.control.values())) == len(CONTROL_TOKENS)
    assert max(tokenizer.control.values()) < tokenizer.vocabulary_size


def test_a_vocabulary_keeps_added_tokens_that_are_ordinary(shared_data: Path) -> None:
    # This one keeps runs of spaces among its added tokens.
    file = shared_data / "tokenizers" / "gpt-neox-olmo-dolma-v1_5" / "tokenizer.json"
    runs = [token["content"] for token in json.loads(file.read_text())["added_tokens"] if token["content"].isspace()]
    assert runs
    assert len(load_tokenizer(file, add_special_tokens=True).encode("x" + runs[0])) == 2


# -- tokenizers of other chat templates


def test_a_template_s_control_tokens_are_looked_up_in_the_file(tmp_path: Path) -> None:
    # "<|user|>" is declared special; "<think>" is only added, so it counts if the template writes it.
    folder = write_tokenizer(tmp_path, control=True)
    tokenizer = load_template_tokenizer(folder, "<|user|>\n\0<think>")
    assert set(tokenizer.control) == {*CONTROL_TOKENS[:7], "<think>"}
    assert tokenizer.control == {token: 256 + CONTROL_TOKENS.index(token) for token in tokenizer.control}
    spelled = "a<|user|>b<think>c"
    assert len(tokenizer.encode(spelled)) == len(spelled)
    assert tokenizer.decode([tokenizer.control["<think>"], *tokenizer.encode("x")]) == "<think>x"
    assert len(tokenizer.encode("</think>")) == 1  # ordinary here, as for the tokenizer itself
    assert tokenizer.sha256 != load_template_tokenizer(folder, "").sha256


def test_offsets_say_which_characters_a_token_stands_for(tmp_path: Path) -> None:
    tokenizer = load_template_tokenizer(write_tokenizer(tmp_path, control=True), "")
    assert tokenizer.encode_with_offsets is not None
    ids, offsets = tokenizer.encode_with_offsets("a é")
    assert ids == tokenizer.encode("a é")
    assert offsets == [(0, 1), (1, 2), (2, 3), (2, 3)]  # two bytes, one character


def test_a_tokenizer_that_is_not_the_template_s_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, control=True)
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json: the chat template writes <\|im_end\|>, <\|im_start\|>, "
    ):
        load_template_tokenizer(folder, "<|im_start|>system\0<|im_end|>")
    file = tmp_path / "spm.model"
    file.write_bytes(b"nothing")
    with pytest.raises(TokenizerError, match=r"spm\.model: .* pass the tokenizer\.json of the same model"):
        load_template_tokenizer(file, "")


def test_a_tokenizer_whose_tokens_swallow_their_neighbours_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, control=False)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"text beside <\|end\|> is encoded otherwise than alone"):
        load_template_tokenizer(folder, "")


def test_a_template_s_control_token_that_text_can_forge_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, control=False, merges=(("<", "e"), ("<e", ">")))
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([AddedToken("<e>")])
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="text that spells <e> is encoded as that control token"):
        load_template_tokenizer(folder, "")


def test_a_sentencepiece_model_brings_its_own_control_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the loss of a model is lower when data are clean\n" * 20)
    SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=list(CONTROL_TOKENS),
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "spm.model")
    assert len(tokenizer.control) == len(CONTROL_TOKENS)
    assert max(tokenizer.control.values()) < tokenizer.vocabulary_size
    spelled = "the loss<|user|>"
    assert not set(tokenizer.encode(spelled)) & set(tokenizer.control.values())
    assert tokenizer.decode([tokenizer.control["<|user|>"], *tokenizer.encode("data")]) == "<|user|>data"
