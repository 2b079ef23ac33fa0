"""The order of rows: every window once an epoch, the same for everyone, shared out without gaps."""

import shutil
from pathlib import Path

import pytest

from megatron_klong.data.shard import ShardError
from megatron_klong.train.rows import Shards, TrainingRows
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.unit.train.builders import ROW_TOKENS, small_shard


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


def test_each_epoch_holds_each_window_once_in_another_order(shard: Path) -> None:
    rows = TrainingRows(Shards([shard]), row_tokens=ROW_TOKENS, seed=3)
    count = len(rows.rows)
    epochs = [[rows.row_at(epoch * count + place) for place in range(count)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(window for row in epoch for window in row) == list(range(len(rows.shards)))
    assert epochs[0] != epochs[1] != epochs[2]
    # entered anywhere, the order is the same
    assert TrainingRows(Shards([shard]), row_tokens=ROW_TOKENS, seed=3).row_at(count + 2) == epochs[1][2]


def test_processes_share_the_rows_of_a_step(shard: Path) -> None:
    rows = TrainingRows(Shards([shard]), row_tokens=ROW_TOKENS, seed=0)
    whole = rows.batches(len(rows.rows) - 2, 4, part=0, parts=1)  # over the end of the epoch
    halves = [batch for part in range(2) for batch in rows.batches(len(rows.rows) - 2, 4, part=part, parts=2)]
    assert [batch.ids.tolist() for batch in whole] == [batch.ids.tolist() for batch in halves]
    with pytest.raises(ValueError, match="4 rows cannot be shared by 3"):
        rows.batches(0, 4, part=0, parts=3)


def test_several_shards_are_numbered_through(shard: Path, tmp_path: Path) -> None:
    single, double = Shards([shard]), Shards([shard, shard])
    assert len(double) == 2 * len(single)
    assert double.lengths_tokens == single.lengths_tokens * 2
    assert double.window(len(single)).ids.tolist() == single.window(0).ids.tolist()
    assert double.window(len(single) - 1).ids.tolist() == single.window(len(single) - 1).ids.tolist()
    assert [len(single.window(number).ids) for number in range(len(single))] == single.lengths_tokens


def test_the_fingerprint_follows_data_length_and_seed(shard: Path) -> None:
    def fingerprint(shards: list[Path], row_tokens: int = 256, seed: int = 0) -> str:
        return TrainingRows(Shards(shards), row_tokens=row_tokens, seed=seed).fingerprint

    made = [fingerprint([shard]), fingerprint([shard, shard]), fingerprint([shard], 300), fingerprint([shard], seed=1)]
    assert len(set(made)) == 4
    assert fingerprint([shard]) == made[0]


def test_shards_of_different_tokenizers_do_not_mix(shard: Path, tmp_path: Path) -> None:
    other = small_shard(tmp_path / "other")
    manifest = other.with_name("other.manifest.json")
    manifest.write_text(manifest.read_text().replace('"sha256": "bytes"', '"sha256": "others"'))
    with pytest.raises(ShardError, match="another tokenizer than"):
        Shards([shard, other])


def test_the_tokenizer_is_found_by_its_checksum(tmp_path: Path) -> None:
    for name in ("made", "other"):
        train_tokenizer(["count to three " + name], vocabulary_size=290, folder=tmp_path / name)
    made = load_tokenizer(tmp_path / "made")
    prefix = small_shard(tmp_path / "shards" / "sft", made)
    shards = Shards([prefix])
    found = shards.find_tokenizer()
    assert found is not None
    assert (found.path, found.control) == (made.path, made.control)

    (tmp_path / "made").rename(tmp_path / "moved")
    assert shards.find_tokenizer() is None
    assert shards.find_tokenizer([tmp_path / "other", tmp_path / "nowhere"]) is None
    found = shards.find_tokenizer([tmp_path / "other", tmp_path / "moved"])
    assert found is not None
    assert found.control == made.control

    shutil.copytree(tmp_path / "moved", tmp_path / "tokenizer")
    found = shards.find_tokenizer()
    assert found is not None
    assert found.path == str(tmp_path / "tokenizer" / "tokenizer.json")
