"""Planned and measured peaks of real train steps, and recomputation that changes nothing but the memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from benchmarks.plan_memory import Case, random_batches, run
from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, Precision, Recompute
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.model.planner.measured import measure
from megatron_klong.train.config import OptimizerConfig
from megatron_klong.train.loss import cross_entropy
from megatron_klong.train.optimizer import make_trainable
from megatron_klong.train.step import forward_backward

# the other cases of the benchmark take minutes
CASES = [
    "small packed recompute mlp",
    pytest.param("small cp2", marks=pytest.mark.long),
    pytest.param("small tp2 etp2 packed", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", CASES)
def test_the_planned_peak_is_within_ten_percent_of_the_measured_one(tmp_path: Path, name: str) -> None:
    found = run(name, tmp_path / "case")
    worst = max(found, key=lambda one: one["peak_bytes"])
    assert worst["ratio"] == pytest.approx(1, abs=0.1)
    # a release that was noticed late, on a machine with much else to do, makes the measured peak too large by that
    assert all(one["unseen_bytes"] < 0.05 * one["peak_bytes"] for one in found)
    # what is at stake is not the weights
    assert worst["peak_bytes"] > 2 * worst["planned_held_bytes"]


@pytest.fixture
def _alone() -> Iterator[None]:
    initialize(LayoutConfig(), seed=0)
    yield
    destroy()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_recomputation_gives_the_same_gradients(precision: Precision, recompute: Recompute) -> None:
    case = Case(model={"num_nextn_predict_layers": 1}, row_tokens=96, windows=3, vocabulary=512)
    kept, again = (_gradients(case, precision, way) for way in ("none", recompute))
    assert kept.keys() == again.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []
    assert all(gradient.abs().max() > 0 for name, gradient in kept.items() if ".experts." not in name)


def _gradients(case: Case, precision: Precision, recompute: Recompute) -> dict[str, torch.Tensor]:
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)  # the same random weights
    model = build_model(case.config, LayoutConfig(), precision=precision, recompute=recompute)
    training = make_trainable([model], OptimizerConfig(), steps=1)
    forward_backward(training, random_batches(case), cross_entropy)
    return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


def test_what_is_measured_is_the_most_held_at_once_with_what_was_there_before() -> None:
    def work(held: torch.Tensor) -> None:
        first = torch.empty(1000)
        del first
        torch.empty(500)  # gone at once
        second = torch.empty(2000)
        second.sum()
        del held

    found = measure(lambda: torch.empty(250), work)
    assert (found.before_bytes, found.unseen_bytes) == (1000, 0)
    assert 9000 <= found.peak_bytes <= 9000 + 64  # the sum is a number
