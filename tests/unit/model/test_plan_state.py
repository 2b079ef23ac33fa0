"""Parameters and bytes of a rank, by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.planner.holdings import Holding, holding, stage_layers
from megatron_klong.model.planner.plan import make_plan
from megatron_klong.model.planner.shapes import Workload
from megatron_klong.model.planner.state import kv_cache_bytes, state
from megatron_klong.model.presets import preset, tiny

# hidden 64, queries 128, keys and values 32 each, dense 128, 8 experts of 32, shared 32, 512 ids, 4 layers
TINY = preset("tiny")
ATTENTION = 2 * 64 + (128 + 64) * 64 + (128 + 64) + 128 * 64
MOE = ATTENTION + 8 * 64 + 3 * 64 * 32 + 8 * 3 * 64 * 32


def test_a_whole_model_is_the_sum_of_its_matrices() -> None:
    (stage,) = stage_layers(TINY, LayoutConfig())
    held = holding(TINY, LayoutConfig(), stage)
    assert held.parameters == 2 * 512 * 64 + 64 + (ATTENTION + 3 * 64 * 128) + 3 * MOE
    assert held.expert == Counter({2 * 64 * 32: 3 * 8, 64 * 32: 3 * 8})
    assert held.fp32_buffers == 3 * 2 * 8


def test_the_layer_that_predicts_further_tokens_is_on_the_last_stage_with_an_embedding_of_its_own() -> None:
    model, layout = TINY.model_copy(update={"num_nextn_predict_layers": 1}), LayoutConfig(pipeline_parallel=2)
    stages = stage_layers(model, layout)
    plain = [holding(TINY, layout, one).parameters for one in stage_layers(TINY, layout)]
    found = [holding(model, layout, one).parameters for one in stages]
    joined = 3 * 64 + 2 * 64 * 64
    assert sum(found) - sum(plain) == MOE + joined + 512 * 64


def test_of_an_interleaved_pipeline_a_process_holds_every_second_stage_and_more_in_flight() -> None:
    layout = LayoutConfig(pipeline_parallel=2, virtual_pipeline_parallel=2)
    first, last = stage_layers(TINY, layout)
    assert (first.experts, last.experts) == ((False, True), (True, True))  # layers 0 and 2, 1 and 3
    assert holding(TINY, layout, first).parameters == 512 * 64 + (ATTENTION + 3 * 64 * 128) + MOE
    assert holding(TINY, layout, last).parameters == 2 * MOE + 64 + 512 * 64
    work = Workload(row_tokens=128, micro_batches=8, device="cpu")
    # in halves of a process's layers: 2 * 1 + 2 + 1 of the first one, 2 * 0 + 2 + 1 of the last one
    assert [stage.in_flight for stage in make_plan(TINY, layout, work, gpus=2).stages] == [3, 2]


def test_bytes_of_a_bf16_rank() -> None:
    layout = LayoutConfig(tensor_parallel=2, expert_parallel=4)
    held = Holding(dense=Counter({100: 2, 64: 1}), expert=Counter({64: 2}), fp32_buffers=16)
    found = state(held, layout, Workload(row_tokens=8, precision="bf16"), processes=16)
    # dense: 128 + 128 + 64, up to a multiple of 128: 384, over 8 copies; experts: 128, over 4
    assert found.weights_bytes == 2 * (384 + 128) + 4 * 16
    assert found.gradients_bytes == 4 * (384 + 128)
    assert found.optimizer_bytes == 12 * (384 // 8 + 128 // 4)
    assert found.step_bytes == 0


def test_fp32_weights_are_their_own_master_copy_and_gloo_copies_gradients() -> None:
    held = Holding(dense=Counter({128: 3}), expert=Counter({256: 1}), fp32_buffers=0)
    found = state(held, LayoutConfig(), Workload(row_tokens=8, precision="fp32", device="cpu"), processes=4)
    # one buffer: experts are divided as all the rest is
    assert (found.weights_bytes, found.optimizer_bytes) == (4 * 640, 8 * 640 // 4)
    assert found.step_bytes == 4 * 640


def test_a_buffer_is_padded_so_that_all_get_equal_shares() -> None:
    held = Holding(dense=Counter({1: 1}), expert=Counter(), fp32_buffers=0)
    found = state(held, LayoutConfig(), Workload(row_tokens=8, precision="fp32"), processes=3)
    assert found.weights_bytes == 4 * 384  # a multiple of 128 and of 3


def test_keys_and_values_of_a_server() -> None:
    layout = LayoutConfig(tensor_parallel=2)
    assert kv_cache_bytes(TINY, layout, layers=4, tokens=10, element_bytes=2) == 2 * 16 * 4 * 2 * 10


def test_training_and_serving_take_turns() -> None:
    work = Workload(row_tokens=64)
    (small,) = make_plan(TINY, LayoutConfig(), work, gpus=1, serve_tokens=1).stages
    (large,) = make_plan(TINY, LayoutConfig(), work, gpus=1, serve_tokens=10**6).stages
    assert small.total_bytes == small.training_bytes
    assert large.total_bytes == large.weights_bytes + 2 * 32 * 4 * 2 * 10**6


@pytest.mark.parametrize("name", ["glm45-air", "glm45"])
def test_all_ranks_together_hold_every_parameter(name: str) -> None:
    model: ModelConfig = preset(name)
    model = model.model_copy(update={"num_nextn_predict_layers": 0})
    (whole,) = (holding(model, LayoutConfig(), stage).parameters for stage in stage_layers(model, LayoutConfig()))
    for stages in (2, 4, 8):
        layout = LayoutConfig(pipeline_parallel=stages)
        assert sum(holding(model, layout, stage).parameters for stage in stage_layers(model, layout)) == whole


@given(
    tensor=st.sampled_from([1, 2]),
    stages=st.sampled_from([1, 2]),
    experts=st.sampled_from([1, 2, 4, 8]),
    context=st.sampled_from([1, 2]),
)
def test_more_parallelism_never_means_more_bytes_held(tensor: int, stages: int, experts: int, context: int) -> None:
    model, work = tiny(512), Workload(row_tokens=64)
    layout = LayoutConfig(
        tensor_parallel=tensor, pipeline_parallel=stages, expert_parallel=experts, context_parallel=context
    )
    base = make_plan(model, layout, work, gpus=64)
    for field in ("tensor_parallel", "expert_parallel", "context_parallel"):
        if field == "expert_parallel" and experts == 8:
            continue
        if field == "tensor_parallel" and tensor == 2:
            continue
        more = make_plan(model, layout.model_copy(update={field: 2 * getattr(layout, field)}), work, gpus=64)
        for before, after in zip(base.stages, more.stages, strict=True):
            assert after.weights_bytes <= before.weights_bytes
            assert after.gradients_bytes <= before.gradients_bytes
            assert after.moving_bytes <= before.moving_bytes or field == "expert_parallel"
