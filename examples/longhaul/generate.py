"""Seeds + a number of turns -> task folders in PaperBench's layout, split into train and held-out tasks.

    <root>/papers/<task id>/  config.yaml paper.md addendum.md blacklist.txt rubric.json   as in PaperBench
                              workspace/      copied to /home/submission when an episode starts
                              checks.json judge/ longhaul.json     the judge's side, never shown to the agent
    <root>/splits/<split>.txt     the ids of a split, one per line

Always: the same arguments write the same bytes; a folder is there whole or not at all; splits draw from
disjoint seed streams, and within one call no table of settings and no salt occurs twice, in whatever split.
"""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.longhaul.experiment import LOWEST_NUMBER, NUM_NUMBERS, run_program, score
from examples.longhaul.judge_program import CHECK_PROGRAM, rubric_and_checks
from examples.longhaul.names import DATASETS, METHODS
from examples.longhaul.paper import Paper, render
from megatron_klong.files import sync_directory, write_atomically

MIN_TURNS, MAX_TURNS = 10, 1000
FEWEST_NAMES = 12  # tasks draw from the first so many methods and datasets, larger ones from as many as they need
LINES_PER_CHUNK = 50  # what one read_file_chunk of the reference oracle shows
CLOSING_TURNS = 4  # look up, report, reproduce, submit


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task before it is written. `seed` and `turns` decide all the rest."""

    seed: str
    turns: int
    salt: str
    other_salt: str
    paper: Paper

    @property
    def settings_table(self) -> frozenset[tuple[str, int]]:
        return frozenset(self.paper.methods)

    @property
    def oracle_turns(self) -> int:
        return oracle_turns(self.paper, lines_per_chunk=LINES_PER_CHUNK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How many tasks a split gets; `turns` are dealt out in turn: 8 tasks of (20, 60, 160) are 3, 3 and 2."""

    name: str
    num_tasks: int
    turns: tuple[int, ...]


def generate_task(root: Path, *, task_id: str, seed: int | str, turns: int) -> None:
    """Writes one task; its oracle takes `turns` turns (within 5 %)."""
    _write_task(root, task_id, draw_task(seed=str(seed), turns=turns))


def generate_tasks(root: Path, *, splits: Sequence[Split], seed: int) -> dict[str, tuple[str, ...]]:
    """Writes the tasks of every split and splits/<name>.txt; returns the task ids by split."""
    if len({split.name for split in splits}) != len(splits):
        raise ValueError(f"split names must differ: {', '.join(split.name for split in splits)}")
    seen: set[object] = set()
    ids: dict[str, tuple[str, ...]] = {}
    for split in splits:
        stream = _seeds(seed, split.name)
        names = []
        for index in range(split.num_tasks):
            task = _draw_unseen(stream, split.turns[index % len(split.turns)], seen)
            names.append(f"{split.name}-{index:03d}-t{task.turns}")
            _write_task(root, names[-1], task)
        ids[split.name] = tuple(names)
        write_atomically(root / "splits" / f"{split.name}.txt", "".join(f"{name}\n" for name in names))
    return ids


def draw_task(*, seed: str, turns: int) -> Task:
    """The task that a seed and a length decide."""
    key = f"{seed}/{turns}"
    rng = random.Random(key)
    salt = hashlib.sha256(f"salt {key}".encode()).hexdigest()[:12]
    num_experiments, check_reproduce = _size(turns)
    num_methods, num_datasets = _grid(num_experiments)
    numbers = range(LOWEST_NUMBER, LOWEST_NUMBER + NUM_NUMBERS)
    methods = rng.sample(METHODS[: max(FEWEST_NAMES, num_methods)], num_methods)
    datasets = tuple(rng.sample(DATASETS[: max(FEWEST_NAMES, num_datasets)], num_datasets))
    headline = rng.randrange(num_experiments)
    paper = Paper(
        methods=tuple(zip(methods, rng.sample(numbers, num_methods), strict=True)),
        datasets=datasets,
        num_experiments=num_experiments,
        headline_pair=(methods[headline % num_methods], datasets[headline // num_methods]),
        check_reproduce=check_reproduce,
    )
    candidates = (f"{salt}x{index}" for index in range(NUM_NUMBERS))
    other_salt = next(other for other in candidates if score(other, paper.headline) != score(salt, paper.headline))
    return Task(seed=seed, turns=turns, salt=salt, other_salt=other_salt, paper=paper)


def oracle_turns(paper: Paper, *, lines_per_chunk: int) -> int:
    """Assistant turns of the oracle: reading, two per experiment, closing."""
    reading = math.ceil(len(render(paper).splitlines()) / lines_per_chunk)
    return reading + 2 * paper.num_experiments + CLOSING_TURNS + paper.check_reproduce


def _size(turns: int) -> tuple[int, bool]:
    """Number of experiments, and whether reproduce.sh is tried, that bring the oracle closest to `turns`."""
    if not MIN_TURNS <= turns <= MAX_TURNS:
        raise ValueError(f"turns must lie in {MIN_TURNS}..{MAX_TURNS}, got {turns}")
    most = (turns - CLOSING_TURNS) // 2
    sizes = [(size, check) for size in range(max(1, most - 8), most + 1) for check in (False, True)]
    return min(sizes, key=lambda size: abs(_turns_of_size(*size) - turns))


def _turns_of_size(num_experiments: int, check_reproduce: bool) -> int:
    num_methods, num_datasets = _grid(num_experiments)
    paper = Paper(
        methods=tuple((name, LOWEST_NUMBER) for name in METHODS[:num_methods]),
        datasets=DATASETS[:num_datasets],
        num_experiments=num_experiments,
        headline_pair=(METHODS[0], DATASETS[0]),
        check_reproduce=check_reproduce,
    )
    return oracle_turns(paper, lines_per_chunk=LINES_PER_CHUNK)


def _grid(num_experiments: int) -> tuple[int, int]:
    """Methods x datasets, near-square, the last data set being the only one that may stay incomplete."""
    num_methods = math.ceil(math.sqrt(num_experiments))
    return num_methods, math.ceil(num_experiments / num_methods)


def _seeds(seed: int, split: str) -> Iterator[str]:
    index = 0
    while True:
        yield f"{seed}/{split}/{index}"
        index += 1


def _draw_unseen(seeds: Iterator[str], turns: int, seen: set[object]) -> Task:
    """The next task of a stream that shares neither settings nor salt with those seen; it is seen then."""
    while True:
        task = draw_task(seed=next(seeds), turns=turns)
        if task.settings_table not in seen and task.salt not in seen:
            seen |= {task.settings_table, task.salt}
            return task


def _write_task(root: Path, task_id: str, task: Task) -> None:
    folder = root / "papers" / task_id
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{task_id}.{os.getpid()}.tmp"  # outside of papers/: after a kill nobody takes it for a task
    try:
        for name, text in _files(task_id, task).items():
            write_atomically(temporary / name, text)
        (temporary / "workspace" / "run").chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(folder.parent)


def _files(task_id: str, task: Task) -> dict[str, str]:
    paper = task.paper
    rubric, checks = rubric_and_checks(paper, key=f"{task_id}/{task.seed}", other_salt=task.other_salt)
    methods, datasets = len(paper.methods), len(paper.datasets)
    facts = {
        "version": 1,
        "task_id": task_id,
        "seed": task.seed,
        "turns": task.turns,
        "oracle_turns": task.oracle_turns,
        "lines_per_chunk": LINES_PER_CHUNK,
        "salt": task.salt,
        "experiments": [asdict(experiment) for experiment in paper.experiments],
        "headline": asdict(paper.headline),
    }
    return {
        "config.yaml": f'id: {task_id}\ntitle: "Comparing {methods} methods on {datasets} datasets"\n',
        "paper.md": render(paper),
        "addendum.md": "Nothing to add.\n",
        "blacklist.txt": "none\n",
        "rubric.json": json.dumps(rubric.to_dict(), indent=4) + "\n",
        "checks.json": json.dumps(checks, indent=4) + "\n",
        "longhaul.json": json.dumps(facts, indent=4) + "\n",
        "judge/check.sh": CHECK_PROGRAM,
        "judge/run": run_program(task.salt),
        "workspace/run": run_program(task.salt),
    }
