"""The model computes, trains and exports on every layout what transformers' Glm4MoeForCausalLM does."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
NEXT, OTHER_NEXT = CONFIG.model_copy(update=_MTP), OTHER.model_copy(update=_MTP)
MODELS = {"CONFIG": CONFIG, "OTHER": OTHER, "NEXT": NEXT, "OTHER_NEXT": OTHER_NEXT}
WORKER = REPOSITORY / "tests/integration/model/worker.py"
LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "TP2 ETP2": (2, {"tensor_parallel": 2, "expert_tensor_parallel": 2}, ["CONFIG"]),
    "TP2 with whole experts": (2, {"tensor_parallel": 2}, ["OTHER", "NEXT"]),
    "EP2": (2, {"expert_parallel": 2}, ["CONFIG"]),
    "PP2": (2, {"pipeline_parallel": 2}, ["CONFIG", "NEXT"]),
    "PP2 uneven": (2, {"pipeline_parallel": 2, "layers_per_stage": [1, 3]}, ["OTHER"]),
    "CP2": (2, {"context_parallel": 2}, ["CONFIG", "NEXT"]),
    "TP2 EP2 ETP2": (4, {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2}, ["CONFIG"]),
    "TP2 EP2": (4, {"tensor_parallel": 2, "expert_parallel": 2}, ["CONFIG"]),
    "TP2 PP2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}, ["CONFIG"]),
    "TP2 CP2": (4, {"tensor_parallel": 2, "context_parallel": 2}, ["CONFIG"]),
}


def test_one_process_computes_what_transformers_does_whatever_the_weights(tmp_path: Path) -> None:
    folders = []
    for name, config in MODELS.items():
        for seed in (0, 1, 2):
            folders.append(tmp_path / f"{name}-{seed}")
            write_reference(folders[-1], config, seed=seed)
    launch(WORKER, json.dumps([({}, list(map(str, folders)))]), processes=1)
    for folder in folders:
        check(folder, 1e-5)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """The folders of a layout, once its processes, or those of another layout that has as many, are through with it."""
    folders: dict[str, list[Path]] = {}

    def compute(layout: str) -> list[Path]:
        processes = LAYOUTS[layout][0]
        if layout not in folders:
            alike = {name: models for name, (number, _, models) in LAYOUTS.items() if number == processes}
            made = {name: [tmp_path_factory.mktemp("parity") / model for model in alike[name]] for name in alike}
            for folder in itertools.chain(*made.values()):
                write_reference(folder, MODELS[folder.name])
            runs = [(LAYOUTS[name][1], list(map(str, made[name]))) for name in alike]
            launch(WORKER, json.dumps(runs), processes=processes)
            folders.update(made)
        return folders[layout]

    return compute


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.long) if processes > 2 else name
        for name, (processes, _, _) in LAYOUTS.items()
    ],
)
def test_logits_gradients_and_exported_weights_are_those_of_transformers(
    computed: Callable[[str], list[Path]], layout: str
) -> None:
    for folder in computed(layout):
        check(folder, 1e-4)


def check(folder: Path, tolerance: float) -> None:
    reference = torch.load(folder / "reference.pt")

    differences = json.loads((folder / "out" / "figures.json").read_text())
    # the logits are up to 4 in size; "packed" stands for the windows one by one
    assert max(differences.values()) < tolerance, (folder.name, differences)
    assert differences.keys() == {"whole", "packed"}

    for case in differences:
        found = load_file(folder / "out" / f"gradients_{case}" / "model.safetensors")
        expected = reference[case]["gradients"]
        relative = {
            name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected
        }
        worst = max(relative, key=relative.__getitem__)
        assert relative[worst] < 1e-5, (folder.name, case, worst, relative[worst])

    read = load_file(folder / "weights" / "model.safetensors")
    written = load_file(folder / "out" / "exported" / "model.safetensors")
    assert written.keys() == read.keys()
    assert [name for name in read if not torch.equal(written[name], read[name])] == []
    assert [name for name in read if written[name].dtype != read[name].dtype] == []
