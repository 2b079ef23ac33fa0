"""What a report takes of a training run, with its numbers computed by hand, and what it refuses."""

import math
from typing import Any

import pytest

from megatron_klong.evaluate.summary import Difference, difference, policies
from megatron_klong.evaluate.training import SftSummary, TrainingRun, numbers, spans
from tests.unit.evaluate.builders import iteration, rl_line, score_row, sft_line


def without(line: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != name}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"sft": [sft_line(1), without(sft_line(2), "loss")]},
            r"sft\[1\] of the training run has no 'loss'; it has s",
        ),
        ({"rl": [without(rl_line(1), "stage")]}, r"rl\[0\] of the training run has no 'stage'"),
        ({"iterations": [without(iteration(), "left_out")]}, r"iterations\[0\] of the training run has no 'left_out'"),
        ({"models": ("sft", "sft")}, "names one twice"),
        ({"phases": [("sft", math.nan)]}, "phase 'sft' took nan seconds"),
        ({"phases": [("sft", -1.0)]}, "phase 'sft' took -1.0 seconds"),
    ],
)
def test_what_cannot_be_shown_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingRun(**given)


def test_sft_comes_to() -> None:
    losses = [9.0, 5.0, *range(10, 0, -1)]
    lines = [sft_line(step, loss=loss, tokens_per_second=100.0 * step) for step, loss in enumerate(losses, start=1)]
    # the last ten are 10 to 1: mean 5.5; the median of 100 to 1200 is 650
    assert TrainingRun(sft=lines).sft_summary() == SftSummary(
        steps=12,
        tokens=12_000,
        trained_tokens=3_000,
        seconds=6.0,
        tokens_per_second=650.0,
        first_loss=9.0,
        last_loss=5.5,
        last_steps=10,
    )
    assert TrainingRun().sft_summary() is None
    only = TrainingRun(sft=[{"step": 1, "loss": math.nan}]).sft_summary()
    assert only is not None
    assert (only.first_loss, only.last_loss, only.tokens) == (None, None, 0)


def test_iterations_are_numbered_through_all_stages() -> None:
    rows = TrainingRun(iterations=[iteration("a", 0), iteration("a", 1), iteration("b", 0, more=1)]).iteration_rows()
    assert [(row.number, row.stage, row.iteration) for row in rows] == [(1, "a", 0), (2, "a", 1), (3, "b", 0)]


def test_phases_of_one_name_are_added_up() -> None:
    phases = [("sft", 1.5), ("rollouts", 2.0), ("training", 3.0), ("rollouts", 4.0)]
    assert list(TrainingRun(phases=phases).phase_seconds().items()) == [
        ("sft", 1.5),
        ("rollouts", 6.0),
        ("training", 3.0),
    ]


def test_a_number_that_is_not_finite_is_found_wherever_it_is() -> None:
    training = TrainingRun(
        sft=[sft_line(1), sft_line(2, grad_norm=math.inf)],
        rl=[rl_line(1, importance_weight=math.nan), rl_line(2, entropy=None)],
        iterations=[iteration(mean_score=None), iteration("stage2", 3, standard_error=math.nan)],
    )
    assert list(training.not_finite()) == [
        ("SFT", "grad_norm", "step 2"),
        ("RL", "importance_weight", "stage1 iteration 0, update 1"),
        ("RL iterations", "standard_error", "stage2 iteration 3"),
    ]


def test_what_is_absent_is_a_gap_and_never_zero() -> None:
    values = numbers([{"kl": 0}, {}, {"kl": None}, {"kl": math.inf}, {"kl": 0.5}], "kl")
    assert [None if math.isnan(value) else value for value in values] == [0.0, None, None, None, 0.5]


def test_spans() -> None:
    assert spans(["a", "a", "b", "a"]) == [("a", 1, 2), ("b", 3, 3), ("a", 4, 4)]
    assert spans([]) == []


def test_models_come_before_teachers_in_order_of_training() -> None:
    assert policies(["z", "sft", "a", "untrained", "sft"], ("untrained", "sft", "stage1")) == [
        "untrained",
        "sft",
        "a",
        "z",
    ]


def test_the_difference_of_two_means() -> None:
    # error sqrt(0.03^2 + 0.04^2) = 0.05
    change = difference(score_row("b", 0.5, 0.03), score_row("a", 0.3, 0.04))
    assert (change.value, change.error) == pytest.approx((0.2, 0.05))
    assert change.errors == pytest.approx(4.0)
    assert difference(score_row("b", 0.5, None), score_row("a", 0.25, 0.1)) == Difference(value=0.25, error=None)
    assert difference(score_row("b", 0.5, 0.0), score_row("a", 0.25, 0.0)).errors is None
