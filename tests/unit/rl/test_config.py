"""The configuration of RL: what is refused, and that the refusal holds both values."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klong.agent.ending import Ending
from megatron_klong.config import ConfigError, Duration, load_config, resolved_toml
from megatron_klong.rl.config import RlConfig
from tests.conftest import REPOSITORY

STAGE = """
[[stages]]
name = "{name}"
timeout = "{timeout}"
hard_timeout = "{hard}"
iterations = 2
tasks_per_iteration = 4
"""


def load(tmp_path: Path, *stages: tuple[str, str, str], more: str = "", overrides: tuple[str, ...] = ()) -> RlConfig:
    file = tmp_path / "rl.toml"
    text = [STAGE.format(name=name, timeout=timeout, hard=hard) for name, timeout, hard in stages]
    file.write_text('weights = "w"\ntasks = "t"\n' + "".join(text) + more)
    return load_config(RlConfig, [file], overrides)


def test_the_published_curriculum_is_accepted_and_its_resolved_file_is_equal(tmp_path: Path) -> None:
    config = load(tmp_path, ("2h", "2h", "2h30m"), ("4h", "4h", "4h30m"), ("6h", "6h", "6h30m"))
    assert [str(stage.timeout) for stage in config.stages] == ["2h", "4h", "6h"]
    (tmp_path / "resolved.toml").write_text(resolved_toml(config))
    assert load_config(RlConfig, [tmp_path / "resolved.toml"]) == config


@pytest.mark.parametrize(
    ("stages", "facts"),
    [
        ([("a", "4h", "5h"), ("b", "2h", "6h")], ["stages.1.timeout 2h", "stages.0.timeout 4h"]),
        ([("a", "2h", "3h"), ("b", "2h", "4h")], ["stages.1.timeout 2h", "stages.0.timeout 2h"]),
        ([("a", "1h", "9h"), ("b", "2h", "8h")], ["stages.1.hard_timeout 8h", "stages.0.hard_timeout 9h"]),
        ([("a", "2h", "2h")], ["hard_timeout 2h", "timeout 2h"]),
        ([("a", "2h", "3h"), ("a", "4h", "5h")], ["2 are named a"]),
        ([("a", "5m", "6m")], ["stages.0 (a)", "command_timeout 10m", "timeout 5m"]),
        ([("A/b", "2h", "3h")], ["stages.0.name"]),
        ([], ["stages"]),
    ],
    ids=["falls", "stays", "hard-falls", "not-nested", "same-name", "command-too-long", "no-folder-name", "no-stage"],
)
def test_contradictions_are_refused_with_both_values(
    tmp_path: Path, stages: list[tuple[str, str, str]], facts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *stages)
    assert all(fact in str(caught.value) for fact in facts), caught.value


def test_one_outcome_is_changed_and_the_others_keep_their_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, ("a", "2h", "3h"), more='[stages.outcomes]\ntimed_out = ["metrics"]\n')
    outcomes = config.stages[0].outcomes
    assert outcomes[Ending.TIMED_OUT] == ("metrics",)
    assert outcomes[Ending.FINISHED] == ("baseline", "loss", "metrics")
    assert outcomes[Ending.SANDBOX_FAILED] == ("metrics",)
    assert set(outcomes) == set(Ending)


LEARNT = ("finished", "timed_out", "turn_limit", "token_limit", "stalled", "blacklisted")


@pytest.mark.parametrize(
    ("table", "fact"),
    [
        ('finsihed = ["loss"]', "finsihed"),
        ('finished = ["reward"]', "reward"),
        ('finished = ["loss", "loss"]', "twice"),
        ("\n".join(f"{ending} = []" for ending in LEARNT), "no ending enter the loss"),
        ("\n".join(f'{ending} = ["loss"]' for ending in LEARNT), "no ending enter the baseline"),
    ],
    ids=["unknown-ending", "unknown-use", "twice", "nothing-learnt", "no-baseline"],
)
def test_an_outcome_table_that_makes_no_sense_is_refused(tmp_path: Path, table: str, fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        load(tmp_path, ("a", "2h", "3h"), more=f"[stages.outcomes]\n{table}\n")


def test_a_table_made_in_code_must_be_whole(tmp_path: Path) -> None:
    stage = load(tmp_path, ("a", "2h", "3h")).stages[0]
    fields = {name: getattr(stage, name) for name in type(stage).model_fields}
    with pytest.raises(ValueError, match="outcomes lacks timed_out"):
        type(stage)(**{**fields, "outcomes": {Ending.FINISHED: ("baseline", "loss")}})


def test_a_stage_puts_its_limits_into_the_episode(tmp_path: Path) -> None:
    config = load(tmp_path, ("a", "4h", "5h"), overrides=("--episode.command_timeout=20m",))
    episode = config.stages[0].episode(config.episode)
    assert (episode.timeout, episode.hard_timeout) == (Duration("4h"), Duration("5h"))
    assert episode.command_timeout == Duration("20m")


def test_a_group_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rollouts_per_task"):
        load(tmp_path, ("a", "2h", "3h"), overrides=("--stages.0.rollouts_per_task=1",))


def test_all_but_the_losses_import_no_torch() -> None:
    modules = ", ".join(f"megatron_klong.rl.{name}" for name in ("config", "advantages", "bank", "sampled", "stages"))
    code = f"import {modules}, sys; sys.exit(bool({{'torch', 'megatron', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=120, check=False).returncode == 0


def test_more_updates_than_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="updates_per_iteration 5 exceeds tasks_per_iteration 4"):
        load(tmp_path, ("a", "2h", "3h"), overrides=("--stages.0.updates_per_iteration=5",))
