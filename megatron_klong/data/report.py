"""What one run of preprocessing did: counts, by format and in all, and what was left out and why.

Always: reports of parts add up to the report of the whole, in whatever pieces it was made.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from megatron_klong.data.loss_on import LossOn, TrainedCounts
from megatron_klong.tables import aligned
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.segments import RenderedTranscript
from megatron_klong.trajectory.windows import SplitPlan


@dataclass(kw_only=True)
class FormatCounts:
    """The transcripts of one format."""

    transcripts: int = 0
    turns: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    windows: int = 0
    dropped_tokens: Counter[str] = field(default_factory=Counter)


@dataclass(kw_only=True)
class PreprocessReport:
    """Token counts are of the stored transcripts, `window_tokens` and `trained_tokens` count repeats.

    times_trained: how often a token is trained -> so many tokens.  longest_head_tokens: the longest tools and task,
    which every window must hold.
    """

    loss_on: LossOn = "new"
    files: int = 0
    transcripts: int = 0
    turns: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    trained_tokens: int = 0
    windows: int = 0
    window_tokens: int = 0
    prefix_tokens: int = 0
    overlap_tokens: int = 0
    longest_head_tokens: int = 0
    window_ends: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    times_trained: Counter[str] = field(default_factory=Counter)
    cuts_without_newest_turn: int = 0
    formats: dict[str, FormatCounts] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def add(
        self, transcript: Transcript, rendered: RenderedTranscript, plan: SplitPlan, trained: TrainedCounts
    ) -> None:
        """Count one transcript."""
        dropped = {str(reason): count for reason, count in plan.dropped_tokens.items()}
        counts = FormatCounts(
            transcripts=1,
            turns=transcript.turns,
            tokens=sum(map(len, rendered.segments)),
            trained_tokens=sum(trained.windows),
            windows=len(plan.windows),
            dropped_tokens=Counter(dropped),
        )
        self.trainable_tokens += plan.trainable_tokens
        self.longest_head_tokens = max(self.longest_head_tokens, rendered.head_tokens)
        self.times_trained.update({str(often): tokens for often, tokens in trained.times.items()})
        self.cuts_without_newest_turn += plan.cuts_without_newest_turn
        for window in plan.windows:
            self.window_tokens += window.tokens
            self.prefix_tokens += window.prefix_tokens
            self.overlap_tokens += window.overlap_tokens
            self.window_ends[str(window.end)] += 1
        _add(self, counts)
        _add(self.formats.setdefault(transcript.format or "unnamed", FormatCounts()), counts)

    def absorb(self, part: Self) -> None:
        """Count what another report counted."""
        _add(self, part)
        for name in ("files", "trainable_tokens", "window_tokens", "prefix_tokens", "overlap_tokens"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.cuts_without_newest_turn += part.cuts_without_newest_turn
        self.longest_head_tokens = max(self.longest_head_tokens, part.longest_head_tokens)
        self.window_ends.update(part.window_ends)
        self.times_trained.update(part.times_trained)
        for name, counts in part.formats.items():
            _add(self.formats.setdefault(name, FormatCounts()), counts)
        self.refusals += part.refusals

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The report that `as_json` wrote."""
        counters = {name: Counter(content[name]) for name in ("window_ends", "dropped_tokens", "times_trained")}
        formats = {
            name: FormatCounts(**{**counts, "dropped_tokens": Counter(counts["dropped_tokens"])})
            for name, counts in content["formats"].items()
        }
        refusals = [
            Refusal(source=found["source"], reason=RefusalReason(found["reason"]), detail=found["detail"])
            for found in content["refusals"]
        ]
        rest = {name: value for name, value in content.items() if name not in _DERIVED}
        return cls(**{**rest, **counters, "formats": formats, "refusals": refusals})

    def as_json(self) -> dict[str, Any]:
        """All counts, and two that follow from them: see _DERIVED."""
        unique = sum(self.times_trained.values())
        formats = {
            name: {**vars(counts), "dropped_tokens": _sorted(counts.dropped_tokens)}
            for name, counts in sorted(self.formats.items())
        }
        return {
            **vars(self),
            "window_ends": _sorted(self.window_ends),
            "dropped_tokens": _sorted(self.dropped_tokens),
            "times_trained": dict(sorted(self.times_trained.items(), key=lambda pair: int(pair[0]))),
            "formats": formats,
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "trained_per_unique_token": round(self.trained_tokens / unique, 4) if unique else None,
            "context_per_unique_token": round(self.window_tokens / self.tokens, 4) if self.tokens else None,
        }

    def summary(self) -> str:
        """A table by format and a few lines for a person."""
        lines = [
            f"{self.transcripts:,} transcripts from {self.files:,} files: {self.turns:,} turns, {self.tokens:,} "
            f"tokens, {self.trainable_tokens:,} of them trainable",
            f"{self.windows:,} windows: {self.window_tokens:,} tokens "
            f"({_share(self.prefix_tokens, self.window_tokens)} prefix, "
            f"{_share(self.overlap_tokens, self.window_tokens)} overlap), {self.trained_tokens:,} trained",
        ]
        if self.loss_on == "window" and self.trained_tokens:
            lines.append(self._repeats())
        if self.formats:
            lines += _table(self.formats)
        for reason, tokens in sorted(self.dropped_tokens.items()):
            lines.append(f"dropped, {reason}: {tokens:,} trainable tokens (longest task: {self.longest_head_tokens:,})")
        for reason, count in sorted(Counter(str(refusal.reason) for refusal in self.refusals).items()):
            first = next(refusal for refusal in self.refusals if refusal.reason == reason)
            lines.append(f"refused, {reason}: {count} (first: {first.source}: {first.detail})")
        return "\n".join(lines)

    def _repeats(self) -> str:
        unique = sum(self.times_trained.values())
        often = sorted(self.times_trained.items(), key=lambda pair: int(pair[0]))
        shown = ", ".join(f"{times}x {tokens:,}" for times, tokens in often[:6]) + (", ..." if len(often) > 6 else "")
        return (
            f"a token is trained {self.trained_tokens / unique:.2f} times on average ({shown}); "
            f"{self.window_tokens / self.tokens:.2f} context tokens a token"
        )


_DERIVED = ("trained_per_unique_token", "context_per_unique_token")
_SHARED = ("transcripts", "turns", "tokens", "trained_tokens", "windows")


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _add(total: PreprocessReport | FormatCounts, counts: PreprocessReport | FormatCounts) -> None:
    for name in _SHARED:
        setattr(total, name, getattr(total, name) + getattr(counts, name))
    total.dropped_tokens.update(counts.dropped_tokens)


def _table(formats: Mapping[str, FormatCounts]) -> list[str]:
    titles = ["format", "transcripts", "turns", "tokens", "trained", "windows", "dropped"]
    rows = [
        [name, *(f"{getattr(counts, field):,}" for field in _SHARED), f"{counts.dropped_tokens.total():,}"]
        for name, counts in sorted(formats.items())
    ]
    return aligned([titles, *rows])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"
