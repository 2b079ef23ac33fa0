"""An update by a gradient that is no number, or a spike, is not made: everything is as if its batch had never come."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_klong.data.batch import PackedBatch
from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.model.presets import tiny
from megatron_klong.train.config import OptimizerConfig
from megatron_klong.train.loss import LossInput, LossOutput, cross_entropy
from megatron_klong.train.optimizer import Training, make_trainable
from megatron_klong.train.step import TrainingDiverged, train_step
from tests.unit.train.builders import mixture_of, small_shard

SPIKE = OptimizerConfig(spike_factor=10.0, max_skipped_steps=1, schedule="constant")


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[PackedBatch]:
    blend = mixture_of(small_shard(tmp_path_factory.mktemp("shard") / "sft")).train
    return blend.batches(blend.rows_of(0)[:2], part=0, parts=1)


@pytest.fixture
def training() -> Iterator[Training]:
    initialize(LayoutConfig(), seed=3)
    yield make_trainable([build_model(tiny(320), LayoutConfig())], SPIKE, steps=100)
    destroy()


def times(factor: float, given: LossInput) -> LossOutput:
    output = cross_entropy(given)
    return LossOutput(loss_sum=output.loss_sum * factor, trained_tokens=output.trained_tokens)


def everything(training: Training) -> dict[str, torch.Tensor]:
    """Weights, biases of the routers, and Adam's state."""
    found = {
        name: tensor.detach().clone() for name, tensor in training.chunks[0].state_dict().items() if tensor is not None
    }
    for number, optimizer in enumerate(training.optimizer.chained_optimizers):
        states: dict[Any, dict[str, torch.Tensor]] = optimizer.optimizer.state
        for place, state in enumerate(states.values()):
            found |= {f"{number}.{place}.{name}": value.clone() for name, value in state.items()}
    return found


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_spike_and_a_gradient_without_a_number_leave_everything_as_it_was(
    training: Training, batches: list[PackedBatch]
) -> None:
    for _ in range(17):
        made = train_step(training, batches, cross_entropy)
    assert not made.skipped
    for factor in (1000.0, float("nan")):
        before = everything(training)
        skipped = train_step(training, batches, lambda given, factor=factor: times(factor, given))
        assert skipped.skipped
        assert moved(before, everything(training)) == set()
        made = train_step(training, batches, cross_entropy)
        assert not made.skipped
        changed = moved(before, everything(training))
        assert any(name.endswith("expert_bias") for name in changed)
        assert any("exp_avg" in name for name in changed)
    assert made.skipped_steps == 2
    assert training.schedule.num_steps == 21  # the schedule went on


def test_one_more_in_a_row_than_may_be_is_the_end(training: Training, batches: list[PackedBatch]) -> None:
    assert train_step(training, batches, lambda given: times(float("nan"), given)).skipped
    with pytest.raises(TrainingDiverged, match=r"step 2 diverged: loss nan, gradient norm nan, .* 2 steps skipped"):
        train_step(training, batches, lambda given: times(float("nan"), given))
