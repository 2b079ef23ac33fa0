"""What the model, its attention and its process groups refuse, on one process."""

from collections.abc import Iterator

import pytest
import torch

from megatron_klong.config import ConfigError
from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.model.presets import tiny

# isort: split
from megatron.core.packed_seq_params import PackedSeqParams

LAYOUT = LayoutConfig()
IDS = torch.arange(8)[None]


@pytest.fixture
def _process_groups() -> Iterator[None]:
    initialize(LAYOUT, seed=1)
    yield
    destroy()


def test_processes_that_do_not_fit_the_layout_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 processes are no multiple of tensor_parallel 2"):
        initialize(LayoutConfig(tensor_parallel=2), seed=1)


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="has RANK but not MASTER_ADDR, MASTER_PORT, WORLD_SIZE"):
        initialize(LAYOUT, seed=1)


def test_a_model_without_process_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="no process groups"):
        build_model(tiny(500), LAYOUT)


@pytest.mark.usefixtures("_process_groups")
def test_initializing_twice_and_another_layout_are_refused() -> None:
    with pytest.raises(ConfigError, match="there already"):
        initialize(LAYOUT, seed=1)
    with pytest.raises(ConfigError, match=r"tensor_parallel=1.*tensor_parallel=2"):
        build_model(tiny(500), LayoutConfig(tensor_parallel=2))


@pytest.mark.usefixtures("_process_groups")
def test_a_mask_and_packed_rows_with_a_gap_are_refused() -> None:
    model = build_model(tiny(500), LAYOUT)
    with pytest.raises(ValueError, match="takes no mask"):
        model(IDS, IDS, torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    ends = torch.tensor([0, 3, 6], dtype=torch.int32)
    gap = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=3, max_seqlen_kv=3)
    with pytest.raises(RuntimeError, match="split"):
        model(IDS, IDS, None, packed_seq_params=gap)


@pytest.mark.usefixtures("_process_groups")
def test_the_seed_decides_the_weights() -> None:
    first = build_model(tiny(500), LAYOUT).state_dict()
    destroy()
    initialize(LAYOUT, seed=1)
    same = build_model(tiny(500), LAYOUT).state_dict()
    destroy()
    initialize(LAYOUT, seed=2)
    other = build_model(tiny(500), LAYOUT).state_dict()
    name = "decoder.layers.3.mlp.experts.linear_fc1.weight7"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])
