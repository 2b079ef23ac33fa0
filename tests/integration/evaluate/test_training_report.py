"""The report of a whole recipe: what its page says of SFT, RL and models, and what it leaves out without data."""

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.evaluate.findings import MISSING
from megatron_klong.evaluate.training import TrainingRun
from tests.integration.evaluate.builders import Page, read, record, write
from tests.unit.evaluate.builders import iteration, rl_line, sft_line

MODELS = ("untrained", "sft", "stage1", "stage2")
SCORES = {"untrained": 0.1, "sft": 0.6, "stage1": 0.7, "stage2": 0.7}
RUN = [
    record("train-1", "a-teacher", score=1.0, turns=17),
    record("heldout-1", "a-teacher", score=1.0, turns=17),
    *(
        record(f"heldout-{task}", model, score=mean + (task - 2) / 10, turns=2 + 3 * task)
        for model, mean in SCORES.items()
        for task in (1, 2, 3)
    ),
]
TRAINING: dict[str, Any] = {
    "models": MODELS,
    "sft": [sft_line(step) for step in range(1, 5)],
    "rl": [rl_line(1), rl_line(2), rl_line(3, "stage2")],
    "iterations": [iteration("stage1", 0), iteration("stage1", 1), iteration("stage2", 0, timeout_seconds=7200.0)],
    "phases": [("sft", 30.0), ("rl rollouts", 50.0), ("rl training", 10.0), ("rl rollouts", 10.0)],
}
OF_EPISODES = {"score_by_turns", "endings", "prompt_tokens", "window_composition", "windows_per_episode"}
OF_MODELS = {"heldout_scores", "prompt_tokens_models"}
OF_UPDATES = {"update_metrics", "mismatch"}
OF_ITERATIONS = {"iteration_scores", "iteration_endings"}
PLOTS = OF_EPISODES | OF_MODELS | OF_UPDATES | OF_ITERATIONS | {"sft_loss", "phases"}


def drawn(page: Path) -> set[str]:
    names = {path.stem for path in (page.parent / "plots").iterdir()}
    assert len(read(page).images) == len(names)
    return names


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole"), RUN, training=TrainingRun(**TRAINING))


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return read(report)


def test_models_are_scored_in_order_of_training_then_teachers(page: Page) -> None:
    # each model: three scores 0.1 apart, error 0.1 / sqrt 3 = 0.0577; of a difference sqrt 2 times that = 0.0816
    # turns (5 + 8 + 11) / 3 = 8; windows (2 + 2 + 3) / 3 = 2.333
    #            mean     error      n   bar  difference, in errors  turns   windows without
    own = {
        "untrained": ["0.100", "± 0.058", "3", "", MISSING, MISSING],
        "sft": ["0.600", "± 0.058", "3", "", "+0.500", "+6.1"],
        "stage1": ["0.700", "± 0.058", "3", "", "+0.600", "+7.3"],
        "stage2": ["0.700", "± 0.058", "3", "", "+0.600", "+7.3"],
    }
    start = page.rows.index(next(row for row in page.rows if row[:2] == ["policy", "split"])) + 1
    assert page.rows[start : start + 6] == [
        *([model, "held-out", *values, "8.0", "2.3", "0"] for model, values in own.items()),
        ["a-teacher", "held-out", "1.000", MISSING, "1", "", "+0.900", MISSING, "17.0", "5.0", "0"],
        ["a-teacher", "train", "1.000", MISSING, "1", "", MISSING, MISSING, "17.0", "5.0", "0"],
    ]


def test_episodes_and_seconds_keep_that_order(page: Page) -> None:
    assert [row[1] for row in page.rows_of("heldout-1")] == [*MODELS, "a-teacher"]
    seconds = [row[0] for row in page.rows if len(row) == 7 and row[0] in (*MODELS, "a-teacher")]
    assert seconds == [*MODELS, "a-teacher"]


def test_a_run_as_it_should_be_has_no_finding(page: Page) -> None:
    assert "Nothing stands out." in page.text
    assert "no metric is out of bounds" in page.text
    assert "Look at this first" not in page.text
    assert "stage1 ± 0.058, n = 3" in page.text  # the best model, though the teacher is better


def test_sft_is_summed_up(page: Page) -> None:
    # losses 4 / 2, 4 / 3, 4 / 4, 4 / 5: mean 5.1333 / 4
    assert page.rows_of("steps") == [["steps", "4"]]
    assert page.rows_of("loss of the first step") == [["loss of the first step", "2.000"]]
    assert page.rows_of("mean loss of the last 4 steps") == [["mean loss of the last 4 steps", "1.283"]]
    assert page.rows_of("tokens") == [["tokens", "4,000"]]
    assert page.rows_of("trained tokens") == [["trained tokens", "1,000"]]


def test_each_iteration_has_its_row(page: Page) -> None:
    assert "3 iterations, 24 episodes, 3 updates." in page.text
    endings = "8: 5 finished, 2 timed out, 1 sandbox failed"
    rest = ["0.450", "± 0.062", "7", "20.5", "19", "12,345", "2", endings, "3 no variance"]
    assert [row for row in page.rows if row[-1] == "3 no variance"] == [
        ["stage1", "0", "1m30s", *rest],
        ["stage1", "1", "1m30s", *rest],
        ["stage2", "0", "2h", *rest],
    ]


def test_seconds_by_phase(page: Page) -> None:
    assert page.rows_of("rl rollouts") == [["rl rollouts", "60.0", "60.0 %"]]
    start = page.rows.index(["phase", "seconds", "share"])
    assert [row[0] for row in page.rows[start + 1 : start + 5]] == ["sft", "rl rollouts", "rl training", "all"]
    assert page.rows_of("all", "100.0") == [["all", "100.0", ""]]


def test_all_plots_are_drawn_and_say_what_they_show(report: Path, page: Page) -> None:
    assert drawn(report) == PLOTS
    texts = [str(image["alt"]) for image in page.images]
    assert any("untrained: 0.100 ± 0.058, n = 3; sft: 0.600" in text for text in texts)
    assert any("Seconds by phase: sft 30 s, rl rollouts 60 s, rl training 10 s." in text for text in texts)


def test_the_same_run_gives_the_same_page(report: Path, tmp_path: Path) -> None:
    again = write(tmp_path, RUN, training=TrainingRun(**TRAINING))
    assert again.read_bytes() == report.read_bytes()


@pytest.mark.parametrize(
    ("given", "plots"),
    [
        pytest.param({}, set(), id="nothing"),
        pytest.param({"sft": TRAINING["sft"]}, {"sft_loss"}, id="sft"),
        pytest.param({"rl": TRAINING["rl"]}, OF_UPDATES, id="updates"),
        pytest.param({"rl": [{"stage": "a", "iteration": 0}]}, set(), id="updates without metrics"),
        pytest.param({"iterations": TRAINING["iterations"]}, OF_ITERATIONS, id="iterations"),
        pytest.param({"phases": TRAINING["phases"]}, {"phases"}, id="phases"),
        pytest.param({"models": ("untrained", "a-teacher")}, {"heldout_scores"}, id="models, the longest among them"),
    ],
)
def test_a_plot_without_data_is_left_out(tmp_path: Path, given: dict[str, Any], plots: set[str]) -> None:
    path = write(tmp_path, RUN, training=TrainingRun(**given))
    assert drawn(path) == OF_EPISODES | plots
    trained = bool({"sft", "rl", "iterations"} & given.keys())
    assert ("Training" in read(path).text) == trained
    if not given:
        assert path.read_bytes() == write(tmp_path / "none", RUN).read_bytes()


def test_findings_of_training_are_on_the_page_and_gaps_are_drawn_around(tmp_path: Path) -> None:
    poor = [one.model_copy(update={"score": 0.1}) if one.model == "sft" else one for one in RUN]
    lines = [rl_line(1, mismatch_max=2e-4), rl_line(2, kl=math.nan, entropy=math.inf)]
    path = write(tmp_path, poor, training=TrainingRun(**TRAINING | {"rl": lines}))
    text = read(path).text
    assert "Defect: RL: kl is not finite once, first at stage1 iteration 0, update 2." in text
    assert "sft does not beat untrained by 3 standard errors" in text
    assert "mismatch_max is above 0.0001 in 1 of 2 updates, at most 0.0002" in text
    assert "Nothing stands out" not in text
    assert drawn(path) == PLOTS


def test_a_long_table_of_iterations_is_folded(tmp_path: Path) -> None:
    page = read(write(tmp_path, RUN[:1], training=TrainingRun(iterations=[iteration(number=n) for n in range(62)])))
    assert page.tags.count("details") == 1
    assert "2 more iterations" in page.text
    assert [row[1] for row in page.rows_of("stage1")] == [str(number) for number in range(62)]


def test_text_from_outside_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('1')<img src=x> $\\frac{"
    given = {
        "models": (evil, "sft"),
        "rl": [rl_line(1, evil, **{evil: math.nan})],
        "iterations": [iteration(evil, endings={evil: 1}, left_out={evil: 1})],
        "phases": [(evil, 1.0)],
    }
    played = [record(f"heldout-{number}", evil.replace("/", ""), score=0.5) for number in (1, 2)]
    path = write(tmp_path, played, training=TrainingRun(**given))
    page = read(path)
    assert "script" not in page.tags
    assert len(page.images) == len(drawn(path))
    assert page.text.count(evil) >= 8


def test_the_longest_episode_may_be_any_record(tmp_path: Path) -> None:
    """One the shard was not cut from, and one that does not say under which policy it ran."""
    played = [record("heldout-1", "sft", score=0.5, turns=14, context=None), *RUN[2:6]]
    path = write(tmp_path, played, training=TrainingRun(models=MODELS))
    (plot,) = (image for image in read(path).images if str(image["alt"]).startswith("Tokens of the prompt"))
    # windows of four turns, from 100 tokens up by 60 a turn
    assert plot["alt"] == (
        "Tokens of the prompt at each of 14 turns of heldout-1/sft/1: between 100 and 280, in 4 windows."
    )
    assert "pinned prefix is not drawn" in read(path).text
