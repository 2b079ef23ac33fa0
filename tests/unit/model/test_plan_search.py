"""What the planner proposes fits, and says why something else does not."""

import argparse
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.config import ConfigError
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.planner import program
from megatron_klong.model.planner.cost import cost
from megatron_klong.model.planner.memory import Memory, parse_bytes
from megatron_klong.model.planner.plan import Plan
from megatron_klong.model.planner.report import advice, table
from megatron_klong.model.planner.search import Question, all_plans, best_plans, changes, cures, nearest_plan
from megatron_klong.model.planner.shapes import Workload
from megatron_klong.model.presets import preset

TINY = preset("tiny")
ROW = 4096


def question(memory_bytes: int, gpus: int = 8, **more: Any) -> Question:
    memory = Memory.of(memory_bytes, 0)
    work = Workload(row_tokens=ROW)
    return Question(model=TINY, gpus=gpus, memory=memory, work=work, global_batch_rows=8, **more)


def needed_bytes(plan: Plan) -> int:
    """With the planner's error on top of what moves."""
    return max(round(stage.held_bytes + 1.1 * stage.moving_bytes) for stage in plan.stages)


def test_memory_is_read_with_its_unit() -> None:
    assert (parse_bytes("141GB"), parse_bytes("80 GiB"), parse_bytes("1.5MiB")) == (141 * 10**9, 80 * 2**30, 3 * 2**19)
    with pytest.raises(ConfigError, match="write it like 141GB"):
        parse_bytes("141")


def test_the_reserve_is_four_gib_and_five_percent() -> None:
    memory = Memory.of(100 * 2**30)
    assert memory.usable_bytes == (100 - 4 - 5) * 2**30
    with pytest.raises(ConfigError, match="leaves nothing"):
        Memory.of(10, 10)


def test_what_is_not_divided_costs_nothing_and_a_pipeline_its_bubble_and_its_longest_stage() -> None:
    asked = question(2**40)
    alone = cost(asked.plan(LayoutConfig(), "none"))
    assert (alone.tensor, alone.experts, alone.context, alone.bubble, alone.recompute) == (0, 0, 0, 0, 0)
    # two micro-batches and two stages of 2 layers each, the loss counted as one more: 3 where 2.5 would be even
    piped = cost(asked.plan(LayoutConfig(pipeline_parallel=2), "full"))
    assert piped.bubble == pytest.approx(1 / 2 + 3 / 2.5 - 1)
    assert piped.recompute == pytest.approx(1 / 3)


def test_with_room_for_everything_nothing_is_divided_or_recomputed_that_costs() -> None:
    best = best_plans(question(2**40))[0]
    assert (best.layout, best.work.recompute) == (LayoutConfig(), "none")


@settings(max_examples=8, deadline=None)
@given(memory=st.integers(2 * 10**6, 60 * 10**6))
def test_whatever_is_proposed_fits_and_costs_least_of_what_fits(memory: int) -> None:
    asked = question(memory)
    found = best_plans(asked)
    for plan in found:
        assert needed_bytes(plan) <= memory
        plan.layout.check_model(TINY)
        plan.layout.check_world_size(8)
    overheads = [round(cost(plan).overhead, 3) for plan in found]
    assert overheads == sorted(overheads)
    fitting = [plan for plan in all_plans(asked) if needed_bytes(plan) <= memory]
    assert len(found) == len(fitting)


def test_the_nearest_that_fits_takes_the_fewest_changes() -> None:
    asked = question(2**40)
    plan = asked.plan(LayoutConfig(), "none")
    recomputed = asked.plan(LayoutConfig(), "full")
    # room for the same layout once it recomputes, and one setting is the least that can change
    asked = replace(asked, memory=Memory.of(needed_bytes(recomputed) + 1, 0))
    assert not asked.memory.fits(plan)
    nearest = nearest_plan(asked, plan)
    assert nearest is not None
    assert len(changes(plan, nearest)) == 1
    assert asked.memory.fits_surely(nearest)


def test_a_plan_within_the_planners_error_is_tight_and_not_proposed() -> None:
    plan = question(2**40).plan(LayoutConfig(), "none")
    memory = Memory.of(plan.peak_bytes, 0)
    assert memory.fits(plan)
    assert not memory.fits_surely(plan)
    said = advice(plan, memory, None, [])
    assert said.startswith("Tight: stage 0 needs")
    assert "less room than the planner's error of 10%" in said


def test_the_first_part_that_does_not_fit_is_named() -> None:
    asked = question(2**40)
    plan = asked.plan(LayoutConfig(), "none")
    (stage,) = plan.stages
    held = stage.weights_bytes
    expected = {
        held - 1: "weights",
        held + 1: "gradients",
        held + stage.gradients_bytes + 1: "optimizer states",
        stage.held_bytes + 1: "activations",
        stage.held_bytes + stage.activations_bytes + 1: "MoE buffers",
        stage.total_bytes - 1: "logits" if stage.logits_bytes else "MoE buffers",
        stage.total_bytes: "",
    }
    assert {size: Memory.of(size, 0).first_too_much(stage) for size in expected} == expected
    said = advice(plan, Memory.of(held - 1, 0), None, ["use 16 GPUs"])
    assert "the first thing that does not fit are its weights" in said
    assert "No layout of 8 GPUs fits; use 16 GPUs." in said


def test_where_nothing_fits_more_gpus_or_shorter_rows_are_named() -> None:
    small = question(2 * 10**6, gpus=2)
    assert not best_plans(small)
    for cure in cures(small):
        if cure.startswith("use"):
            gpus = int(cure.split()[1])
            assert best_plans(replace(small, gpus=gpus, global_batch_rows=max(8, gpus)))
        else:
            tokens = int(cure.split()[2].replace(",", ""))
            assert best_plans(replace(small, work=Workload(row_tokens=tokens)))


def test_the_table_has_a_line_a_stage() -> None:
    asked = question(2**40)
    lines = table(asked.plan(LayoutConfig(pipeline_parallel=2), "mlp"), asked.memory)
    assert len(lines) == 3
    assert lines[0].split()[:6] == ["GiB", "by", "stage", "layers", "in", "flight"]


def run(*arguments: str) -> list[str]:
    parser = argparse.ArgumentParser()
    program.add_options(parser)
    return program.run(parser.parse_args([*arguments]))


@pytest.fixture(autouse=True)
def _without_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the counts are the real model's is shown in tests/integration/model/test_plan_counts.py."""
    monkeypatch.setattr(program, "check_against_model", lambda plan: None)


def test_a_layout_that_fits_is_said_to_fit() -> None:
    lines = run("--model", "tiny", "--gpus", "4", "--gpu-memory", "80GiB", "--expert-parallel", "2")
    assert lines[0].startswith("EP2, data parallel 4, recompute none, bf16: fits")
    assert any(line.startswith("It fits: stage 0 needs") for line in lines)


def test_json_has_bytes_by_stage_and_the_advice() -> None:
    (text,) = run("--model", "tiny", "--gpus", "4", "--gpu-memory", "80GiB", "--top", "2", "--json")
    found = json.loads(text)
    assert len(found["plans"]) == 2
    first = found["plans"][0]
    assert first["peak_bytes"] == max(stage["total_bytes"] for stage in first["stages"])
    assert found["nearest"] is None
    assert found["advice"].startswith("It fits")


def test_where_a_layout_is_too_large_the_nearest_is_shown_with_it() -> None:
    lines = run("--model", "glm45-air", "--gpus", "128", "--gpu-memory", "141GB", "--tensor-parallel", "2")
    assert "does not fit" in lines[0]
    assert any("Nearest that fits: " in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel", "3"], "no multiple of tensor_parallel 3"),
        (["--pipeline-parallel", "3"], r"8 processes are no multiple of .*pipeline_parallel 3"),
        (["--max-tokens", "1001", "--tensor-parallel", "2"], "row_tokens 1001 is no multiple"),
        (["--global-batch-rows", "3", "--tensor-parallel", "1"], "global_batch_rows 3 cannot be shared by 8"),
        (["--gpu-memory", "much"], "'much' is no amount of memory"),
        (["--reserve", "200GB"], "lower --reserve"),
        (["--expert-imbalance", "0.5"], "--expert-imbalance 0.5 is below 1"),
        (["--layers-per-stage", "1,2", "--pipeline-parallel", "2"], "layers_per_stage"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field_and_the_cure(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("--model", "tiny", "--gpus", "8", *arguments)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"glm46 is neither tiny, glm45-air, glm45 nor a config\.json"):
        run("--model", "glm46", "--gpus", "8")
