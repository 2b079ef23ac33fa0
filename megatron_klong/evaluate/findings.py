"""Rows -> the sentences at the head of a report: headline figures, and what a reader must not overlook.

Always: a difference between live context and splitter, a token nobody accounts for, an episode that broke, an input
that was refused each give a finding; without findings the report may say that all is well.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_klong.agent.ending import Ending
from megatron_klong.evaluate.summary import HELDOUT, NO_SPLIT, EpisodeRow, ScoreRow, TokenAccount, Verdict

MISSING = "\N{EN DASH}"
_SHOWN_ENDINGS = 3
# endings that say something about the machinery rather than the policy
_BROKEN = (
    Ending.HARD_TIMED_OUT,
    Ending.CONTEXT_ERROR,
    Ending.SANDBOX_FAILED,
    Ending.ENGINE_FAILED,
    Ending.AGENT_FAILED,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """One figure. note: what it rests on."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """defect: something contradicts itself; otherwise something was left out or went wrong, and is known."""

    text: str
    defect: bool = False


def plural(count: int, thing: str) -> str:
    """ "1 episode", "2,000 episodes"."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def words(name: str) -> str:
    """A reason or an ending as one reads it."""
    return name.replace("_", " ")


def percent(part: float, whole: float) -> str:
    """A share; 0 % and 100 % are said only where they are exact."""
    if not whole:
        return MISSING
    share = 100 * part / whole
    if part in (0, whole):
        return f"{share:.0f} %"
    return f"{min(max(share, 0.1), 99.9):.1f} %"


def fixed(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def headlines(
    episodes: Sequence[EpisodeRow], scores: Sequence[ScoreRow], account: TokenAccount, models: Sequence[str] = ()
) -> list[Headline]:
    """The figures at the top. models: the policies that were trained, the best of which is named before others."""
    num_policies, num_tasks = (len({getattr(episode, name) for episode in episodes}) for name in ("policy", "task"))
    endings = Counter(words(episode.ending) for episode in episodes)
    finished = endings.pop(words(Ending.FINISHED), 0)
    others = [f"{count:,} {ending}" for ending, count in endings.most_common(_SHOWN_ENDINGS)]
    if len(endings) > _SHOWN_ENDINGS:
        others.append(f"{sum(count for _, count in endings.most_common()[_SHOWN_ENDINGS:]):,} other")
    longest = max(episodes, key=lambda episode: (episode.turns, episode.windows), default=None)
    compared = [episode for episode in episodes if episode.verdict in (Verdict.EQUAL, Verdict.DIFFERS)]
    equal = sum(episode.verdict is Verdict.EQUAL for episode in compared)
    kinds = "policy" if num_policies == 1 else "policies"
    return [
        Headline(
            label="Episodes",
            value=f"{len(episodes):,}",
            note=f"{num_policies:,} {kinds} on {plural(num_tasks, 'task')}",
        ),
        _best_heldout(scores, models),
        Headline(
            label="Finished",
            value=f"{finished:,} of {len(episodes):,}" if episodes else MISSING,
            note=", ".join(others) or ("every episode" if episodes else "no episode"),
        ),
        Headline(
            label="Longest episode",
            value=plural(longest.turns, "turn") if longest else MISSING,
            note=f"{plural(longest.windows, 'window')}, {longest.policy}" if longest else "no episode",
        ),
        Headline(
            label="Live context = splitter",
            value=f"{equal:,} of {len(compared):,}" if compared else MISSING,
            note=f"episodes; {plural(sum(episode.prompts for episode in compared), 'prompt')} compared"
            if compared
            else "no prompt compared",
        ),
        Headline(
            label="Trained tokens",
            value=f"{account.trained_tokens:,}",
            note=f"{percent(account.trained_tokens, account.trainable_tokens)} of the trainable, "
            f"in {plural(account.windows, 'window')}"
            if account.trainable_tokens
            else "nothing to train",
        ),
    ]


def _best_heldout(scores: Sequence[ScoreRow], models: Sequence[str]) -> Headline:
    label = "Best held-out mean"
    heldout = [row for row in scores if row.split == HELDOUT and row.mean is not None]
    trained = [row for row in heldout if row.policy in models]
    best = max(trained or heldout, key=lambda row: row.mean or 0.0, default=None)
    if best is None:
        return Headline(label=label, value=MISSING, note="no scored held-out episode")
    error = f" ± {fixed(best.standard_error)}" if best.standard_error is not None else ""
    return Headline(label=label, value=fixed(best.mean), note=f"{best.policy}{error}, n = {best.scored:,}")


def findings(
    episodes: Sequence[EpisodeRow], account: TokenAccount, of_training: Sequence[Finding] = ()
) -> list[Finding]:
    """What must not be overlooked, defects first."""
    found = [*of_training, *_episode_findings(episodes), *_token_findings(account)]
    return sorted(found, key=lambda finding: not finding.defect)


def _episode_findings(episodes: Sequence[EpisodeRow]) -> list[Finding]:
    found: list[Finding] = []
    for episode in episodes:
        if episode.verdict is Verdict.DIFFERS:
            text = f"{episode.id}: the prompt the agent saw is not the one the splitter makes, {episode.detail}."
            found.append(Finding(text=text, defect=True))
    broken = Counter(episode.ending for episode in episodes if episode.ending in _BROKEN)
    found += [Finding(text=f"{plural(count, 'episode')} ended as {words(kind)}.") for kind, count in broken.items()]
    counts = {
        "without a score": sum(episode.score is None for episode in episodes),
        "not replayed: context unchecked": sum(episode.verdict is Verdict.NOT_REPLAYED for episode in episodes),
        "of a task that is in no split": sum(episode.split == NO_SPLIT for episode in episodes),
    }
    found += [Finding(text=f"{plural(count, 'episode')} {what}.") for what, count in counts.items() if count]
    return found


def _token_findings(account: TokenAccount) -> list[Finding]:
    found: list[Finding] = []
    if account.unaccounted_tokens:
        text = (
            f"{account.trainable_tokens:,} tokens are trainable, but {account.trained_tokens:,} trained and "
            f"{sum(account.dropped.values()):,} dropped do not add up to them."
        )
        found.append(Finding(text=text, defect=True))
    if account.shard_trained_tokens != account.trained_tokens:
        text = (
            f"The shard trains {account.shard_trained_tokens:,} tokens, its preprocessing report says "
            f"{account.trained_tokens:,}: they are not of one run."
        )
        found.append(Finding(text=text, defect=True))
    for reason, tokens in account.dropped.items():
        found.append(Finding(text=f"{plural(tokens, 'trainable token')} dropped: {words(reason)}."))
    for row in account.refusals:
        found.append(Finding(text=f"{plural(row.inputs, 'input')} refused: {words(row.reason)}."))
    if account.cuts_without_newest_turn:
        cuts = plural(account.cuts_without_newest_turn, "window")
        found.append(Finding(text=f"{cuts} begin without the agent's last turn, which was too long to keep."))
    return found
