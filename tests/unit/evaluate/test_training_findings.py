"""A finding stands on the page exactly where there is one to make."""

import math
from collections.abc import Sequence
from typing import get_type_hints

import pytest

from megatron_klong.evaluate.findings import headlines
from megatron_klong.evaluate.summary import TRAIN, ScoreRow, TokenAccount
from megatron_klong.evaluate.training import TrainingRun
from megatron_klong.evaluate.training_findings import MISMATCH_LIMIT, training_findings
from tests.unit.evaluate.builders import iteration, rl_line, score_row, sft_line

MODELS = ("untrained", "sft", "stage1")
GOOD = [score_row("untrained", 0.0), score_row("sft", 0.5), score_row("stage1", 0.6), score_row("oracle", 1.0, 0.0)]


def texts(training: TrainingRun, scores: Sequence[ScoreRow] = GOOD) -> list[str]:
    return [finding.text for finding in training_findings(training, scores)]


def of_scores(*scores: ScoreRow) -> list[str]:
    return texts(TrainingRun(models=tuple(row.policy for row in scores)), scores)


def test_a_good_run_has_no_finding() -> None:
    training = TrainingRun(
        models=MODELS,
        sft=[sft_line(1)],
        rl=[rl_line(1, mismatch_max=MISMATCH_LIMIT)],
        iterations=[iteration(), iteration(mean_score=None, standard_error=None, scored=0)],
    )
    assert texts(training) == []
    assert texts(TrainingRun(), []) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        pytest.param((0.0, 0.03), (0.16, 0.04), None, id="3.2: the error is 0.05"),
        pytest.param(
            (0.0, 0.03), (0.125, 0.04), "held-out mean 0.125 against 0.000, a difference of +0.125 (2.5 stan", id="2.5"
        ),
        pytest.param((0.5, 0.03), (0.25, 0.04), "a difference of -0.250 (-5.0 standard errors)", id="worse"),
        pytest.param((0.0, 0.0), (0.01, 0.0), None, id="better, both without spread"),
        pytest.param((0.0, 0.0), (0.0, 0.0), "a difference of +0.000 (without spread)", id="equal, without spread"),
    ],
)
def test_sft_has_to_beat_the_untrained_model(
    before: tuple[float, float], after: tuple[float, float], said: str | None
) -> None:
    found = of_scores(score_row("untrained", *before), score_row("sft", *after))
    if said is None:
        assert found == []
    else:
        (text,) = found
        assert text.startswith("sft does not beat untrained by 3 standard errors: ")
        assert said in text


def test_two_episodes_are_needed_to_tell() -> None:
    found = of_scores(score_row("untrained", 0.0), score_row("sft", 0.9, None, scored=1))
    assert found == [
        "Whether sft beats untrained cannot be told: untrained has 3 scored held-out episodes and sft has 1 scored "
        "held-out episode."
    ]


def test_a_stage_below_the_one_before_is_named() -> None:
    found = of_scores(*GOOD[:3], score_row("stage2", 0.55, 0.0))
    assert found == [
        "stage2 is below stage1, the model before it: held-out mean 0.550 against 0.600, a difference of -0.050 "
        "(-0.5 standard errors)."
    ]
    assert of_scores(*GOOD[:3], score_row("stage2", 0.6)) == []


def test_a_model_without_a_score_is_named_and_only_held_out_scores_count() -> None:
    nothing = of_scores(score_row("untrained", None, None), score_row("sft", 0.5))
    assert nothing == ["No held-out episode of untrained has a score."]
    trained = of_scores(*GOOD[:2], score_row("stage1", 0.9, split=TRAIN))
    assert trained == ["No held-out episode of stage1 has a score."]


def test_trainer_and_engine_apart() -> None:
    lines = [rl_line(1), rl_line(2, mismatch_max=2e-4), rl_line(3, "stage2", 1, mismatch_max=3.14e-3)]
    assert texts(TrainingRun(rl=lines)) == [
        "Trainer and engine disagree: mismatch_max is above 0.0001 in 2 of 3 updates, at most 0.0031 "
        "(stage2 iteration 1, update 3)."
    ]
    unknown = {name: value for name, value in rl_line(1).items() if name != "mismatch_max"}
    assert texts(TrainingRun(rl=[unknown, rl_line(2)])) == [
        "1 RL update without mismatch_max: trainer and engine not compared."
    ]


def test_what_is_not_finite_is_a_defect_and_said_once_a_metric() -> None:
    training = TrainingRun(
        sft=[sft_line(1), sft_line(2, loss=math.nan), sft_line(3, loss=math.nan)],
        rl=[rl_line(1, mismatch_max=math.inf)],
    )
    found = training_findings(training, [])
    assert all(finding.defect for finding in found)
    assert [finding.text for finding in found] == [
        "SFT: loss is not finite 2 times, first at step 2.",
        "RL: mismatch_max is not finite once, first at stage1 iteration 0, update 1.",
    ]


def test_the_best_model_is_named_before_a_better_teacher() -> None:
    counts = [name for name, kind in get_type_hints(TokenAccount).items() if kind is int]
    nothing = TokenAccount(
        **dict.fromkeys(counts, 0),
        dropped={},
        refusals=(),
        ends={},
    )
    best = {models: headlines([], GOOD, nothing, models)[1] for models in (MODELS, ())}
    assert (best[MODELS].value, best[MODELS].note) == ("0.600", "stage1 ± 0.100, n = 3")
    assert (best[()].value, best[()].note) == ("1.000", "oracle ± 0.000, n = 3")
    unscored = [score_row("untrained", None, None), GOOD[3]]
    assert headlines([], unscored, nothing, MODELS)[1].value == "1.000"
