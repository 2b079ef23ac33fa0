"""The exported folder can be used alone: its tokenizer gives the ids that the shards were made of."""

import json
from pathlib import Path

import pytest

from megatron_klong.model.hugging_face import save_tokenizer
from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.integration.train.launcher import finish, start_alone
from tests.unit.train.builders import small_shard

TEXT = 'count to 7\n\n  {"cmd": "count 3"} counted to 3 é 漢'


def test_a_run_exports_the_tokenizer_of_its_shards_while_it_can_be_found(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    train_tokenizer([TEXT * 9], vocabulary_size=300, folder=tmp_path / "tokenizer")
    source = tmp_path / "tokenizer" / "tokenizer.json"
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 4096}')
    tokenizer = load_tokenizer(source)
    shard = small_shard(tmp_path / "shards" / "sft", tokenizer)
    folder = tmp_path / "run"
    exported = folder / "hugging_face"
    output = finish(start_alone(shard, folder, "--steps", "1", "--row_tokens", "512", environment={}))
    assert "has no tokenizer" not in output
    assert (exported / "tokenizer.json").read_bytes() == source.read_bytes()

    there = AutoTokenizer.from_pretrained(exported)
    assert there.model_max_length == 4096
    assert there.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    assert there.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(tokenizer.control.values())
    assert AutoConfig.from_pretrained(exported).vocab_size >= tokenizer.vocabulary_size
    assert load_tokenizer(exported).sha256 == tokenizer.sha256

    source.write_text(source.read_text() + "\n")  # no longer the one the shard was made with
    output = finish(start_alone(shard, folder, "--steps", "1", "--row_tokens", "512", environment={}))
    assert f"{exported} has no tokenizer: the file the shards were made with was not found" in output
    assert (exported / "model.safetensors").exists()
    assert not (exported / "tokenizer.json").exists()


def without_control_tokens(folder: Path) -> Path:
    train_tokenizer([TEXT * 9], vocabulary_size=300, folder=folder)
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] == "[gMASK]"]
    file.write_text(json.dumps(definition))
    return file


def test_control_tokens_that_were_appended_are_exported_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    appended = load_tokenizer(without_control_tokens(tmp_path / "bare"), add_special_tokens=True)
    save_tokenizer(appended, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.control == appended.control
    assert loaded.vocabulary_size == appended.vocabulary_size
    assert loaded.encode(TEXT + "<|user|>") == appended.encode(TEXT + "<|user|>")
    there = AutoTokenizer.from_pretrained(tmp_path)
    assert there.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(appended.control.values())
    assert there.encode(TEXT, add_special_tokens=False) == appended.encode(TEXT)


@pytest.mark.parametrize("name", ["gpt-neox-olmo-dolma-v1_5", "torchtitan_test", "mistral-v3/tokenizer.model.v3"])
def test_real_tokenizers_keep_their_ids(name: str, shared_data: Path, tmp_path: Path) -> None:
    source = load_tokenizer(shared_data / "tokenizers" / name, add_special_tokens=True)
    save_tokenizer(source, tmp_path)
    # a SentencePiece model is copied, so its control tokens are appended at every loading
    loaded = load_tokenizer(tmp_path, add_special_tokens=".model" in name)
    assert loaded.control == source.control
    assert loaded.encode(TEXT) == source.encode(TEXT)
