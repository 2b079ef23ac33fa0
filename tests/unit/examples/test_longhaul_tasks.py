"""The task generator: names are apart, the dial holds, folders are complete, splits share nothing."""

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.longhaul.experiment import Experiment, posix_cksum, score
from examples.longhaul.generate import Split, Task, draw_task, generate_task, generate_tasks
from examples.longhaul.make_tasks import main
from examples.longhaul.names import DATASETS, METHODS
from examples.longhaul.paper import parse, render
from examples.longhaul.simulated import play
from examples.longhaul.teachers import oracle
from megatron_klong.judge.checks import load_programmatic_rubric
from megatron_klong.judge.rubric import LeafScore, grade
from tests.conftest import REPOSITORY

FILES = {
    *("config.yaml", "paper.md", "addendum.md", "blacklist.txt", "rubric.json"),
    *("checks.json", "longhaul.json", "judge/check.sh", "judge/run", "workspace/run"),
}
lengths = st.integers(10, 1000)
tasks = st.builds(draw_task, seed=st.integers(0, 50).map(str), turns=lengths)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_names_are_easily_told_apart() -> None:
    names = METHODS + DATASETS
    assert (len(METHODS), len(DATASETS), len(set(names))) == (64, 64, 128)
    assert len({name[:3] for name in names}) == 128
    assert not [(one, other) for one, other in combinations(names, 2) if one in other or other in one]
    language = re.findall("[a-z]+", render(draw_task(seed="0", turns=10).paper).lower())
    assert not set(language) & set(names) - set(draw_task(seed="0", turns=10).paper.datasets) - {
        method for method, _ in draw_task(seed="0", turns=10).paper.methods
    }


def test_cksum_agrees_with_posix() -> None:
    # the check values of CRC-32/CKSUM, as printed by `cksum`
    assert posix_cksum(b"") == 4294967295
    assert posix_cksum(b"123456789") == 930766865


@given(st.text("abcdef0123456789", min_size=1), st.sampled_from(METHODS), st.sampled_from(DATASETS))
def test_each_setting_gives_another_two_digit_score(salt: str, method: str, dataset: str) -> None:
    numbers = range(10, 35)
    scores = {score(salt, Experiment(method=method, setting=setting, dataset=dataset)) for setting in numbers}
    assert scores == set(numbers)


@given(tasks)
def test_a_paper_is_short_and_says_all_there_is(task: Task) -> None:
    paper, text = task.paper, render(task.paper)
    lines = text.splitlines()
    assert parse(lines) == paper
    assert len(lines) - len(paper.methods) - len(paper.datasets) <= 25
    assert max(len(line.split()) for line in lines) <= 12
    assert "  " not in text
    assert len({setting for _, setting in paper.methods}) == len(paper.methods)


def test_experiments_go_dataset_by_dataset_up_to_the_last_one() -> None:
    paper = draw_task(seed="7", turns=30).paper
    (a, b, c, d), (x, y, z) = [name for name, _ in paper.methods], paper.datasets
    assert paper.num_experiments == 12
    assert [e.pair for e in paper.experiments] == [(m, s) for s in (x, y, z) for m in (a, b, c, d)]
    assert f"the last one is {d} on {z}." in render(paper)


@given(tasks)
def test_the_dial_is_within_five_percent(task: Task) -> None:
    assert abs(task.oracle_turns - task.turns) <= 0.05 * task.turns
    assert abs(len(task.paper.methods) - len(task.paper.datasets)) <= 1
    assert score(task.other_salt, task.paper.headline) != score(task.salt, task.paper.headline)


@pytest.mark.parametrize("turns", [10, 30, 100, 300, 1000])
def test_the_oracle_takes_the_turns_that_were_asked_for(turns: int, tmp_path: Path) -> None:
    generate_task(tmp_path, task_id="one", seed=3, turns=turns)
    episode = play(tmp_path / "papers/one", oracle())
    assert episode.submitted
    assert episode.num_turns == turns
    assert json.loads((tmp_path / "papers/one/longhaul.json").read_text())["oracle_turns"] == turns


@pytest.mark.parametrize("turns", [9, 1001])
def test_other_lengths_are_refused(turns: int) -> None:
    with pytest.raises(ValueError, match=rf"turns must lie in 10\.\.1000, got {turns}"):
        draw_task(seed="0", turns=turns)


def test_a_task_folder_is_complete_and_keeps_the_judges_side_apart(tmp_path: Path) -> None:
    generate_task(tmp_path, task_id="one", seed=1, turns=30)
    folder = tmp_path / "papers/one"
    assert set(contents(folder)) == FILES
    assert (folder / "config.yaml").read_text() == 'id: one\ntitle: "Comparing 4 methods on 3 datasets"\n'
    assert (folder / "blacklist.txt").read_text() == "none\n"
    assert (folder / "workspace/run").stat().st_mode & 0o777 == 0o755
    assert (folder / "workspace/run").read_bytes() == (folder / "judge/run").read_bytes()


def test_the_rubric_has_a_check_for_each_experiment_and_four_more(tmp_path: Path) -> None:
    generate_task(tmp_path, task_id="one", seed=1, turns=30)
    task = load_programmatic_rubric(tmp_path / "papers/one")
    leaves = task.root.leaves()
    categories = [leaf.task_category for leaf in leaves.values()]
    assert {name: categories.count(name) for name in categories} == {
        "Code Development": 2,
        "Code Execution": 12,
        "Result Analysis": 2,
    }
    assert [task.check_of(leaf).runs_submission for leaf in leaves.values()] == [True, True, *[False] * 14]
    # weights 1 : 3 : 1, each of the 12 experiments the same: 3/5/12 = 0.05
    one = {path: LeafScore(score=int(path == "0.1.2.3"), explanation="") for path in leaves}
    assert grade(task.root, one).score == pytest.approx(0.05)


def test_experiments_count_the_same_although_the_last_dataset_has_fewer(tmp_path: Path) -> None:
    generate_task(tmp_path, task_id="one", seed=1, turns=20)  # 7 experiments: 3 + 3 + 1
    root = load_programmatic_rubric(tmp_path / "papers/one").root
    assert [len(dataset.sub_tasks) for dataset in root.sub_tasks[1].sub_tasks] == [3, 3, 1]
    for path in [path for path in root.leaves() if path.startswith("0.1")]:
        scores = {other: LeafScore(score=int(other == path), explanation="") for other in root.leaves()}
        assert grade(root, scores).score == pytest.approx(3 / 5 / 7)


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    splits = [
        Split(name="train", num_tasks=3, turns=(10, 20)),
        Split(name="heldout", num_tasks=2, turns=(30,)),
    ]
    for run in ("one", "two"):
        ids = generate_tasks(tmp_path / run, splits=splits, seed=5)
    generate_tasks(tmp_path / "other", splits=splits, seed=6)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert ids == {
        "train": ("train-000-t10", "train-001-t20", "train-002-t10"),
        "heldout": ("heldout-000-t30", "heldout-001-t30"),
    }
    assert (tmp_path / "one/splits/train.txt").read_text() == "train-000-t10\ntrain-001-t20\ntrain-002-t10\n"
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one if name.endswith(("paper.md", "run")))


def test_splits_share_no_settings_no_salt_and_no_seed(tmp_path: Path) -> None:
    # 400 tasks of ten turns: two methods each, so that equal settings are likeliest
    splits = [
        Split(name="train", num_tasks=200, turns=(10,)),
        Split(name="heldout", num_tasks=200, turns=(10,)),
    ]
    generate_tasks(tmp_path, splits=splits, seed=0)
    facts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("papers/*/longhaul.json"))]
    tables = [frozenset((e["method"], e["setting"]) for e in task["experiments"]) for task in facts]
    assert len(facts) == len(set(tables)) == 400
    assert len({task["salt"] for task in facts}) == 400
    assert {task["seed"].split("/")[1] for task in facts if task["task_id"].startswith("train")} == {"train"}
    assert len({task["seed"] for task in facts}) == 400


def test_a_task_that_was_drawn_before_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Both streams are made to begin with the same three seeds.
    monkeypatch.setattr("examples.longhaul.generate._seeds", lambda seed, split: iter(["a", "b", "c"]))
    splits = [Split(name="train", num_tasks=2, turns=(10,)), Split(name="heldout", num_tasks=1, turns=(10,))]
    generate_tasks(tmp_path, splits=splits, seed=0)
    facts = json.loads((tmp_path / "papers/heldout-000-t10/longhaul.json").read_text())
    assert facts["seed"] == "c"


def test_an_existing_task_is_not_overwritten(tmp_path: Path) -> None:
    generate_task(tmp_path, task_id="one", seed=1, turns=10)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="one exists; remove it"):
        generate_task(tmp_path, task_id="one", seed=2, turns=10)
    assert contents(tmp_path) == before


def test_a_killed_generator_leaves_no_half_task(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from examples.longhaul.generate import generate_task as g\n"
    code += "for i in range(999): g(Path(sys.argv[1]), task_id=f't{i}', seed=i, turns=100)"
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    while len(list(tmp_path.glob("papers/*"))) < 3 or not list(tmp_path.glob(".t*.tmp")):
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    folders = list((tmp_path / "papers").iterdir())
    assert len(folders) >= 3
    assert all(set(contents(folder)) == FILES for folder in folders)
    next_one = f"t{len(folders)}"
    generate_task(tmp_path, task_id=next_one, seed=0, turns=10)
    assert set(contents(tmp_path / "papers" / next_one)) == FILES


def test_the_command_line_makes_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--train", "3", "--heldout", "2", "--turns", "10,20", "--seed", "4"])
    assert capsys.readouterr().out.splitlines() == [
        f"train: 3 tasks, listed in {tmp_path}/splits/train.txt",
        f"heldout: 2 tasks, listed in {tmp_path}/splits/heldout.txt",
    ]
    assert len(list(tmp_path.glob("papers/*/config.yaml"))) == 5


def test_generator_and_teachers_do_not_import_torch() -> None:
    modules = "examples.longhaul.make_tasks, examples.longhaul.serve_teachers, megatron_klong.judge.grading"
    code = f"import {modules}, sys; print({{'torch', 'transformers', 'inspect_ai'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_names_and_numbers_are_single_tokens_of_a_small_vocabulary(tmp_path: Path) -> None:
    # 256 bytes, 128 names, 25 numbers and the words of the language need about 1,100 tokens. A few tasks do
    # not contain all names, and held-out tasks must not be read: hence the list of words beside the texts.
    tokenizers = pytest.importorskip("tokenizers")
    generate_tasks(tmp_path, splits=[Split(name="train", num_tasks=8, turns=(60, 160))], seed=0)
    texts = [
        f"{message['content']} {message.get('reasoning_content')} {json.dumps(message.get('tool_calls'))}"
        for folder in sorted((tmp_path / "papers").iterdir())
        for message in play(folder, oracle()).messages
    ]
    words = [f" {word}" for word in (*METHODS, *DATASETS, *range(10, 35))]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([*texts, *words * 20], vocab_size=1152, show_progress=False)
    assert [word for word in words if len(tokenizer.encode(word).ids) != 1] == []
