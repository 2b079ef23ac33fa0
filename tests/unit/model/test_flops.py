"""Arithmetic of a step, by hand."""

import pytest

from megatron_klong.model.config import ModelConfig
from megatron_klong.model.flops import training_flops, weights_a_token
from megatron_klong.model.presets import preset

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    rope_theta=1e4,
)
# queries and output 8 * 8 each, key and value 8 * 4 each; dense 3 * 8 * 16; three experts of 3 * 8 * 8, a router 8 * 4
_ATTENTION, _DENSE, _SPARSE, _OUTPUT = 192, 384, 608, 512


def test_of_a_small_model() -> None:
    assert weights_a_token(MODEL) == 2 * _ATTENTION + _DENSE + _SPARSE + _OUTPUT
    # attention of a window of 3 tokens: 2 products * 2 operations * 9 / 2 pairs * width 8, in 2 layers
    expected = 3 * (2 * 1888 * (3 + 5) + 2 * (2 * 9 * 8 + 2 * 25 * 8))
    assert training_flops(MODEL, [3, 5]) == expected


def test_the_layer_for_multi_token_prediction_costs_a_layer_its_mixing_and_an_output() -> None:
    with_it = MODEL.model_copy(update={"num_nextn_predict_layers": 1})
    assert weights_a_token(with_it) - weights_a_token(MODEL) == _ATTENTION + _SPARSE + 2 * 8 * 8 + _OUTPUT


def test_the_published_model_has_twelve_billion_active_parameters() -> None:
    model = preset("glm45-air").model_copy(update={"num_nextn_predict_layers": 0})
    assert weights_a_token(model) == pytest.approx(12e9, rel=0.1)
