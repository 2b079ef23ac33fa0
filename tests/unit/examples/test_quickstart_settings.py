"""The settings of the quickstart: its files agree with each other."""

import tomllib

from examples.quickstart.config import QuickstartConfig
from examples.quickstart.run import CONFIG
from examples.quickstart.training import RL_CONFIG, SFT_CONFIG
from megatron_klong.config import load_config
from megatron_klong.rl.config import RlConfig
from megatron_klong.train.config import SftConfig


def test_rl_toml_by_itself_plays_as_the_quickstart_does() -> None:
    quickstart = tomllib.loads(CONFIG.read_text())["episode"]
    alone = tomllib.loads(RL_CONFIG.read_text())["episode"]
    limits = ("timeout", "hard_timeout")  # the stages have their own
    assert alone.pop("turn_limit") == load_config(QuickstartConfig, [CONFIG]).evaluation.turn_limit
    assert {name: value for name, value in quickstart.items() if name not in limits} == alone


def test_windows_fit_rows_and_engine_and_enough_episodes_are_scored() -> None:
    quickstart = load_config(QuickstartConfig, [CONFIG])
    rl, sft = load_config(RlConfig, [RL_CONFIG]), load_config(SftConfig, [SFT_CONFIG])
    window = quickstart.episode.context.max_tokens
    assert min(rl.trainer.row_tokens, rl.engine.max_sequence_length, sft.row_tokens) >= window
    assert len(quickstart.tasks.heldout_turns) * quickstart.evaluation.rollouts_per_task >= 32
    assert [stage.timeout for stage in rl.stages] == sorted({stage.timeout for stage in rl.stages})
    assert len(rl.stages) == 2
