"""The quickstart: tasks -> teacher episodes -> shard -> SFT -> two stages of RL -> held-out scores -> report.

Always: a run writes only into its own folder; it fails if a teacher's score, a replayed context, a token count or a
log-probability is not what it must be; what the models score is reported as it is; interrupted at any moment it leaves
no process.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.longhaul.corpus import ISOLATED, training_texts
from examples.longhaul.demonstrations import write_demonstrations
from examples.longhaul.generate import Split, generate_tasks
from examples.longhaul.serve_teachers import Options, serving
from examples.quickstart.config import QuickstartConfig
from examples.quickstart.folder import Run
from examples.quickstart.screen import last_screen
from examples.quickstart.training import (
    RL_CONFIG,
    SFT,
    SFT_CONFIG,
    SFT_PROCESSES,
    UNTRAINED,
    ProgramFailed,
    evaluate,
    rl_config,
    train_rl_stage,
    train_sft,
    training_run,
    weights_after,
)
from megatron_klong.agent.collect import CollectError, collect
from megatron_klong.agent.worker import Job, Played
from megatron_klong.config import ConfigError, parse_command_line
from megatron_klong.data.preprocess import PreprocessReport, preprocess
from megatron_klong.data.shard import Shard
from megatron_klong.evaluate.report import write_report
from megatron_klong.evaluate.summary import HELDOUT, TRAIN
from megatron_klong.evaluate.training import TrainingRun
from megatron_klong.sandbox.bubblewrap import SandboxUnavailable, check_available
from megatron_klong.serve.launch import ServerFailed
from megatron_klong.trajectory.episode import EpisodeRecord, read_episode
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.replay import ReplayResult, replay
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer

CONFIG = Path(__file__).parent / "quickstart.toml"
PROGRAM = "python -m examples.quickstart"
MISMATCH = 1e-4  # with weights that SFT has made sharp, fp32 by itself is 4e-5 off fp64, in whichever program


class QuickstartFailed(RuntimeError):
    """A result is not what it must be; the message names it."""


def main(arguments: Sequence[str]) -> int:
    try:
        command = parse_command_line(QuickstartConfig, [str(CONFIG), *arguments], program=PROGRAM, description=__doc__)
        if command.dry_run:
            print(plan(command.config))  # below the resolved settings
            return 0
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        run_all(command.config)
    except (ConfigError, SandboxUnavailable, CollectError, ServerFailed, ProgramFailed, QuickstartFailed) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


def plan(config: QuickstartConfig) -> str:
    """What a run would do."""
    tasks = config.tasks
    train, heldout = tasks.train_turns + tasks.long_train_turns, tasks.heldout_turns + tasks.long_heldout_turns
    episodes = 2 * len(train + heldout) + len(tasks.heldout_turns) * config.teachers.idle_plays
    lines = [
        f"{len(train)} training and {len(heldout)} held-out tasks, {episodes} teacher episodes, about "
        f"{2 * sum(train + heldout):,} turns, and {config.demonstrations.count:,} short demonstrations; those on "
        f"training tasks become shards below {config.runs_folder}",
    ]
    if config.until != "data":
        lines.append(f"then SFT by {SFT_PROCESSES} processes ({SFT_CONFIG})")
    if config.until == "rl":
        lines.append(f"then the stages of RL ({RL_CONFIG})")
    if config.until != "data":
        played = len(tasks.heldout_turns) * config.evaluation.rollouts_per_task
        lines.append(f"each model plays {played} held-out episodes")
    return "\n".join(f"# plan: {line}" for line in lines)


def run_all(config: QuickstartConfig) -> None:
    """The whole run."""
    asyncio.run(check_available())
    run = Run.start(config)
    with run.phase("tasks"):
        splits = make_tasks(run)
    with run.phase("demonstrations"):
        make_demonstrations(run, splits)
    with run.phase("tokenizer"):
        make_tokenizer(run, splits)
    with run.phase("episodes"):
        records = play_episodes(run, splits)
    with run.phase("replay"):
        replays = replay_contexts(run, records)
    with run.phase("shards"):
        preprocessing = make_shards(run, records, splits)
    models = train_and_score(run, splits[HELDOUT])
    played = [record for records in models.values() for record in records]
    with run.phase("replay"):
        replays |= replay_contexts(run, played)
    training = training_run(run, list(models))
    with run.phase("report"):
        report = make_report(run, splits, [*records, *played], replays, training)
    check_results(records, replays, preprocessing)
    check_log_probs(training)
    print(last_screen(run, report, [*records, *played], replays, preprocessing, splits, training))


type Splits = Mapping[str, Sequence[str]]  # "train", "heldout", and those too long for the tiny model -> task ids


def make_tasks(run: Run) -> Splits:
    """Generate all splits."""
    tasks = run.config.tasks
    turns = {
        TRAIN: tasks.train_turns,
        HELDOUT: tasks.heldout_turns,
        f"{TRAIN}-long": tasks.long_train_turns,
        f"{HELDOUT}-long": tasks.long_heldout_turns,
    }
    splits = [Split(name=name, num_tasks=len(lengths), turns=lengths) for name, lengths in turns.items() if lengths]
    return generate_tasks(run.folder / "tasks", splits=splits, seed=run.config.seed)


def tasks_of(splits: Splits, side: str) -> list[str]:
    """All training tasks, or all held-out ones."""
    return [task for name, tasks in splits.items() if name.startswith(side) for task in tasks]


def make_demonstrations(run: Run, splits: Splits) -> None:
    """Write the short demonstrations."""
    write_demonstrations(
        run.demonstrations,
        count=run.config.demonstrations.count,
        turns=run.config.demonstrations.turns,
        seed=run.config.seed,
        settings=run.config.episode,
        taken=[run.task_folder(task) for task in tasks_of(splits, HELDOUT)],
    )


def make_tokenizer(run: Run, splits: Splits) -> None:
    """Train the small tokenizer on the training tasks and the demonstrations."""
    folders = [run.task_folder(task) for task in tasks_of(splits, TRAIN)]
    texts = training_texts(folders, run.config.episode, demonstrations=run.demonstrations)
    size = run.config.tokenizer.vocabulary_size
    train_tokenizer(texts, vocabulary_size=size, folder=run.tokenizer, isolated=ISOLATED)


def play_episodes(run: Run, splits: Splits) -> list[EpisodeRecord]:
    """Let the teachers play, over HTTP and in sandboxes."""
    everything = [*tasks_of(splits, TRAIN), *tasks_of(splits, HELDOUT)]
    played = {"oracle": everything, "imperfect": everything}
    if run.config.teachers.idle_plays:
        played["idle"] = list(splits[HELDOUT])
    options = Options(error_rate=run.config.teachers.imperfect_error_rate, seed=run.config.seed)
    with serving(options) as url:
        jobs = [
            Job(
                name=teacher,
                episodes=[Played(task_folder=str(run.task_folder(task))) for task in tasks],
                model=f"openai-api/teacher/{teacher}",
                base_url=url,
                tokenizer=str(run.tokenizer),
                settings=run.config.episode,
                log_folder=str(run.folder / "episodes"),
                record_folder=str(run.folder / "records"),
            )
            for teacher, tasks in played.items()
        ]
        finished = collect(jobs, workers=run.config.workers, output_folder=run.folder / "output")
    order = list(played)
    finished.sort(key=lambda episode: (order.index(episode.job), episode.record))
    return [read_episode(Path(episode.record)) for episode in finished]


def replay_contexts(run: Run, records: Sequence[EpisodeRecord]) -> dict[str, ReplayResult]:
    """Recompute every prompt of every episode from its transcript."""
    renderer = GlmRenderer(load_tokenizer(run.tokenizer))
    return {record.id: replay(record, renderer) for record in records}


def make_shards(run: Run, records: Sequence[EpisodeRecord], splits: Splits) -> PreprocessReport:
    """Cut the transcripts that are worth learning from into windows; the report is that of the teachers' episodes."""
    tokenizer, policy = load_tokenizer(run.tokenizer), run.config.episode.context.policy
    training = set(tasks_of(splits, TRAIN))
    # rejection sampling: an episode is shown to the model only if the judge found it perfect
    kept = [record for record in records if record.task in training and record.score == 1.0]
    if run.config.demonstrations.count:
        preprocess([run.demonstrations], run.demonstration_shard, tokenizer, policy)
    return preprocess(sorted(run.records / record.file_name for record in kept), run.shard, tokenizer, policy)


def train_and_score(run: Run, heldout: Sequence[str]) -> dict[str, list[EpisodeRecord]]:
    """As much of the training as is wanted; the held-out episodes of each model, in order of training."""
    scored: dict[str, list[EpisodeRecord]] = {}
    if run.config.until == "data":
        return scored
    with run.phase("sft"):
        train_sft(run)
    for model, weights in ((UNTRAINED, run.sft / "initial_hugging_face"), (SFT, run.sft / "hugging_face")):
        with run.phase(f"evaluate {model}"):
            scored[model] = evaluate(run, model, weights, heldout)
    stages = rl_config(run).stages if run.config.until == "rl" else ()
    for stage in stages:
        with run.phase(f"rl {stage.name}"):
            train_rl_stage(run, stage.name)
        with run.phase(f"evaluate {stage.name}"):
            scored[stage.name] = evaluate(run, stage.name, weights_after(run), heldout)
    return scored


def make_report(
    run: Run,
    splits: Splits,
    records: Sequence[EpisodeRecord],
    replays: Mapping[str, ReplayResult],
    training: TrainingRun,
) -> Path:
    """Write the page."""
    return write_report(
        run.folder / "report",
        title="Quickstart: the recipe on long tasks, with a tiny model",
        records=records,
        shard=Shard(run.shard),
        preprocessing=json.loads(run.shard.with_name("sft.report.json").read_bytes()),
        replays=replays,
        splits={task: side for side in (TRAIN, HELDOUT) for task in tasks_of(splits, side)},
        facts={"run folder": str(run.folder), "checkpoints": f"{run.sft}, {run.rl}"},
        training=training,
    )


def check_results(
    records: Sequence[EpisodeRecord],
    replays: Mapping[str, ReplayResult],
    preprocessing: PreprocessReport,
) -> None:
    """Fail if the run contradicts what it is to show. `records`: of the teachers. Raises QuickstartFailed."""
    for name, result in replays.items():
        if not result.agrees:
            turns = result.mismatches
            raise QuickstartFailed(f"{name}: the live context differs from the splitter's at turns {turns[:5]}")
    for record in records:
        low, high = {"oracle": (1.0, 1.0), "imperfect": (0.01, 0.99), "idle": (0.0, 0.0)}[record.model]
        if record.score is None or not low <= round(record.score, 9) <= high:
            raise QuickstartFailed(f"{record.id} scored {record.score}, expected {low} to {high} ({record.ending})")
    accounted = preprocessing.trained_tokens + sum(preprocessing.dropped_tokens.values())
    if accounted != preprocessing.trainable_tokens:
        raise QuickstartFailed(f"{preprocessing.trainable_tokens} trainable tokens, accounted for are {accounted}")


def check_log_probs(training: TrainingRun) -> None:
    """Trainer and engine agree on every sampled token that was trained. Raises QuickstartFailed."""
    for line in training.rl:
        if line["mismatch_max"] > MISMATCH:
            raise QuickstartFailed(
                f"{line['stage']}, iteration {line['iteration']}: trainer and engine differ by {line['mismatch_max']} "
                f"in the log-probability of a sampled token, allowed are {MISMATCH}"
            )
