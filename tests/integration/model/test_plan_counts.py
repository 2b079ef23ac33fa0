"""The planner's parameters are those of the real model, and of transformers' model."""

import subprocess
import sys

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.planner.holdings import (
    built_holding,
    holding,
    stage_layers,
    stage_rank,
    unique_parameters,
)
from megatron_klong.model.presets import PresetName, preset, tiny
from tests.conftest import REPOSITORY

MODELS = [
    pytest.param({}, id="tiny"),
    pytest.param(
        {"use_qk_norm": True, "attention_bias": False, "first_k_dense_replace": 2, "n_shared_experts": 2},
        id="other architecture",
    ),
    pytest.param({"num_nextn_predict_layers": 1}, id="multi-token prediction"),
]
LAYOUTS = [
    pytest.param({}, 1, id="one process"),
    pytest.param({"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 2}, 8, id="TP2 PP2 EP2 of 8"),
    pytest.param({"tensor_parallel": 2, "expert_tensor_parallel": 2, "context_parallel": 2}, 4, id="TP2 ETP2 CP2"),
    pytest.param({"pipeline_parallel": 3, "expert_parallel": 2, "layers_per_stage": (1, 1, 2)}, 6, id="PP3 EP2"),
]


@pytest.mark.parametrize("fields", MODELS)
@pytest.mark.parametrize(("layout", "processes"), LAYOUTS)
def test_each_stage_holds_what_the_real_one_holds(
    fields: dict[str, object], layout: dict[str, int], processes: int
) -> None:
    model, divided = tiny(512).model_copy(update=fields), LayoutConfig(**layout)
    for number, stage in enumerate(stage_layers(model, divided)):
        first = stage_rank(divided, number, processes)
        for rank in (first, first + processes // divided.pipeline_parallel - 1):
            built = built_holding(model, divided, rank=rank, processes=processes)
            assert built == holding(model, divided, stage)


@pytest.mark.parametrize("fields", MODELS)
def test_all_ranks_together_hold_one_model(fields: dict[str, object]) -> None:
    model = tiny(512).model_copy(update=fields)
    (stage,) = stage_layers(model, LayoutConfig())
    divided = LayoutConfig(tensor_parallel=2, pipeline_parallel=2, expert_parallel=2)
    assert unique_parameters(model, divided, processes=8) == holding(model, LayoutConfig(), stage).parameters


@pytest.mark.parametrize(
    ("name", "layout", "processes", "expected"),
    [
        ("glm45-air", {"tensor_parallel": 2, "pipeline_parallel": 4, "expert_parallel": 8}, 64, 106_852_245_504),
        ("glm45", {"tensor_parallel": 4, "pipeline_parallel": 8, "expert_parallel": 8}, 64, 352_797_814_784),
    ],
)
def test_the_published_models_have_as_many_parameters_as_transformers(
    name: PresetName, layout: dict[str, int], processes: int, expected: int
) -> None:
    """Which carries no layer for multi-token prediction."""
    model: ModelConfig = preset(name).model_copy(update={"num_nextn_predict_layers": 0})
    with torch.device("meta"):
        theirs = Glm4MoeForCausalLM(Glm4MoeConfig(**model.to_hugging_face()))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert unique_parameters(model, LayoutConfig(**layout), processes=processes) == count == expected


def test_the_program_builds_the_real_model_and_ends_with_status_2_on_a_mistake() -> None:
    command = [sys.executable, "tools/plan_layout.py", "--model", "tiny", "--gpus", "8", "--max-tokens", "4096"]
    made = subprocess.run([*command, "--top", "1"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "It fits" in made.stdout
    wrong = subprocess.run(
        [*command, "--expert-parallel", "3"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "expert_parallel 3" in wrong.stderr
