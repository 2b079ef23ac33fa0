"""A training run and its held-out scores -> what must not be overlooked.

Always: a first trained model that does not clearly beat the untrained one, a stage below the one before it, a
trainer that disagrees with its engine or was not compared with it, and a number that is not finite each give a finding.
"""

from collections.abc import Sequence
from itertools import pairwise

from megatron_klong.evaluate.findings import Finding, fixed, plural
from megatron_klong.evaluate.summary import HELDOUT, Difference, ScoreRow, difference
from megatron_klong.evaluate.training import TrainingRun, numbers

MISMATCH_LIMIT = 1e-4  # of log-probabilities, at one token
_CLEARLY = 3  # standard errors of the difference


def training_findings(training: TrainingRun, scores: Sequence[ScoreRow]) -> list[Finding]:
    """The findings, by importance."""
    return [*_not_finite(training), *_progress(training.models, scores), *_mismatch(training)]


def _not_finite(training: TrainingRun) -> list[Finding]:
    places: dict[tuple[str, str], list[str]] = {}
    for kind, name, place in training.not_finite():
        places.setdefault((kind, name), []).append(place)
    return [
        Finding(text=f"{kind}: {name} is not finite {_times(len(where))}, first at {where[0]}.", defect=True)
        for (kind, name), where in places.items()
    ]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _progress(models: Sequence[str], scores: Sequence[ScoreRow]) -> list[Finding]:
    heldout = {row.policy: row for row in scores if row.split == HELDOUT and row.scored}
    found = [Finding(text=f"No held-out episode of {model} has a score.") for model in models if model not in heldout]
    for number, (before, after) in enumerate(pairwise(models)):
        if before in heldout and after in heldout:
            compare = _first_step if number == 0 else _later_step
            found += compare(heldout[before], heldout[after])
    return found


def _first_step(before: ScoreRow, after: ScoreRow) -> list[Finding]:
    change = difference(after, before)
    if change.error is None:
        text = f"Whether {after.policy} beats {before.policy} cannot be told: {_counts(before, after)}."
        return [Finding(text=text)]
    if change.value > 0 and change.value >= _CLEARLY * change.error:
        return []
    text = f"{after.policy} does not beat {before.policy} by {_CLEARLY} standard errors: {_means(before, after)}."
    return [Finding(text=text)]


def _later_step(before: ScoreRow, after: ScoreRow) -> list[Finding]:
    if difference(after, before).value >= 0:
        return []
    return [Finding(text=f"{after.policy} is below {before.policy}, the model before it: {_means(before, after)}.")]


def _means(before: ScoreRow, after: ScoreRow) -> str:
    return f"held-out mean {fixed(after.mean)} against {fixed(before.mean)}, {in_words(difference(after, before))}"


def _counts(before: ScoreRow, after: ScoreRow) -> str:
    return " and ".join(f"{row.policy} has {plural(row.scored, 'scored held-out episode')}" for row in (before, after))


def in_words(change: Difference) -> str:
    """ "a difference of +0.120 (2.4 standard errors)"."""
    text = f"a difference of {change.value:+.3f}"
    if change.error is None:
        return text
    return f"{text} ({change.errors:.1f} standard errors)" if change.errors is not None else f"{text} (without spread)"


def _mismatch(training: TrainingRun) -> list[Finding]:
    worst = numbers(training.rl, "mismatch_max")
    above = [number for number, value in enumerate(worst) if value > MISMATCH_LIMIT]
    found = []
    if above:
        number = max(above, key=worst.__getitem__)
        line = training.rl[number]
        text = (
            f"Trainer and engine disagree: mismatch_max is above {MISMATCH_LIMIT:g} in {len(above):,} of "
            f"{plural(len(worst), 'update')}, at most {worst[number]:.2g} ({line['stage']} iteration "
            f"{line['iteration']}, update {number + 1})."
        )
        found.append(Finding(text=text))
    uncompared = sum(line.get("mismatch_max") is None for line in training.rl)
    if uncompared:
        found.append(
            Finding(text=f"{plural(uncompared, 'RL update')} without mismatch_max: trainer and engine not compared.")
        )
    return found
