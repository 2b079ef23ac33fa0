"""The last screen of the quickstart: what happened, the scores, and where everything is."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.quickstart.folder import Run
from megatron_klong.data.preprocess import PreprocessReport
from megatron_klong.evaluate.findings import fixed
from megatron_klong.evaluate.summary import mean_and_standard_error
from megatron_klong.evaluate.training import TrainingRun
from megatron_klong.trajectory.episode import EpisodeRecord
from megatron_klong.trajectory.replay import ReplayResult


def last_screen(
    run: Run,
    report: Path,
    records: Sequence[EpisodeRecord],
    replays: Mapping[str, ReplayResult],
    preprocessing: PreprocessReport,
    splits: Mapping[str, Sequence[str]],
    training: TrainingRun,
) -> str:
    """A screenful of text."""
    return "\n".join(
        [
            "",
            *_scores(records, splits, training.models),
            "",
            *_checks(records, replays, preprocessing, training),
            "time: " + ", ".join(f"{phase} {spent:.0f} s" for phase, spent in run.seconds.items()),
            f"      {sum(run.seconds.values()):.0f} s in all",
            "",
            *_places(run, report, training),
        ]
    )


def _scores(records: Sequence[EpisodeRecord], splits: Mapping[str, Sequence[str]], models: Sequence[str]) -> list[str]:
    lines = [f"{'policy':<12}{'split':<10}{'episodes':>9}{'turns':>8}{'windows':>9}{'score':>18}"]
    teachers = [name for name in dict.fromkeys(record.model for record in records) if name not in models]
    for split, tasks in sorted(splits.items()):
        for model in (*models, *teachers):
            chosen = [record for record in records if record.model == model and record.task in tasks]
            if chosen:
                lines.append(_row(model, split, chosen))
    return lines


def _row(model: str, split: str, records: Sequence[EpisodeRecord]) -> str:
    # an episode without a score is counted, but no mean is made of it
    score, error = mean_and_standard_error([record.score for record in records if record.score is not None])
    turns, windows = (sum(counts) / len(records) for counts in _counts(records))
    shown = "none" if score is None else f"{score:.3f}"
    return (
        f"{model:<12}{split:<10}{len(records):>9}{turns:>8.0f}{windows:>9.1f}{shown:>10}"
        f"{'' if error is None else f' ± {error:.3f}'}"
    )


def _counts(records: Sequence[EpisodeRecord]) -> tuple[list[int], list[int]]:
    return [len(record.turns) for record in records], [record.windows for record in records]


def _checks(
    records: Sequence[EpisodeRecord],
    replays: Mapping[str, ReplayResult],
    preprocessing: PreprocessReport,
    training: TrainingRun,
) -> list[str]:
    turns = sum(result.turns for result in replays.values())
    longest = max(records, key=lambda record: len(record.turns))
    lines = [
        f"live context = splitter's windows, token for token, on {turns:,} of {turns:,} prompts; "
        f"the longest episode: {len(longest.turns)} turns in {longest.windows} windows",
        *preprocessing.summary().splitlines(),
    ]
    if summary := training.sft_summary():
        losses = f"loss {fixed(summary.first_loss)} -> {fixed(summary.last_loss)}"
        lines.append(f"SFT: {summary.steps} steps, {summary.tokens:,} tokens, {losses}")
    if training.rl:
        sampled = sum(int(line["trained_tokens"]) for line in training.rl)
        mismatch = max(line["mismatch_max"] for line in training.rl)
        lines.append(
            f"RL: {len(training.rl)} updates on {sampled:,} sampled tokens, on which the log-probabilities of trainer "
            f"and engine differ by at most {mismatch:.1e}"
        )
    return lines


def _places(run: Run, report: Path, training: TrainingRun) -> list[str]:
    lines = [
        f"report       {report}",
        f"episodes     {_program('inspect')} view --log-dir {run.folder / 'episodes'}",
        f"records      {run.records}",
        f"shard        {run.shard}.bin .idx .windows.npz .manifest.json",
        f"tokenizer    {run.tokenizer / 'tokenizer.json'}",
        f"logs         {run.output}",
    ]
    if training.sft:
        lines.append(f"SFT          {run.sft / 'checkpoints'}, in Hugging Face format {run.sft / 'hugging_face'}")
    if training.rl:
        lines.append(f"RL           {run.rl / 'checkpoints'}, in Hugging Face format {run.rl / 'weights'}")
        lines.append(f"             its bank of episodes {run.rl / 'bank'}, its logs {run.rl / 'output'}")
    return lines


def _program(name: str) -> str:
    """How to call a program of this environment from here."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
