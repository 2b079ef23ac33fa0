import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_klong.config import ConfigError
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.presets import preset, tiny
from tests.conftest import REPOSITORY

# config.json of zai-org/GLM-4.5-Air as published, but for the layer that predicts a further token (1 there)
GLM_45_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}


def _written(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**GLM_45_AIR, **changes}))
    return file


def test_the_published_config_is_read_field_by_field(tmp_path: Path) -> None:
    _written(tmp_path)
    config = ModelConfig.from_hugging_face(tmp_path)
    read = config.model_dump(mode="json")
    assert {name: read[name] for name in read.keys() & GLM_45_AIR.keys()} == {
        name: GLM_45_AIR[name] for name in read.keys() & GLM_45_AIR.keys()
    }
    assert config.router_bias_update_rate == 1e-3


def test_a_config_written_is_read_back_equal(tmp_path: Path) -> None:
    for number, config in enumerate((tiny(500), ModelConfig.from_hugging_face(_written(tmp_path)))):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(config.to_hugging_face()))
        assert ModelConfig.from_hugging_face(file) == config


def test_transformers_5_spelling_means_the_same(tmp_path: Path) -> None:
    expected = ModelConfig.from_hugging_face(_written(tmp_path))
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5}
    spelt = {name: value for name, value in GLM_45_AIR.items() if name not in rope and name != "rope_scaling"}
    spelt |= {"num_mtp_layers": spelt.pop("num_nextn_predict_layers"), "rope_parameters": rope, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(spelt))
    assert ModelConfig.from_hugging_face(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_group", 8),
        ("topk_group", 2),
        ("norm_topk_prob", False),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("model_type", "glm4"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters.rope_type", "yarn"),
        ("rope_parameters.factor", 4.0),
        ("quantization_config", {"bits": 8}),
        ("sliding_window", 4096),
    ],
)
def test_what_is_not_implemented_is_refused_by_field_value_and_file(tmp_path: Path, name: str, value: Any) -> None:
    outer, _, inner = name.partition(".")
    file = _written(tmp_path, **{outer: {inner: value} if inner else value})
    with pytest.raises(ConfigError, match=re.escape(f"{file}: {name} = {json.dumps(value)} is not implemented")):
        ModelConfig.from_hugging_face(tmp_path)


def test_more_than_one_layer_for_multi_token_prediction_is_refused(tmp_path: Path) -> None:
    assert ModelConfig.from_hugging_face(_written(tmp_path, num_nextn_predict_layers=1)).num_nextn_predict_layers == 1
    file = _written(tmp_path, num_nextn_predict_layers=2)
    with pytest.raises(ConfigError, match=re.escape(f"{file}: num_nextn_predict_layers = 2: ")):
        ModelConfig.from_hugging_face(tmp_path)


def test_the_preset_of_the_air_is_the_published_config(tmp_path: Path) -> None:
    published = ModelConfig.from_hugging_face(_written(tmp_path, num_nextn_predict_layers=1))
    assert preset("glm45-air") == published


def test_a_missing_or_impossible_field_is_named(tmp_path: Path) -> None:
    file = _written(tmp_path, hidden_size=100, head_dim=None)
    with pytest.raises(ConfigError) as raised:
        ModelConfig.from_hugging_face(tmp_path)
    assert f"{file}: head_dim: Field required" in str(raised.value)
    assert f"{file}: hidden_size = 100: " in str(raised.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: not readable"):
        ModelConfig.from_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json: not readable \(no JSON object\)"):
        ModelConfig.from_hugging_face(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"num_experts_per_tok": 9},
        {"first_k_dense_replace": 4},
        {"partial_rotary_factor": 0.55},
        {"moe_intermediate_size": 36},
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        ModelConfig(**{**tiny(500).model_dump(), **changes})


def test_the_tiny_vocabulary_holds_all_ids_and_can_be_divided() -> None:
    assert [tiny(size).vocab_size for size in (1, 64, 65, 500)] == [64, 64, 128, 512]


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"tensor_parallel": 3}, ["num_attention_heads 8", "num_key_value_heads 2", "tensor_parallel 3"]),
        ({"expert_parallel": 3}, ["n_routed_experts 8", "expert_parallel 3"]),
        ({"expert_tensor_parallel": 8}, ["moe_intermediate_size / 8 4", "expert_tensor_parallel 8"]),
        ({"pipeline_parallel": 5}, ["num_hidden_layers 4", "pipeline_parallel 5"]),
    ],
)
def test_a_layout_that_cannot_divide_the_model_names_both_values(layout: dict[str, int], named: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        LayoutConfig(**layout).check_model(tiny(500))
    assert all(text in str(raised.value) for text in named), raised.value


@pytest.mark.parametrize(
    ("layers", "stages", "next_layers", "expected"),
    [
        # 46 layers, embedding and output make 48 in 4 stages: 12 each
        (46, 4, 0, (11, 12, 12, 11)),
        # with a layer for multi-token prediction 49: the one too many goes to the last stage but one
        (46, 4, 1, (11, 12, 13, 10)),
        (46, 2, 0, (23, 23)),
        # 5 in 4 stages, of which the first and last would be left empty: only the layers count
        (4, 4, 0, (1, 1, 1, 1)),
        (5, 1, 1, (5,)),
    ],
)
def test_layers_by_stage(layers: int, stages: int, next_layers: int, expected: tuple[int, ...]) -> None:
    model = tiny(500).model_copy(update={"num_hidden_layers": layers, "num_nextn_predict_layers": next_layers})
    assert LayoutConfig(pipeline_parallel=stages).stages(model) == expected


def test_stages_can_be_given_and_must_hold_all_layers() -> None:
    assert LayoutConfig(pipeline_parallel=2, layers_per_stage=(3, 1)).stages(tiny(500)) == (3, 1)
    for wrong in ((3, 2), (4,), (2, 1, 1)):
        with pytest.raises(ConfigError, match=re.escape(f"layers_per_stage {list(wrong)} are not the 4 layers")):
            LayoutConfig(pipeline_parallel=2, layers_per_stage=wrong).check_model(tiny(500))
    with pytest.raises(ConfigError, match="leaves one without a layer"):
        LayoutConfig(pipeline_parallel=2, layers_per_stage=(4, 0)).check_model(tiny(500))


def test_rows_are_divided_by_tensor_and_twice_by_context_parallelism() -> None:
    LayoutConfig(tensor_parallel=2).check_row(6)
    layout = LayoutConfig(tensor_parallel=2, context_parallel=2)
    layout.check_row(16)
    with pytest.raises(ConfigError, match=r"row_tokens 20 is no multiple of .* = 8"):
        layout.check_row(20)
    assert (layout.window_multiple, LayoutConfig().window_multiple) == (4, 1)
    # model: 2 * 2; experts: 1
    assert layout.model_processes == 4
    # model: 2 * 3 = 6; experts: 4 * 3 = 12
    assert LayoutConfig(tensor_parallel=2, pipeline_parallel=3, expert_parallel=4).model_processes == 12


def test_glm_45_air_can_be_divided_among_64_processes(tmp_path: Path) -> None:
    layout = LayoutConfig(tensor_parallel=2, pipeline_parallel=4, expert_parallel=8)
    layout.check_model(ModelConfig.from_hugging_face(_written(tmp_path)))
    layout.check_world_size(64)
    assert layout.sequence_parallel


@pytest.mark.parametrize(
    ("layout", "product"),
    [({"tensor_parallel": 2, "context_parallel": 2}, 4), ({"expert_parallel": 4, "pipeline_parallel": 2}, 8)],
)
def test_a_number_of_processes_that_does_not_fit_names_the_factors(layout: dict[str, int], product: int) -> None:
    LayoutConfig(**layout).check_world_size(2 * product)
    with pytest.raises(ConfigError) as raised:
        LayoutConfig(**layout).check_world_size(product * 3 // 2)
    assert str(raised.value).startswith(f"{product * 3 // 2} processes are no multiple of ")
    assert all(f"{name} {value}" in str(raised.value) for name, value in layout.items())


def test_importing_the_configuration_imports_no_torch() -> None:
    program = "import sys, megatron_klong.model.config; print([n for n in ('torch', 'megatron') if n in sys.modules])"
    made = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert made.stdout.strip() == "[]"
