"""Supervised fine-tuning on the sub-trajectories of preprocessed shards.

    python -m megatron_klong.train.sft config.toml                                  one process
    torchrun --nproc-per-node 2 -m megatron_klong.train.sft config.toml             two

Writes config.toml, metrics.jsonl, checkpoints/ and, at the end, hugging_face/ into run_folder. Started again with
the same run_folder, it goes on from the newest whole checkpoint.

SIGTERM or SIGUSR1 to any of its processes: all finish the step, write a checkpoint and end with 75. A run that diverges
ends with 3 and writes nothing more; one that hangs for `stall_timeout` ends with 4, and says where. torchrun reports
these statuses of its processes, and ends with 1 itself.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_klong.config import ConfigError, parse_command_line
from megatron_klong.data.indexed import IndexedError
from megatron_klong.data.mixture import Mixture, open_mixture
from megatron_klong.data.packing import PackingError
from megatron_klong.data.shard import ShardError
from megatron_klong.model.checkpoint_folder import find_checkpoint
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.presets import preset
from megatron_klong.processes import end_with_launcher
from megatron_klong.train.checkpoint import CheckpointError
from megatron_klong.train.config import SftConfig
from megatron_klong.train.failure import tell_first_failure
from megatron_klong.train.metrics import check_wandb
from megatron_klong.train.plan import data_parallel_size, plan, world_size
from megatron_klong.train.stall import Watchdog
from megatron_klong.train.stopping import STOPPED, StoppedOnRequest, StopRequest

PROGRAM = "python -m megatron_klong.train.sft"
DIVERGED = 3  # exit status


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 2 the configuration or what it names cannot be used, and those named above."""
    end_with_launcher()
    tell_first_failure()
    request = StopRequest.listen()
    command = parse_command_line(SftConfig, arguments, program=PROGRAM, description=__doc__)
    try:
        check_processes(command.config)
        check_wandb(command.config.wandb)
        data = open_data(command.config)
        model_config = read_model_config(command.config, data)
        if command.dry_run:
            print(plan(command.config, model_config, data))  # below the resolved settings
            return 0
        return train(command.config, model_config, data, request)
    except (ConfigError, ShardError, IndexedError, PackingError, CheckpointError) as error:
        print(f"sft: {error}", file=sys.stderr)
        return 2


def open_data(config: SftConfig) -> Mixture:
    """Open the sources, and pack a first round of rows, whatever is wrong with them."""
    data = open_mixture(
        config.all_sources,
        row_tokens=config.row_tokens,
        seed=config.seed,
        validation_share=config.validation_share,
        window_multiple=config.padded_to,
        verify=os.environ.get("RANK", "0") == "0",  # one process reads all there is
    )
    data.train.row_at(0)
    return data


def train(config: SftConfig, model_config: ModelConfig, data: Mixture, request: StopRequest) -> int:
    """Run, and return the exit status; heavy imports start here."""
    quiet_libraries()
    from megatron_klong.model.hugging_face import WeightsError
    from megatron_klong.train.loop import give_up, run_sft
    from megatron_klong.train.step import TrainingDiverged

    try:
        with Watchdog(config.stall_timeout) as watchdog:
            run_sft(config, model_config, data, request, watchdog)
    except WeightsError as error:
        raise ConfigError(str(error)) from error
    except TrainingDiverged as error:
        give_up(f"sft: {error}")
        return DIVERGED
    except StoppedOnRequest as error:
        give_up(f"sft: {error}")
        return STOPPED
    return 0


def check_processes(config: SftConfig) -> None:
    """Raises ConfigError where layout or batch do not come out even on the processes there are."""
    config.layout.check_world_size(world_size())
    shares = data_parallel_size(config)
    if config.global_batch_rows % shares:
        raise ConfigError(
            f"global_batch_rows {config.global_batch_rows} is no multiple of the {shares} data-parallel processes; "
            "change one of them"
        )
    config.layout.check_micro_batches(config.global_batch_rows // shares)


def read_model_config(config: SftConfig, data: Mixture) -> ModelConfig:
    """The model to train. Raises CheckpointError; ConfigError if it lacks ids of the shards or cannot be divided."""
    vocabulary_size = data.vocabulary_size
    folder = config.hugging_face_init or config.megatron_init
    if config.hugging_face_init:
        model = ModelConfig.from_hugging_face(config.hugging_face_init)
    elif config.megatron_init:
        model = find_checkpoint(Path(config.megatron_init)).model
    elif not vocabulary_size:
        raise ConfigError(
            "sources: plain documents do not say how many ids they need; give hugging_face_init or megatron_init"
        )
    elif config.shape:
        model = ModelConfig.from_hugging_face(config.shape).with_vocabulary(vocabulary_size)
    else:
        model = preset(config.preset).with_vocabulary(vocabulary_size)
    if model.vocab_size < vocabulary_size:
        raise ConfigError(
            f"{folder}: vocab_size {model.vocab_size}, but the shards' tokenizer has {vocabulary_size} ids; preprocess "
            "with the tokenizer of these weights"
        )
    config.layout.check_model(model)
    return model.model_copy(update={"mtp_loss_weight": config.mtp_loss_weight})


def quiet_libraries() -> None:
    """Megatron says on every process what it lacks on a CPU and what it will drop some day; errors stay."""
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
