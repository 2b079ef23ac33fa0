"""The model computes, trains and exports on every layout what transformers' Glm4MoeForCausalLM does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_klong.model.config import ModelConfig
from megatron_klong.model.presets import tiny
from tests.conftest import REPOSITORY
from tests.integration.model.launch import launch
from tests.integration.model.reference import CONFIG, write_reference

# Everything that CONFIG leaves out: norms on queries and keys, no bias, two dense layers, two shared experts.
OTHER = ModelConfig(
    **{
        **tiny(500).model_dump(),
        "attention_bias": False,
        "use_qk_norm": True,
        "first_k_dense_replace": 2,
        "n_shared_experts": 2,
        "partial_rotary_factor": 1.0,
        "num_experts_per_tok": 3,
    }
)
# A layer for multi-token prediction behind the others.
_MTP = {"num_nextn_predict_layers": 1}
NEXT = CONFIG.model_copy(update=_MTP)
WORKER = REPOSITORY / "tests/integration/model/worker.py"
LAYOUTS = [
    pytest.param(1, {}, CONFIG, 1e-5, id="one process"),
    pytest.param(1, {}, OTHER, 1e-5, id="one process, other architecture"),
    pytest.param(1, {}, NEXT, 1e-5, id="one process, MTP"),
    pytest.param(1, {}, OTHER.model_copy(update=_MTP), 1e-5, id="one process, other architecture, MTP"),
    pytest.param(2, {"tensor_parallel": 2, "expert_tensor_parallel": 2}, CONFIG, 1e-4, id="TP2 ETP2"),
    pytest.param(2, {"tensor_parallel": 2}, OTHER, 1e-4, id="TP2 with whole experts, other architecture"),
    pytest.param(2, {"tensor_parallel": 2}, NEXT, 1e-4, id="TP2, MTP"),
    pytest.param(2, {"expert_parallel": 2}, CONFIG, 1e-4, id="EP2"),
    pytest.param(2, {"pipeline_parallel": 2}, CONFIG, 1e-4, id="PP2"),
    pytest.param(2, {"pipeline_parallel": 2}, NEXT, 1e-4, id="PP2, MTP"),
    pytest.param(2, {"pipeline_parallel": 2, "layers_per_stage": [1, 3]}, OTHER, 1e-4, id="PP2 uneven"),
    pytest.param(2, {"context_parallel": 2}, CONFIG, 1e-4, id="CP2"),
    pytest.param(2, {"context_parallel": 2}, NEXT, 1e-4, id="CP2, MTP"),
    pytest.param(
        4, {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2}, CONFIG, 1e-4, id="TP2 EP2 ETP2"
    ),
    pytest.param(4, {"tensor_parallel": 2, "expert_parallel": 2}, CONFIG, 1e-4, id="TP2 EP2"),
    pytest.param(4, {"tensor_parallel": 2, "pipeline_parallel": 2}, CONFIG, 1e-4, id="TP2 PP2"),
    pytest.param(4, {"tensor_parallel": 2, "context_parallel": 2}, CONFIG, 1e-4, id="TP2 CP2"),
]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("config", [CONFIG, OTHER.model_copy(update=_MTP)], ids=["", "other architecture, MTP"])
def test_other_random_weights_give_the_same(tmp_path: Path, config: ModelConfig, seed: int) -> None:
    _check(tmp_path, 1, {}, config, 1e-5, seed=seed)


@pytest.mark.parametrize(("processes", "layout", "config", "tolerance"), LAYOUTS)
def test_logits_gradients_and_exported_weights_are_those_of_transformers(
    tmp_path: Path, processes: int, layout: dict[str, int], config: ModelConfig, tolerance: float
) -> None:
    _check(tmp_path, processes, layout, config, tolerance)


def _check(
    tmp_path: Path, processes: int, layout: dict[str, int], config: ModelConfig, tolerance: float, *, seed: int = 0
) -> None:
    write_reference(tmp_path, config, seed=seed)
    launch(WORKER, str(tmp_path), json.dumps(layout), processes=processes)
    reference = torch.load(tmp_path / "reference.pt")

    differences = json.loads((tmp_path / "out" / "figures.json").read_text())
    # the logits are up to 4 in size; "packed" stands for the windows one by one
    assert max(differences.values()) < tolerance, differences
    assert differences.keys() == {"whole", "packed"}

    for case in differences:
        found = load_file(tmp_path / "out" / f"gradients_{case}" / "model.safetensors")
        expected = reference[case]["gradients"]
        relative = {
            name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected
        }
        worst = max(relative, key=relative.__getitem__)
        assert relative[worst] < 1e-5, (case, worst, relative[worst])

    read = load_file(tmp_path / "weights" / "model.safetensors")
    written = load_file(tmp_path / "out" / "exported" / "model.safetensors")
    assert written.keys() == read.keys()
    assert [name for name in read if not torch.equal(written[name], read[name])] == []
    assert [name for name in read if written[name].dtype != read[name].dtype] == []
