"""Everything a run left behind -> one HTML page that stands alone, and its plots as files.

    FOLDER/report.html        style and plots inside, no script, nothing fetched; follows light and dark displays
    FOLDER/plots/NAME.png     the light plots, for slides and papers

Always: the same input gives the same page; text from outside is escaped; a plot without data is left out, and a file
of that name from an earlier report is removed.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_klong.data.shard import Shard
from megatron_klong.evaluate.canvas import Plot
from megatron_klong.evaluate.findings import MISSING, findings, fixed, headlines, percent, plural, words
from megatron_klong.evaluate.plots import endings, heldout_scores, score_by_turns
from megatron_klong.evaluate.summary import (
    HELDOUT,
    EpisodeRow,
    ScoreRow,
    episode_rows,
    policies,
    score_rows,
    time_rows,
    token_account,
)
from megatron_klong.evaluate.training import TrainingRun
from megatron_klong.evaluate.training_findings import training_findings
from megatron_klong.evaluate.training_plots import iteration_endings, iteration_scores, phases, sft_loss, time_limit
from megatron_klong.evaluate.update_plots import mismatch, update_metrics
from megatron_klong.evaluate.window_plots import (
    longest_episode,
    prefix_levels,
    prompt_tokens,
    window_composition,
    windows_per_episode,
)
from megatron_klong.files import write_atomically
from megatron_klong.trajectory.episode import EpisodeRecord
from megatron_klong.trajectory.replay import ReplayResult

_TEMPLATE = "template.html.jinja"
_SHOWN_ROWS = 60
_PLOTS = (
    "heldout_scores",
    "score_by_turns",
    "endings",
    "sft_loss",
    "iteration_scores",
    "iteration_endings",
    "update_metrics",
    "mismatch",
    "prompt_tokens",
    "prompt_tokens_models",
    "window_composition",
    "windows_per_episode",
    "phases",
)


def write_report(
    folder: Path,
    *,
    title: str,
    records: Sequence[EpisodeRecord],
    shard: Shard,
    preprocessing: Mapping[str, Any],
    replays: Mapping[str, ReplayResult],
    splits: Mapping[str, str],
    facts: Mapping[str, str],
    training: TrainingRun | None = None,
) -> Path:
    """Write the page and its plots, and return the page.

    preprocessing: the content of the shard's `.report.json`.  replays: by record id.  splits: task id -> "train",
    "heldout" or another name.  facts: shown as they are (paths, versions, seconds by phase).  training: what was
    trained and how it went; the held-out episodes of its models are among `records`.
    Raises ValueError if `preprocessing` lacks a count.
    """
    trained = training or TrainingRun()
    names = policies((record.model for record in records), trained.models)
    episodes = episode_rows(records, replays, splits, names)
    scores = score_rows(episodes, names, base=next(iter(trained.models), None))
    account = token_account(shard, preprocessing)
    longest = _longest(records, shard, trained.models)
    drawn = [
        *_episode_plots(episodes, scores, names, trained.models),
        *_training_plots(trained),
        *(prompt_tokens(record, prefix_levels(record, shard), name=name) for name, record in longest.items()),
        window_composition(shard),
        windows_per_episode(episodes, names),
    ]
    plots = {plot.name: plot for plot in drawn if plot}
    _write_plots(folder / "plots", plots)
    content = {
        "title": title,
        "headlines": headlines(episodes, scores, account, trained.models),
        "findings": findings(episodes, account, training_findings(trained, scores)),
        "scores": scores,
        "episodes": episodes,
        "shown_rows": _SHOWN_ROWS,
        "longest": longest,
        "account": account,
        "policy": shard.manifest["policy"],
        "times": time_rows(episodes, names),
        "training": trained,
        "facts": facts,
        "plots": plots,
    }
    write_atomically(folder / "report.html", _environment().get_template(_TEMPLATE).render(content))
    return folder / "report.html"


def _episode_plots(
    episodes: Sequence[EpisodeRow], scores: Sequence[ScoreRow], names: Sequence[str], models: Sequence[str]
) -> list[Plot | None]:
    return [
        heldout_scores(scores, episodes, names) if models else None,
        score_by_turns(episodes, names),
        endings(episodes, names),
    ]


def _training_plots(training: TrainingRun) -> list[Plot | None]:
    rows = training.iteration_rows()
    return [
        sft_loss(training, training.sft_summary()),
        iteration_scores(rows),
        iteration_endings(rows),
        update_metrics(training),
        mismatch(training),
        phases(training.phase_seconds()),
    ]


def _longest(records: Sequence[EpisodeRecord], shard: Shard, models: Sequence[str]) -> dict[str, EpisodeRecord]:
    """The longest episode by the name of its plot, and that of the models if it is another."""
    longest = {
        "prompt_tokens": longest_episode(records, shard),
        "prompt_tokens_models": longest_episode([record for record in records if record.model in models], shard),
    }
    if longest["prompt_tokens_models"] is longest["prompt_tokens"]:
        del longest["prompt_tokens_models"]
    return {name: record for name, record in longest.items() if record}


def _write_plots(folder: Path, plots: Mapping[str, Plot]) -> None:
    for name in _PLOTS:
        path = folder / f"{name}.png"
        if name in plots:
            write_atomically(path, plots[name].light)
        else:
            path.unlink(missing_ok=True)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("megatron_klong.evaluate", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        fixed=fixed,
        signed=lambda value, digits: MISSING if value is None else f"{value:+,.{digits}f}",
        words=words,
        time_limit=time_limit,
        counts=lambda counted: ", ".join(f"{count:,} {words(name)}" for name, count in counted.items() if count),
        count=lambda number: f"{number:,}",
        split_name=lambda split: "held-out" if split == HELDOUT else split,
        data_uri=lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
    )
    environment.globals.update(percent=percent, plural=plural, missing=MISSING)
    return environment
