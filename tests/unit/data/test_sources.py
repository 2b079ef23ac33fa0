"""Sources: several shards as one, plain documents in pieces, and what neither can be."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_klong.data.indexed import IndexedError, IndexedWriter
from megatron_klong.data.materialize import materialize
from megatron_klong.data.shard import Shard, ShardError
from megatron_klong.data.sources import DocumentSource, ShardSource, find_tokenizer
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.unit.train.builders import small_shard


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


def documents(prefix: Path, lengths: list[int]) -> Path:
    """A stock dataset: document n holds n * 1000, n * 1000 + 1, ... in sequences of at most 7 tokens."""
    with prefix.with_name(prefix.name + ".bin").open("wb") as file:
        writer = IndexedWriter(file, vocabulary_size=100_000, with_modes=False)
        for number, length in enumerate(lengths):
            parts = [7] * (length // 7) + [length % 7] * (length % 7 > 0)
            writer.add_sequences(np.arange(length) + 1000 * number, parts, ())
    with prefix.with_name(prefix.name + ".idx").open("wb") as file:
        writer.write_index(file)
    return prefix


def test_several_shards_are_numbered_through(shard: Path) -> None:
    single, double = ShardSource([shard]), ShardSource([shard, shard])
    count = len(single)
    assert len(double) == 2 * count
    for name in ("lengths_tokens", "trained_tokens", "prefix_tokens"):
        column = getattr(single, name).tolist()
        assert getattr(double, name).tolist() == column * 2
    assert double.document[count:].tolist() == (single.document + len(single.keys)).tolist()
    assert double.keys == [*single.keys, *single.keys]
    assert double.window(count).ids.tolist() == single.window(0).ids.tolist()
    assert double.window(count - 1).ids.tolist() == single.window(count - 1).ids.tolist()


def test_columns_say_what_the_windows_are(shard: Path) -> None:
    source = ShardSource([shard])
    for number in range(len(source)):
        window = source.window(number)
        assert len(window.ids) == source.lengths_tokens[number]
        assert window.loss_mask.sum() == source.trained_tokens[number]
        first = number == 0 or source.document[number] != source.document[number - 1]
        assert source.continuation[number] != first
    assert source.continuation.any()
    assert set(source.keys) == {"task:t"}


def test_shards_of_different_tokenizers_do_not_mix(shard: Path, tmp_path: Path) -> None:
    other = small_shard(tmp_path / "other")
    manifest = other.with_name("other.manifest.json")
    manifest.write_text(manifest.read_text().replace('"sha256": "bytes"', '"sha256": "others"'))
    with pytest.raises(ShardError, match="another tokenizer than"):
        ShardSource([shard, other])


def test_documents_come_in_pieces_that_teach_each_token_but_the_first_once(tmp_path: Path) -> None:
    lengths = [1, 2, 10, 11, 12, 35]
    prefix = documents(tmp_path / "plain", lengths)
    source = DocumentSource([prefix, prefix], piece_tokens=11)
    taught: dict[int, list[int]] = {}
    for number in range(len(source)):
        window = source.window(number)
        assert (len(window.ids), window.loss_mask.sum()) == (
            source.lengths_tokens[number],
            source.trained_tokens[number],
        )
        assert 2 <= len(window.ids) <= 11
        assert np.diff(window.ids).tolist() == [1] * (len(window.ids) - 1)
        assert not window.loss_mask[0]
        assert source.continuation[number] == (window.ids[0] % 1000 > 0)
        taught.setdefault(int(source.document[number]), []).extend(window.ids[window.loss_mask].tolist())
    expected = {n: list(range(1000 * n + 1, 1000 * n + length)) for n, length in enumerate(lengths) if length > 1}
    assert taught == expected | {n + len(lengths): tokens for n, tokens in expected.items()}
    assert len(source.keys) == 2 * len(lengths)


def test_megatron_itself_wrote_such_a_dataset(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=np.int32)
    for length in (5, 9):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(str(tmp_path / "stock.idx"))
    source = DocumentSource([tmp_path / "stock"], piece_tokens=6)
    assert [source.window(n).ids.tolist() for n in range(len(source))] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
        [5, 6, 7, 8],
    ]


def test_masks_are_never_lost_by_reading_a_shard_as_documents(shard: Path) -> None:
    materialize(shard)
    for prefix in (shard, shard.with_name("sft.materialized")):
        with pytest.raises(ShardError, match=r'give .*sft in a source of kind = "windows"'):
            DocumentSource([prefix], piece_tokens=64)


def test_a_dataset_that_is_not_there_or_cut_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(IndexedError, match=r"nowhere\.idx: missing"):
        DocumentSource([tmp_path / "nowhere"], piece_tokens=64)
    prefix = documents(tmp_path / "plain", [5])
    index = tmp_path / "plain.idx"
    index.write_bytes(index.read_bytes()[:-3])
    with pytest.raises(IndexedError, match="without modes; it was cut short"):
        DocumentSource([prefix], piece_tokens=64)


def test_the_fingerprint_changes_with_the_data(shard: Path, tmp_path: Path) -> None:
    assert ShardSource([shard]).fingerprint != ShardSource([shard, shard]).fingerprint
    prefix, other = documents(tmp_path / "a", [5, 6]), documents(tmp_path / "b", [6, 5])
    made = [DocumentSource([p], piece_tokens=n).fingerprint for p, n in ((prefix, 64), (other, 64), (prefix, 65))]
    assert len(set(made)) == 3


def test_checksums_are_compared_unless_told_otherwise(shard: Path, tmp_path: Path) -> None:
    for file in shard.parent.glob("sft.*"):
        shutil.copy(file, tmp_path)
    content = bytearray((tmp_path / "sft.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "sft.bin").write_bytes(content)
    with pytest.raises(ShardError, match=r"sft\.bin"):
        ShardSource([tmp_path / "sft"])
    assert len(ShardSource([tmp_path / "sft"], verify=False)) == len(Shard(shard))


def test_the_tokenizer_is_found_by_its_checksum(tmp_path: Path) -> None:
    for name in ("made", "other"):
        train_tokenizer(["count to three " + name], vocabulary_size=290, folder=tmp_path / name)
    made = load_tokenizer(tmp_path / "made")
    prefix = small_shard(tmp_path / "shards" / "sft", made)
    shards = ShardSource([prefix]).shards
    found = find_tokenizer(shards)
    assert found is not None
    assert (found.path, found.control) == (made.path, made.control)

    (tmp_path / "made").rename(tmp_path / "moved")
    assert find_tokenizer(shards) is None
    assert find_tokenizer(shards, [tmp_path / "other", tmp_path / "nowhere"]) is None
    found = find_tokenizer(shards, [tmp_path / "other", tmp_path / "moved"])
    assert found is not None
    assert found.control == made.control

    shutil.copytree(tmp_path / "moved", tmp_path / "tokenizer")
    found = find_tokenizer(shards)
    assert found is not None
    assert found.path == str(tmp_path / "tokenizer" / "tokenizer.json")
