"""What layers keep, counted by hand for a model whose every width is another number."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.model.config import LayoutConfig, Precision
from megatron_klong.model.planner.activations import peak_activations
from megatron_klong.model.planner.holdings import stage_layers
from megatron_klong.model.planner.search import RECOMPUTE
from megatron_klong.model.planner.shapes import Device, Shapes, Workload, shapes
from megatron_klong.model.planner.stage_program import layer_profile, loss_profile
from megatron_klong.model.presets import tiny

# hidden 64, queries 8 * 16 = 128, keys and values 2 * 16 = 32 each, dense 120, experts 8 of 24, 2 a token, shared 24
MODEL = tiny(512).model_copy(update={"intermediate_size": 120, "moe_intermediate_size": 24})
TOKENS = 1000


def sizes(device: Device = "cpu", precision: Precision = "fp32", **layout: int) -> Shapes:
    work = Workload(row_tokens=TOKENS, precision=precision, device=device)
    return shapes(MODEL, LayoutConfig(**layout), work)


def per_token(parts: Mapping[str, int]) -> float:
    return sum(parts.values()) / TOKENS


NORM = 64 + 1 + 64  # scaled input, scale, result; the input is the residual stream's
# product, rotated queries and keys, cosines and sines, output twice, logarithms; and what both norms' inputs are
ATTENTION = 64 + NORM + (128 + 64) + 128 + 32 + 4 * 8 + 2 * 128 + 8
DENSE = 64 + NORM + 5 * 120
# scores, chosen experts (8 bytes each), their scores, the sum; probabilities and map; order of the 8 pairs and the 2
ROUTER_BYTES = 4 * 8 + 8 * 2 + 4 * 2 + 4 + (4 + 1) * 8 + 8 * 8 + 8 * 2
ROUTED = 2 * (64 + 6 * 24 + 1)  # input, first product, gate, half, product, weighted product, weight
STACKED_BYTES = 8 * 3 * 24 * 64 * 4 / TOKENS


def test_in_fp32_on_a_cpu_a_dense_layer_keeps_what_its_modules_save() -> None:
    kept = layer_profile(sizes(), experts=False, recompute="none").kept
    assert per_token(kept) == 4 * (ATTENTION + DENSE)


def test_in_fp32_on_a_cpu_experts_keep_their_inputs_products_and_stacked_weights() -> None:
    kept = layer_profile(sizes(), experts=True, recompute="none").kept
    assert per_token(kept) == 4 * (ATTENTION + 64 + NORM + 5 * 24 + ROUTED) + ROUTER_BYTES + STACKED_BYTES
    assert kept["experts"] == 4 * TOKENS * ROUTED + TOKENS * ROUTER_BYTES + 8 * 3 * 24 * 64 * 4


def test_in_bf16_on_a_gpu_norms_keep_their_input_and_attention_its_output_once() -> None:
    kept = layer_profile(sizes("gpu", "bf16"), experts=False, recompute="none").kept
    numbers = 64 + 64 + (128 + 32 + 32) + 4 * 8 + 128 + 64 + 64 + 5 * 120
    assert per_token(kept) == 2 * numbers + 4 * (1 + 8 + 1)


def test_norms_of_queries_and_keys_keep_what_they_scaled() -> None:
    model = MODEL.model_copy(update={"use_qk_norm": True})
    work = Workload(row_tokens=TOKENS, precision="fp32", device="cpu")
    here = shapes(model, LayoutConfig(), work)
    plain = layer_profile(sizes(), experts=False, recompute="none").kept
    kept = layer_profile(here, experts=False, recompute="none").kept
    # the queries, which were copied out of the product; of both what was scaled, and a scale for each head
    assert per_token(kept) - per_token(plain) == 4 * (128 + (128 + 8) + (32 + 2))


def test_recomputation_keeps_the_input_of_what_is_computed_again() -> None:
    of = {way: per_token(layer_profile(sizes(), experts=False, recompute=way).kept) for way in RECOMPUTE}
    assert of["none"] - of["mlp"] == 4 * 5 * 120
    assert of["full"] == 4 * 64
    with_experts = layer_profile(sizes(), experts=True, recompute="full").kept
    assert per_token(with_experts) == 4 * 64 + (4 + 1) * 8  # and the dispatcher's probabilities and map


def test_tensor_parallelism_divides_widths_inside_and_the_sequence_between_layers() -> None:
    whole = layer_profile(sizes("gpu", "bf16"), experts=False, recompute="none").kept
    halved = layer_profile(sizes("gpu", "bf16", tensor_parallel=2), experts=False, recompute="none").kept
    # cosines and sines are those of all tokens
    assert per_token(halved) == (per_token(whole) + 2 * 4 * 8) / 2


def test_context_parallelism_divides_all_of_it() -> None:
    whole = layer_profile(sizes("gpu", "bf16"), experts=True, recompute="none").kept
    halved = layer_profile(sizes("gpu", "bf16", context_parallel=2), experts=True, recompute="none").kept
    assert per_token(halved) == per_token(whole) / 2


def test_the_loss_holds_logits_once_in_fp32_and_in_bf16_also_as_they_were() -> None:
    assert loss_profile(sizes()).kept["logits"] == 4 * 512 * TOKENS
    in_bf16 = loss_profile(sizes("gpu", "bf16"))
    assert in_bf16.kept["logits"] == 4 * 512 * TOKENS
    assert in_bf16.forward_peak["logits"] == (4 + 2) * 512 * TOKENS


def test_earlier_stages_hold_more_micro_batches() -> None:
    layout = LayoutConfig(pipeline_parallel=2)
    work = Workload(row_tokens=TOKENS, recompute="full", device="gpu")
    first, _ = stage_layers(MODEL, layout)
    here = shapes(MODEL, layout, work)
    one, two = (sum(peak_activations(here, first, work, in_flight=count).values()) for count in (1, 2))
    # inputs of two layers and the output that went to the next stage
    assert two - one == 3 * TOKENS * 64 * 2


@given(
    tensor=st.sampled_from([1, 2]),
    experts=st.sampled_from([1, 2, 4]),
    context=st.sampled_from([1, 2, 4]),
    divided_experts=st.booleans(),
    device=st.sampled_from(["cpu", "gpu"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    fields=st.fixed_dictionaries({"use_qk_norm": st.booleans(), "attention_bias": st.booleans()}),
    imbalance=st.sampled_from([0.0, 1.0, 2.5]),
)
def test_every_program_frees_all_it_takes_and_recomputes_to_keep_less(
    tensor: int,
    experts: int,
    context: int,
    divided_experts: bool,
    device: Device,
    precision: Precision,
    fields: dict[str, Any],
    imbalance: float,
) -> None:
    layout = LayoutConfig(
        tensor_parallel=tensor,
        expert_parallel=experts,
        context_parallel=context,
        expert_tensor_parallel=tensor if divided_experts else 1,
    )
    work = Workload(row_tokens=4096, precision=precision, device=device, expert_imbalance=imbalance)
    model = MODEL.model_copy(update={**fields, "num_nextn_predict_layers": 1})
    here = shapes(model, layout, work)
    for with_experts in (False, True):
        profiles = [layer_profile(here, experts=with_experts, recompute=way) for way in RECOMPUTE]
        kept = [sum(profile.kept.values()) for profile in profiles]
        assert kept == sorted(kept, reverse=True)
        for profile in profiles:
            assert sum(profile.kept.values()) <= sum(profile.forward_peak.values())
            assert sum(profile.kept.values()) < sum(profile.backward_peak.values())
    (stage,) = stage_layers(model, layout)
    peaks = [
        sum(peak_activations(here, stage, replace(work, recompute=way), in_flight=1).values()) for way in RECOMPUTE
    ]
    assert peaks[2] <= peaks[0]


def test_a_row_that_does_not_divide_evenly_is_rounded_up() -> None:
    assert (sizes(context_parallel=3).tokens, sizes(context_parallel=3, tensor_parallel=2).slice_tokens) == (334, 167)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_row_more_of_an_expert_costs_its_activations(precision: Precision) -> None:
    here = sizes("gpu", precision, expert_parallel=2)
    fuller = replace(here, expert_imbalance=1.5)
    kept = [layer_profile(one, experts=True, recompute="none").kept["experts"] for one in (here, fuller)]
    element = 4 if precision == "fp32" else 2
    assert kept[1] - kept[0] == 1000 * (element * (64 + 6 * 24) + 4)
