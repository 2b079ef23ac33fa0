"""Which work comes next, for every moment at which a run can be killed, and for pairs of such moments."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.config import Duration
from megatron_klong.rl.bank import BankWriter, read_contents
from megatron_klong.rl.bank_index import (
    BankContents,
    BankedEpisode,
    Consumed,
    Iteration,
    RolledBack,
    StoredFile,
    Verdict,
)
from megatron_klong.rl.config import RlConfig, StageConfig
from megatron_klong.rl.stages import Phase, PlannedRollout, Work, next_work, plan_run
from tests.unit.rl.builders import record, sampled

NO_FILE = StoredFile(path="", bytes=0, sha256="")


def stage(name: str, hours: int, **changed: int) -> StageConfig:
    fields = {"iterations": 2, "tasks_per_iteration": 1, "rollouts_per_task": 2, **changed}
    return StageConfig(name=name, timeout=Duration(f"{hours}h"), hard_timeout=Duration(f"{hours + 1}h"), **fields)


def a_run(*stages: StageConfig, seed: int = 0) -> RlConfig:
    return RlConfig(weights="w", tasks="t", stages=stages, seed=seed)


CONFIG = a_run(stage("2h", 2), stage("4h", 4))
PLAN = plan_run(CONFIG, ["rice", "fre"])
ITERATIONS = [planned.iteration for planned in PLAN]


def banked(iteration: Iteration, rollout: PlannedRollout, document: int, *, judged: bool) -> BankedEpisode:
    return BankedEpisode(
        iteration=iteration,
        document=document,
        id=f"{rollout.task}/{rollout.rollout}",
        task=rollout.task,
        rollout=rollout.rollout,
        ending="finished",
        judged=judged,
        score=None,
        windows=1,
        segments=0,
        tokens=0,
        record=NO_FILE,
        sampled=NO_FILE,
    )


class World:
    """A run in memory: the bank, the checkpoints with the iterations in their weights, an engine that kills forget."""

    def __init__(self) -> None:
        self.bank = BankContents()
        self.checkpoints: dict[int, tuple[Iteration, ...]] = {0: ()}
        self.served_step: int | None = None
        self.played: Counter[tuple[Iteration, PlannedRollout]] = Counter()

    @property
    def step(self) -> int:
        return max(self.checkpoints)

    def restart(self) -> None:
        self.served_step = None
        if any(step > self.step for step in self.bank.consumed.values()):
            self.bank = self.bank.after(RolledBack(step=self.step))

    def run(self) -> Iterator[Work]:
        """One yield after each thing that becomes durable: what a kill can separate."""
        for _ in range(100):  # phases; a run that never ends must not hang the test
            work = next_work(PLAN, self.bank, checkpoint_step=self.step, served_step=self.served_step)
            if work is None:
                return
            match work.phase:
                case Phase.REFIT:
                    self.served_step = self.step
                    yield work
                case Phase.ROLLOUT:
                    for rollout in work.rollouts:
                        assert self.served_step == self.step
                        document = len(self.bank.episodes.get(work.iteration, ()))
                        judged = rollout.rollout == 1  # the other one's verdict comes later
                        self.bank = self.bank.after(banked(work.iteration, rollout, document, judged=judged))
                        self.played[work.iteration, rollout] += 1
                        yield work
                case Phase.JUDGE:
                    for episode in work.episodes:
                        verdict = Verdict(iteration=work.iteration, document=episode.document, score=0.5)
                        self.bank = self.bank.after(verdict)
                        yield work
                case Phase.TRAIN:
                    step, weights = self.step + 1, self.checkpoints[self.step]
                    self.bank = self.bank.after(Consumed(iteration=work.iteration, step=step))
                    yield work
                    self.checkpoints[step] = (*weights, work.iteration)
                    yield work

    def run_until(self, kill_after: int) -> bool:
        """Whether it was killed before the run was complete."""
        return any(number == kill_after for number, _ in enumerate(self.run(), start=1))

    def lose_newest_checkpoint(self) -> None:
        if self.step:
            del self.checkpoints[self.step]

    def check_complete(self) -> None:
        assert self.checkpoints[self.step] == tuple(ITERATIONS)
        assert self.bank.consumed == {iteration: n for n, iteration in enumerate(ITERATIONS, start=1)}
        assert set(self.played.values()) == {1}
        assert len(self.played) == sum(len(planned.rollouts) for planned in PLAN)


STEPS = 4 * 6  # of each iteration: refit, two episodes, a verdict, marker, checkpoint


def test_an_undisturbed_run_goes_through_its_phases() -> None:
    world = World()
    phases = [(str(work.iteration), str(work.phase)) for work in world.run()]
    each = ["refit", "rollout", "rollout", "judge", "train", "train"]
    names = ["2h/iteration=0", "2h/iteration=1", "4h/iteration=0", "4h/iteration=1"]
    assert phases == [(name, phase) for name in names for phase in each]
    world.check_complete()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_kill_at_any_moment_changes_nothing_in_the_end(lost: int) -> None:
    for kill_after in range(1, STEPS):
        world = World()
        assert world.run_until(kill_after)
        for _ in range(lost):
            world.lose_newest_checkpoint()
        world.restart()
        assert not world.run_until(10**9)
        world.check_complete()


def test_two_kills_at_any_moments_change_nothing_in_the_end() -> None:
    for first in range(1, STEPS):
        for second in range(1, STEPS + 4):
            world = World()
            world.run_until(first)
            world.restart()
            world.run_until(second)
            world.lose_newest_checkpoint()
            world.restart()
            world.run_until(10**9)
            world.check_complete()


def test_after_a_kill_the_engine_is_given_its_weights_before_the_missing_episodes_are_played() -> None:
    world = World()
    assert world.run_until(2)  # refit, first episode
    world.restart()
    work = next_work(PLAN, world.bank, checkpoint_step=0, served_step=None)
    assert work == Work(iteration=ITERATIONS[0], phase=Phase.REFIT)
    work = next_work(PLAN, world.bank, checkpoint_step=0, served_step=0)
    assert work == Work(iteration=ITERATIONS[0], phase=Phase.ROLLOUT, rollouts=PLAN[0].rollouts[1:])


@pytest.mark.parametrize(
    ("checkpoint_step", "expected"), [(0, (0, Phase.TRAIN)), (1, (1, Phase.REFIT)), (2, (1, Phase.REFIT))]
)
def test_a_marker_counts_from_its_own_step_on(checkpoint_step: int, expected: tuple[int, Phase]) -> None:
    world = World()
    assert world.run_until(5)  # the marker of step 1 is written, its checkpoint is not
    work = next_work(PLAN, world.bank, checkpoint_step=checkpoint_step, served_step=0)
    assert work is not None
    assert (work.iteration, work.phase) == (ITERATIONS[expected[0]], expected[1])


def test_the_real_bank_carries_a_run_over_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Weights and engine are faked; bank and files are real. One iteration of two rollouts, killed after each step."""
    plan = PLAN[:1]
    for kill_after in range(1, 8):
        folder = tmp_path / str(kill_after)
        step, steps, lives = 0, 0, 0
        while lives < 3:
            lives += 1
            with ExitStack() as life:
                writer = life.enter_context(BankWriter(folder, checkpoint_step=step))
                while work := next_work(plan, writer.contents, checkpoint_step=step, served_step=step):
                    if work.phase is Phase.ROLLOUT:
                        rollout = work.rollouts[0]
                        given = record(rollout.task, rollout.rollout, score=None)
                        writer.add(work.iteration, given, [sampled(4, 5)], judged=False)
                    elif work.phase is Phase.JUDGE:
                        writer.add_verdict(work.episodes[0], 0.5)
                    elif work.iteration not in writer.contents.consumed:
                        writer.mark_consumed(work.iteration, step=step + 1)
                    else:
                        step += 1  # the checkpoint
                    steps += 1
                    if steps == kill_after:
                        break
        contents = read_contents(folder)
        assert next_work(plan, contents, checkpoint_step=step, served_step=None) is None
        assert (step, contents.consumed) == (1, {ITERATIONS[0]: 1})
        assert [episode.rollout for episode in contents.episodes[ITERATIONS[0]]] == [1, 2]


@given(tasks=st.integers(1, 9), per_iteration=st.integers(1, 9), iterations=st.integers(1, 12), seed=st.integers(0, 99))
def test_each_task_comes_once_before_any_comes_again(
    tasks: int, per_iteration: int, iterations: int, seed: int
) -> None:
    names = [f"task {number}" for number in range(tasks)]
    config = RlConfig(
        weights="w",
        tasks="t",
        stages=(stage("2h", 2, tasks_per_iteration=per_iteration, iterations=iterations),),
        seed=seed,
    )
    if per_iteration > tasks:
        with pytest.raises(ValueError, match=f"tasks_per_iteration {per_iteration} exceeds the {tasks} tasks"):
            plan_run(config, names)
        return
    plan = plan_run(config, names)
    assert plan == plan_run(config, names[::-1])
    counts: Counter[str] = Counter()
    for planned in plan:
        chosen = [rollout.task for rollout in planned.rollouts[::2]]
        assert len(set(chosen)) == len(chosen) == per_iteration
        counts.update(chosen)
        assert max(counts.values()) - min(counts[name] for name in names) <= 1


def test_another_seed_gives_another_order() -> None:
    names = [f"task {number}" for number in range(8)]
    plans = [plan_run(a_run(stage("2h", 2, tasks_per_iteration=8), seed=seed), names) for seed in range(3)]
    assert all(one != other for one, other in pairwise(plans))


def test_tasks_must_be_there_and_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="2 tasks of 1 names"):
        plan_run(CONFIG, ["rice", "rice"])
    with pytest.raises(ValueError, match="0 tasks"):
        plan_run(CONFIG, [])
