"""Plots of training: drawn from one line as from hundreds, from zeros and around gaps; left out without data."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from megatron_klong.evaluate.canvas import Plot
from megatron_klong.evaluate.training import TrainingRun
from megatron_klong.evaluate.training_plots import iteration_endings, iteration_scores, phases, sft_loss, time_limit
from megatron_klong.evaluate.update_plots import mismatch, update_metrics
from tests.unit.evaluate.builders import iteration, rl_line, sft_line

STAGES = ["a", "quite-a-long-name-of-a-stage-that-has-no-room", "$\\frac{", "b"]


def sft(training: TrainingRun) -> Plot | None:
    return sft_loss(training, training.sft_summary())


def scores(training: TrainingRun) -> Plot | None:
    return iteration_scores(training.iteration_rows())


def ends(training: TrainingRun) -> Plot | None:
    return iteration_endings(training.iteration_rows())


def spent(training: TrainingRun) -> Plot | None:
    return phases(training.phase_seconds())


@pytest.mark.parametrize(
    ("draw", "lines"),
    [
        (sft, {"sft": [sft_line(1, loss=math.nan)]}),
        (scores, {"iterations": [iteration(mean_score=None, standard_error=None)]}),
        (ends, {"iterations": [iteration(endings={"finished": 0})]}),
        (update_metrics, {"rl": [rl_line(1, entropy=math.nan, kl=math.inf, clip_fraction=None)]}),
        (mismatch, {"rl": [rl_line(1, mismatch_max=math.nan, mismatch_absolute=None)]}),
        (spent, {"phases": [("tasks", 0.0)]}),
    ],
)
def test_without_data_nothing_is_drawn(draw: Callable[[TrainingRun], Plot | None], lines: dict[str, Any]) -> None:
    assert draw(TrainingRun()) is None
    assert draw(TrainingRun(**lines)) is None


@pytest.mark.parametrize(
    ("draw", "lines", "said"),
    [
        pytest.param(sft, {"sft": [sft_line(7)]}, "1 step: 0.5 at first, 0.5 at last", id="sft, one step"),
        pytest.param(
            sft,
            {"sft": [{"step": 1, "loss": 0.0}, {"step": 1, "loss": -1.0}]},
            "2 steps: 0 at first, -1 at last",
            id="sft, odd",
        ),
        pytest.param(
            sft,
            {"sft": [sft_line(step, loss=4 / step if step % 9 else math.nan) for step in range(1, 200)]},
            "199 steps: 4 at first, 0.0201 at last",
            id="sft, gaps",
        ),
        pytest.param(
            scores,
            {"iterations": [iteration(standard_error=None)]},
            "1 RL iteration. stage1 iteration 0: 0.450",
            id="one score",
        ),
        pytest.param(
            scores,
            {
                "iterations": [
                    iteration(STAGES[n // 40], n % 40, timeout_seconds=60.0 * n, mean_score=n / 160) for n in range(160)
                ]
            },
            "160 RL iterations. a iteration 0: 0.000; a iteration 1: 0.006",
            id="many scores",
        ),
        pytest.param(
            ends,
            {"iterations": [iteration(STAGES[n // 40], n % 40, endings={"$_x": n, "finished": 1}) for n in range(160)]},
            "160 RL iterations: 160 finished, 12,720 $ x.",
            id="many endings",
        ),
        pytest.param(
            update_metrics,
            {"rl": [rl_line(n, STAGES[n // 40], kl=-1e-9, entropy=0.0) for n in range(160)]},
            "160 RL updates: entropy from 0 to 0, 0 at last; KL to old from -1e-09",
            id="many updates",
        ),
        pytest.param(
            update_metrics,
            {"rl": [{"stage": "a", "iteration": 1, "kl": 1}]},
            "1 RL update: KL to old from 1 to 1, 1 at last.",
            id="kl only",
        ),
        pytest.param(
            mismatch,
            {"rl": [rl_line(n, mismatch_max=0.0, mismatch_absolute=0.0) for n in range(3)]},
            "largest of a token from 0 to 0, 0 at last; mean of tokens from 0 to 0",
            id="no mismatch at all",
        ),
        pytest.param(
            mismatch,
            {"rl": [rl_line(n, mismatch_max=[3.0, math.nan, math.inf][n], mismatch_absolute=1e-40) for n in range(3)]},
            "largest of a token from 3 to 3, 3 at last; mean of tokens from 1e-40",
            id="mismatch far apart",
        ),
        pytest.param(spent, {"phases": [("tasks", 0.001), ("", 0.0)]}, "tasks 0 s,  0 s", id="milliseconds"),
        pytest.param(spent, {"phases": [("sft", 9e6), ("rl" * 40, 1.0)]}, "sft 9,000,000 s", id="months"),
    ],
)
def test_a_plot_says_what_it_shows(
    draw: Callable[[TrainingRun], Plot | None], lines: dict[str, Any], said: str
) -> None:
    plot = draw(TrainingRun(**lines))
    assert plot is not None
    assert said in plot.alt
    assert all(png.startswith(b"\x89PNG") for png in (plot.light, plot.dark))


def test_zeros_are_said_to_be_at_the_edge() -> None:
    captions = []
    for least in (0.0, 1e-9):
        plot = mismatch(TrainingRun(rl=[rl_line(1, mismatch_absolute=least)]))
        assert plot is not None
        captions.append("Zeros are drawn at the lower edge." in plot.caption)
    assert captions == [True, False]


def test_time_limits_are_written_as_people_do() -> None:
    assert [time_limit(seconds) for seconds in (90, 7200.0, 0.5)] == ["1m30s", "2h", "500ms"]
