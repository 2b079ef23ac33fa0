"""The ablation end to end with a budget that teaches nothing: real shards, the real SFT program, real scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.longhaul.ablation.losses import answers, fact_ids, late_windows
from examples.longhaul.ablation.runs import budget
from megatron_klong.data.shard import Shard
from megatron_klong.trajectory.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY

STEPS = 3
VARIANTS = ("split", "no_prefix")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ablation")
    command = [sys.executable, "benchmarks/split_ablation.py", "--variants", *VARIANTS, "--seeds", "1"]
    command += [
        "--steps",
        str(STEPS),
        "--train",
        "40",
        "--heldout",
        "2",
        "--keep",
        str(made),
        "--results",
        str(made / "results"),
    ]
    run = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (made / "printed.txt").write_text(run.stdout)
    return made


def test_every_variant_has_the_same_budget(folder: Path) -> None:
    budgets = [budget(folder / "runs" / f"{variant}-1") for variant in VARIANTS]
    assert [found.steps for found in budgets] == [STEPS, STEPS]
    tokens = [found.tokens for found in budgets]
    assert max(tokens) < 1.25 * min(tokens), tokens  # the rest of each row is padding
    assert budgets[0].trained_tokens < budgets[1].trained_tokens  # context is paid for
    settings = [(folder / "runs" / f"{variant}-1" / "sft.toml").read_text() for variant in VARIANTS]
    shared = [
        [line for line in text.splitlines() if not line.startswith(("run_folder", "shards", "    "))]
        for text in settings
    ]
    assert shared[0] == shared[1]


def test_late_answers_of_the_paper_are_absent_only_without_the_prefix(folder: Path) -> None:
    facts = fact_ids(load_tokenizer(folder / "tokenizer"))
    for variant, absent in (("split", False), ("no_prefix", True)):
        shard = Shard(folder / "shards" / f"{variant}-1")
        places = [answer.place for window in late_windows(shard) for answer in answers(shard, window, facts)]
        assert ("absent" in places) == absent
        assert ("prefix" in places) != absent


def test_the_figures_say_what_the_table_shows(folder: Path) -> None:
    printed = (folder / "printed.txt").read_text().splitlines()
    written = json.loads((folder / "results" / "split_ablation.json").read_text())
    assert json.loads(printed[-1]) == {name: written[name] for name in ("benchmark", "ratios", "versions")}
    assert printed[:-1] == (folder / "results" / "split_ablation.txt").read_text().splitlines()
    assert [run["variant"] for run in written["runs"]] == list(VARIANTS)
    split, bare = (run["scores"] for run in written["runs"])
    assert split["late"]["tokens"] == bare["late"]["tokens"] > split["prefix"]["tokens"] > 0
    assert written["ratios"]["late_over_split"]["no_prefix"] == pytest.approx(
        bare["late"]["loss"] / split["late"]["loss"], abs=1e-4
    )
    # three steps teach nothing: an answer is a guess among all ids
    assert split["prefix"]["loss"] > 2
