"""Windows as plain documents: what stock Megatron opens, with the mask beside."""

from pathlib import Path

import numpy as np
import pytest

from megatron_klong.data.loss_on import LossOn
from megatron_klong.data.materialize import materialize
from megatron_klong.data.merge import merge_shards
from tests.unit.data.test_loss_on import shard_of
from tests.unit.data.test_shard import MADE
from tests.unit.trajectory.builders import policy


@pytest.mark.parametrize("loss_on", ["new", "window"])
def test_stock_megatron_reads_each_window_as_a_document(tmp_path: Path, loss_on: LossOn) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    shard = shard_of(tmp_path / "s", MADE, policy(120, reserve=40, keep=40), loss_on)
    materialize(tmp_path / "s")
    tokens, mask = (IndexedDataset(str(tmp_path / f"s.{name}")) for name in ("materialized", "materialized_mask"))
    assert len(tokens) == len(mask) == len(shard) > 3
    np.testing.assert_array_equal(tokens.document_indices, np.arange(len(shard) + 1))
    for number in range(len(shard)):
        window = shard.window(number)
        np.testing.assert_array_equal(tokens[number], window.ids)
        np.testing.assert_array_equal(mask[number], window.loss_mask)
    assert sum(int(mask[n].sum()) for n in range(len(shard))) == sum(shard.column("trained_tokens"))


def test_the_files_are_those_of_the_stock_builder(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    shard = shard_of(tmp_path / "s", MADE, policy(120, reserve=40, keep=40), "new")
    materialize(tmp_path / "s")
    for name, dtype in (("materialized", np.uint16), ("materialized_mask", np.uint8)):
        stock = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=dtype)
        for number in range(len(shard)):
            window = shard.window(number)
            content = torch.from_numpy(np.array(window.ids if dtype is np.uint16 else window.loss_mask, np.int32))
            stock.add_document(content, [len(content)])
        stock.finalize(str(tmp_path / "stock.idx"))
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"s.{name}{suffix}").read_bytes() == (tmp_path / f"stock{suffix}").read_bytes()


def test_it_goes_when_its_shard_is_replaced(tmp_path: Path) -> None:
    shard_of(tmp_path / "part", MADE, policy(120, reserve=40, keep=40), "new")
    merge_shards([tmp_path / "part"], tmp_path / "s", overwrite=False)
    materialize(tmp_path / "s")
    before = (tmp_path / "s.materialized.bin").read_bytes()
    merge_shards([tmp_path / "part"], tmp_path / "s", overwrite=True)
    assert not list(tmp_path.glob("s.materialized*.idx"))
    materialize(tmp_path / "s")
    assert (tmp_path / "s.materialized.bin").read_bytes() == before
