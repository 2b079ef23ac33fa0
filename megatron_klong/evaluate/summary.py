"""Records, replays, a shard and its preprocessing report -> the numbers a report shows, as plain rows.

Always: every episode is in exactly one score row; an episode without a score enters no mean but is counted; a mean
of fewer than two scores has no standard error; trainable tokens that are neither trained nor dropped are named.
Turns are numbered from 1 here, as people count; `ReplayResult` numbers them from 0.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from megatron_klong.data.shard import Shard
from megatron_klong.trajectory.episode import EpisodeRecord
from megatron_klong.trajectory.replay import ReplayResult

HELDOUT, TRAIN, NO_SPLIT = "heldout", "train", "no split"
_SPLIT_ORDER = (HELDOUT, TRAIN)
_SHOWN_TURNS = 3
_COUNTS = (
    "files",
    "transcripts",
    "tokens",
    "trainable_tokens",
    "trained_tokens",
    "windows",
    "window_tokens",
    "prefix_tokens",
    "overlap_tokens",
    "longest_head_tokens",
    "cuts_without_newest_turn",
)


class Verdict(StrEnum):
    """Whether the prompts the live agent sent are those the splitter makes from the transcript."""

    EQUAL = "equal"
    DIFFERS = "differs"
    NO_PROMPT = "no prompt"  # the episode never asked the model
    NOT_REPLAYED = "not replayed"


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeRow:
    """One episode. detail: what the verdict rests on.  prompts: how many were compared."""

    id: str
    task: str
    policy: str
    epoch: int
    split: str
    turns: int
    windows: int
    seconds: float
    model_seconds: float
    given_back_seconds: float
    turn_seconds: tuple[float, ...]
    ending: str
    error: str | None
    score: float | None
    verdict: Verdict
    detail: str
    prompts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A mean less another mean. error: its standard error as of independent samples, None if a mean has none."""

    value: float
    error: float | None

    @property
    def errors(self) -> float | None:
        """The difference in its own standard errors; None if that is unknown or 0."""
        return self.value / self.error if self.error else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRow:
    """One policy on one split. mean and standard_error are over the `scored` of its `episodes`.

    difference: to the policy all are compared with, on the same split; None for that policy itself.
    """

    policy: str
    split: str
    episodes: int
    scored: int
    mean: float | None
    standard_error: float | None
    mean_turns: float
    mean_windows: float
    difference: Difference | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeRow:
    """Where the seconds of one policy's episodes went; `other_seconds` is all that no turn accounts for."""

    policy: str
    episodes: int
    seconds: float
    model_seconds: float
    given_back_seconds: float
    other_seconds: float
    median_turn_seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalRow:
    """Inputs refused for one reason, with the first of them."""

    reason: str
    inputs: int
    source: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenAccount:
    """What became of the tokens of the inputs. dropped: trained tokens by reason.  ends: windows by how they ended.

    shard_trained_tokens: the same count as trained_tokens, taken from the shard.
    """

    files: int
    transcripts: int
    tokens: int
    trainable_tokens: int
    trained_tokens: int
    shard_trained_tokens: int
    windows: int
    window_tokens: int
    prefix_tokens: int
    overlap_tokens: int
    longest_head_tokens: int
    cuts_without_newest_turn: int
    dropped: Mapping[str, int]
    refusals: tuple[RefusalRow, ...]
    ends: Mapping[str, int]

    @property
    def new_tokens(self) -> int:
        return self.window_tokens - self.prefix_tokens - self.overlap_tokens

    @property
    def unaccounted_tokens(self) -> int:
        """Trainable tokens that are neither trained nor dropped for a reason; anything but 0 is a defect."""
        return self.trainable_tokens - self.trained_tokens - sum(self.dropped.values())


def mean_and_standard_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and its standard error (sample deviation / sqrt n), None where there are too few values."""
    if not values:
        return None, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def episode_rows(
    records: Sequence[EpisodeRecord],
    replays: Mapping[str, ReplayResult],
    splits: Mapping[str, str],
    names: Sequence[str],
) -> list[EpisodeRow]:
    """A row an episode, by task, policy in the order of `names`, and epoch."""
    order = {name: number for number, name in enumerate(names)}
    ordered = sorted(records, key=lambda record: (record.task, order[record.model], record.epoch))
    return [_episode_row(record, replays.get(record.id), splits.get(record.task, NO_SPLIT)) for record in ordered]


def _episode_row(record: EpisodeRecord, replay: ReplayResult | None, split: str) -> EpisodeRow:
    verdict, detail = _verdict(replay)
    return EpisodeRow(
        id=record.id,
        task=record.task,
        policy=record.model,
        epoch=record.epoch,
        split=split,
        turns=len(record.turns),
        windows=record.windows,
        seconds=record.seconds,
        model_seconds=sum(turn.model_seconds for turn in record.turns),
        given_back_seconds=sum(turn.given_back_seconds for turn in record.turns),
        turn_seconds=tuple(turn.model_seconds for turn in record.turns),
        ending=record.ending,
        error=record.error,
        score=record.score,
        verdict=verdict,
        detail=detail,
        prompts=replay.turns if replay else 0,
    )


def _verdict(replay: ReplayResult | None) -> tuple[Verdict, str]:
    if replay is None:
        return Verdict.NOT_REPLAYED, ""
    if replay.mismatches:
        shown = ", ".join(str(turn + 1) for turn in replay.mismatches[:_SHOWN_TURNS])
        more = len(replay.mismatches) - _SHOWN_TURNS
        return Verdict.DIFFERS, f"at turn {shown}" + (f" and {more} more" if more > 0 else "")
    if not replay.turns:
        return Verdict.NO_PROMPT, ""
    return Verdict.EQUAL, f"{replay.turns:,} prompt{'s' if replay.turns > 1 else ''}"


def split_key(split: str) -> tuple[int, str]:
    """Held-out first, then train, then the rest by name."""
    return (_SPLIT_ORDER.index(split) if split in _SPLIT_ORDER else len(_SPLIT_ORDER)), split


def score_rows(episodes: Sequence[EpisodeRow], names: Sequence[str], base: str | None = None) -> list[ScoreRow]:
    """A row for each policy on each split it played, in the order of `names`; base: whom all are compared with."""
    groups: dict[tuple[str, str], list[EpisodeRow]] = {}
    for episode in episodes:
        groups.setdefault((episode.policy, episode.split), []).append(episode)
    rows = [
        _score_row(groups[group]) for group in sorted(groups, key=lambda at: (names.index(at[0]), split_key(at[1])))
    ]
    bases = {row.split: row for row in rows if row.policy == base and row.scored}
    return [
        replace(row, difference=difference(row, bases[row.split]))
        if row.policy != base and row.scored and row.split in bases
        else row
        for row in rows
    ]


def _score_row(group: Sequence[EpisodeRow]) -> ScoreRow:
    scores = [episode.score for episode in group if episode.score is not None]
    mean, error = mean_and_standard_error(scores)
    return ScoreRow(
        policy=group[0].policy,
        split=group[0].split,
        episodes=len(group),
        scored=len(scores),
        mean=mean,
        standard_error=error,
        mean_turns=statistics.fmean(episode.turns for episode in group),
        mean_windows=statistics.fmean(episode.windows for episode in group),
        difference=None,
    )


def difference(row: ScoreRow, base: ScoreRow) -> Difference:
    """The mean of a row less that of another; both must have one."""
    assert row.mean is not None
    assert base.mean is not None
    errors = row.standard_error, base.standard_error
    error = None if None in errors else math.hypot(*(error or 0.0 for error in errors))
    return Difference(value=row.mean - base.mean, error=error)


def time_rows(episodes: Sequence[EpisodeRow], names: Sequence[str]) -> list[TimeRow]:
    """A row for each policy."""
    rows = []
    for policy in names:
        group = [episode for episode in episodes if episode.policy == policy]
        turns = [seconds for episode in group for seconds in episode.turn_seconds]
        seconds = sum(episode.seconds for episode in group)
        model_seconds = sum(episode.model_seconds for episode in group)
        given_back_seconds = sum(episode.given_back_seconds for episode in group)
        rows.append(
            TimeRow(
                policy=policy,
                episodes=len(group),
                seconds=seconds,
                model_seconds=model_seconds,
                given_back_seconds=given_back_seconds,
                other_seconds=max(0.0, seconds - model_seconds - given_back_seconds),
                median_turn_seconds=statistics.median(turns) if turns else None,
            )
        )
    return rows


def policies(played: Iterable[str], models: Sequence[str] = ()) -> list[str]:
    """The policies that played: the `models` in their order, then the others by name.

    The place in this list is the policy's colour, so it is the same in every plot.
    """
    names = set(played)
    return [*(model for model in models if model in names), *sorted(names.difference(models))]


def token_account(shard: Shard, preprocessing: Mapping[str, Any]) -> TokenAccount:
    """What became of the tokens. Raises ValueError if `preprocessing` is not a preprocessing report."""
    missing = [name for name in (*_COUNTS, "dropped_tokens", "refusals") if name not in preprocessing]
    if missing:
        raise ValueError(
            f"the preprocessing report of {shard.prefix} has no {missing[0]!r}; pass the content of the .report.json "
            "that preprocessing wrote beside the shard"
        )
    counted = Counter(str(end) for end in shard.ends())
    return TokenAccount(
        **{name: preprocessing[name] for name in _COUNTS},
        shard_trained_tokens=int(shard.column("trained_tokens").sum()),
        dropped={reason: tokens for reason, tokens in sorted(preprocessing["dropped_tokens"].items()) if tokens},
        refusals=_refusal_rows(preprocessing["refusals"]),
        ends=dict(counted.most_common()),
    )


def _refusal_rows(refusals: Sequence[Mapping[str, Any]]) -> tuple[RefusalRow, ...]:
    counted = Counter(str(refusal["reason"]) for refusal in refusals)
    first = {str(refusal["reason"]): refusal for refusal in reversed(refusals)}
    return tuple(
        RefusalRow(reason=reason, inputs=inputs, source=first[reason]["source"], detail=first[reason]["detail"])
        for reason, inputs in sorted(counted.items())
    )
