"""`python -m megatron_klong.rl`, killed where it hurts, and continued."""

import asyncio
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klong.rl.bank import read_sampled
from megatron_klong.rl.experience import read_lesson
from megatron_klong.sandbox.bubblewrap import SandboxUnavailable, check_available
from tests.integration.rl.small_run import SmallRun, make_run, processes_of


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> None:
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_run(tmp_path_factory.mktemp("rl"))


def kill_when(process: "subprocess.Popen[str]", condition: Callable[[], bool], seconds: float = 240) -> None:
    """SIGKILL the loop alone, as soon as the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()


def assert_nothing_is_left(folder: Path, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.long
def test_killed_in_rollouts_and_in_training_it_loses_nothing_and_trains_nothing_twice(run: SmallRun) -> None:
    # 1. killed once some episodes of the first iteration are in the bank
    process = run.start("--stage", "1")
    kill_when(process, lambda: 2 <= sum(map(len, run.contents.episodes.values())) < 8)
    assert_nothing_is_left(run.path)
    banked = files_of(run.folder.bank / "episodes")
    (iteration,) = run.contents.episodes
    before = run.contents.episodes[iteration]
    assert 2 <= len(before) < 8

    # 2. continued, and killed between the two updates and the checkpoint
    process = run.start("--stage", "1")
    kill_when(process, lambda: len(run.metrics) >= 1)
    assert_nothing_is_left(run.path)
    first_try = run.metrics[0]
    assert not list(run.folder.checkpoints.glob("step_*"))
    assert run.contents.consumed == {iteration: 2}  # marked before the checkpoint that never came
    episodes = run.contents.episodes[iteration]
    assert episodes[: len(before)] == before
    assert sorted((episode.task, episode.rollout) for episode in episodes) == sorted(
        (task, rollout) for task in {episode.task for episode in episodes} for rollout in range(1, 5)
    )
    assert len(episodes) == 8
    banked_all = files_of(run.folder.bank / "episodes")
    assert {name: banked_all[name] for name in banked} == banked

    # 3. continued to the end of the stage: no episode is played again, the rolled-back update is made anew, once
    output, _ = (process := run.start("--stage", "1")).communicate(timeout=240)
    assert process.returncode == 0, output
    assert "rollout" not in output
    assert files_of(run.folder.bank / "episodes") == banked_all
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert run.metrics[0]["loss"] == first_try["loss"]
    assert run.metrics[0]["grad_norm"] == first_try["grad_norm"]
    assert [path.name for path in run.folder.checkpoints.glob("step_*")] == ["step_00000002"]
    assert run.contents.in_weights(iteration, 2)

    # 4. the second stage goes on from there, and a finished run has nothing to do
    output, _ = (process := run.start()).communicate(timeout=240)
    assert process.returncode == 0, output
    assert "short/iteration=0" not in output
    assert [line["step"] for line in run.metrics] == [1, 2, 3], output
    started = time.monotonic()
    output, _ = (process := run.start()).communicate(timeout=60)
    assert process.returncode == 0, output
    assert time.monotonic() - started < 60
    assert "rollout" not in output
    assert_nothing_is_left(run.path)


@pytest.mark.long
def test_what_was_trained_is_what_was_sampled(run: SmallRun) -> None:
    """After the test above: every trained token of the run, at the temperature it was sampled at."""
    assert len(run.metrics) == 3
    assert all(line["mismatch_max"] < 1e-4 for line in run.metrics), run.metrics
    assert all(line["trained_tokens"] > 0 for line in run.metrics)
    sampled = sum(
        len(segment.ids)
        for episodes in run.contents.episodes.values()
        for episode in episodes
        for segment in read_sampled(run.folder.bank, episode)
    )
    lessons = [read_lesson(folder) for folder in run.folder.lessons()]
    assert [lesson.last_step for lesson in lessons] == [2, 3]
    assert sum(lesson.trained_tokens for lesson in lessons) <= sampled
    assert sum(line["trained_tokens"] for line in run.metrics) == sum(lesson.trained_tokens for lesson in lessons)
    weights = sorted(path.name for path in (run.folder.path / "weights").glob("step_*"))
    assert weights == ["step_00000002", "step_00000003"]
    assert (run.folder.weights(3) / "tokenizer.json").is_file()
    for iteration, episodes in run.contents.episodes.items():
        epochs = {epoch for episode in episodes for s in read_sampled(run.folder.bank, episode) for epoch in s.epochs}
        assert epochs == {0 if iteration.stage == "short" else 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stage", "3"), "there are short, long, or 1 to 2"),
        (("--tasks", "/nowhere"), "/nowhere: no such folder of tasks"),
        (("--launcher", "slurm"), "sbatch slurm/rl_stage.sh"),
        (("--engine.max_sequence_length", "500"), "engine.max_sequence_length 500 is less than"),
        (("--trainer.layout.tensor_parallel", "4"), "2 processes are no multiple of"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(
    tmp_path: Path, run: SmallRun, flags: tuple[str, ...], message: str
) -> None:
    output, _ = (process := run.start("--run_folder", str(tmp_path / "run"), *flags)).communicate(timeout=120)
    assert process.returncode == 2, output
    assert message in output
    assert_nothing_is_left(tmp_path)


def test_the_second_stage_waits_for_the_first(tmp_path: Path, run: SmallRun) -> None:
    process = run.start("--run_folder", str(tmp_path / "run"), "--stage", "long")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "short/iteration=0, which comes before it, is not finished" in output
