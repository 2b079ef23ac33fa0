"""The trainer of RL: from the checkpoint of one step, over the updates of one lesson, to the checkpoint of the last.

    python -m megatron_klong.rl.train RUN/config.toml RUN/iterations/STAGE-0003      started by the loop, not by hand

Reads the bank and never writes to it. The weights for the engine are exported before the checkpoint: where there is a
checkpoint, there are its weights. Killed at any moment, it can be started again with the same arguments.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_klong.config import ConfigError, load_config
from megatron_klong.data.packing import PackingError
from megatron_klong.data.shard import ShardError
from megatron_klong.processes import end_with_parent
from megatron_klong.rl.bank_index import BankError
from megatron_klong.rl.config import RlConfig
from megatron_klong.train.checkpoint import CheckpointError
from megatron_klong.train.sft import DIVERGED, quiet_libraries


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 2 what the arguments name cannot be used, 3 the updates diverged."""
    end_with_parent()
    config_file, iteration_folder = map(Path, arguments)
    try:
        config = load_config(RlConfig, [config_file])
        return train(config, iteration_folder)
    except (ConfigError, BankError, ShardError, PackingError, CheckpointError) as error:
        print(f"rl trainer: {error}", file=sys.stderr)
        return 2


def train(config: RlConfig, iteration_folder: Path) -> int:
    """Run, and return the exit status; heavy imports start here."""
    quiet_libraries()
    from megatron_klong.model.hugging_face import WeightsError
    from megatron_klong.rl.updates import train_iteration
    from megatron_klong.train.loop import give_up
    from megatron_klong.train.step import TrainingDiverged

    try:
        train_iteration(config, iteration_folder)
    except WeightsError as error:
        raise ConfigError(str(error)) from error
    except TrainingDiverged as error:
        give_up(f"rl trainer: {error}")
        return DIVERGED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
