"""Progressive RL: stages of rising time limits, each alternating rollouts in sandboxes and training.

    python -m megatron_klong.rl rl.toml               all stages, one after the other
    python -m megatron_klong.rl rl.toml --stage 1     the first one (or its name), as one Slurm job does

Writes everything into run_folder. Started again with the same run_folder, it goes on where it was killed.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_klong.agent.collect import CollectError
from megatron_klong.agent.paper_task import PaperTask, TaskError, load_tasks, read_split
from megatron_klong.config import ConfigError, parse_command_line
from megatron_klong.processes import end_with_launcher
from megatron_klong.rl.bank import read_contents
from megatron_klong.rl.bank_index import BankContents
from megatron_klong.rl.config import RlConfig
from megatron_klong.rl.folders import RunFolder
from megatron_klong.rl.launch import TrainerFailed, make_launcher
from megatron_klong.rl.loop import RlError, checkpoint_step, run
from megatron_klong.rl.stages import PlannedIteration, plan_run
from megatron_klong.serve.launch import ServerFailed
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.tokenizer import TokenizerError, load_tokenizer

PROGRAM = "python -m megatron_klong.rl"


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 1 it broke off and can be continued, 2 the configuration cannot be used."""
    end_with_launcher()
    chosen, arguments = take_stage(arguments)
    command = parse_command_line(RlConfig, arguments, program=f"{PROGRAM} [--stage NUMBER]", description=__doc__)
    config = command.config
    try:
        tasks = load_tasks(Path(config.tasks), read_split(Path(config.split)) if config.split else None)
        plan = plan_of(config, tasks, chosen)
        renderer = GlmRenderer(load_tokenizer(config.tokenizer_path))
        if command.dry_run:
            print(describe(config, tasks, plan))  # below the resolved settings
            return 0
        launcher = make_launcher(config)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        run(config, tasks, plan, launcher, renderer)
    except (ConfigError, TaskError, TokenizerError, ValueError) as error:
        print(f"rl: {error}", file=sys.stderr)
        return 2
    except (RlError, CollectError, ServerFailed, TrainerFailed) as error:
        print(f"rl: {error}\nrl: nothing finished is lost; start it again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rl: interrupted; nothing finished is lost, start it again to go on", file=sys.stderr)
        return 130
    return 0


def take_stage(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """`--stage X` out of the arguments; all else is configuration."""
    left = list(arguments)
    if "--stage" not in left:
        return None, left
    place = left.index("--stage")
    chosen = left[place + 1 : place + 2]
    del left[place : place + 2]
    return (chosen or [""])[0], left


def plan_of(config: RlConfig, tasks: Sequence[PaperTask], chosen: str | None) -> list[PlannedIteration]:
    """The iterations to be run. Raises ConfigError for a stage that there is not, or whose turn it is not."""
    plan = list(plan_run(config, [task.id for task in tasks]))
    if chosen is None:
        return plan
    names = [stage.name for stage in config.stages]
    if chosen.isdigit() and 1 <= int(chosen) <= len(names):
        chosen = names[int(chosen) - 1]
    if chosen not in names:
        raise ConfigError(f"--stage {chosen}: there are {', '.join(names)}, or 1 to {len(names)}")
    step, contents = checkpoint_step(RunFolder(config.folder)), _contents(config)
    earlier = names[: names.index(chosen)]
    for planned in plan:
        if planned.iteration.stage in earlier and not contents.in_weights(planned.iteration, step):
            raise ConfigError(f"--stage {chosen}: {planned.iteration}, which comes before it, is not finished")
    return [planned for planned in plan if planned.iteration.stage == chosen]


def _contents(config: RlConfig) -> BankContents:
    bank = RunFolder(config.folder).bank
    return read_contents(bank) if bank.is_dir() else BankContents()


def describe(config: RlConfig, tasks: Sequence[PaperTask], plan: Sequence[PlannedIteration]) -> str:
    """What a run would do."""
    step, contents = checkpoint_step(RunFolder(config.folder)), _contents(config)
    done = sum(contents.in_weights(planned.iteration, step) for planned in plan)
    lines = [f"{len(tasks)} tasks; {len(plan)} iterations, {done} of them in the weights of step {step}"]
    for stage in config.stages:
        planned = [one for one in plan if one.iteration.stage == stage.name]
        if planned:
            episodes = sum(len(one.rollouts) for one in planned)
            lines.append(
                f"stage {stage.name}: {stage.timeout} an episode, {len(planned)} iterations of "
                f"{stage.tasks_per_iteration} tasks x {stage.rollouts_per_task} rollouts, {episodes} episodes"
            )
    return "\n".join(f"# {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
