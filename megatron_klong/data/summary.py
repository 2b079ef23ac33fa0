"""A shard -> the numbers that say what is in it and what training on it costs.

Always: computed from the index and the windows, not copied from the manifest; with loss on what is new, every
trainable token is counted as trained once or as never trained. Text is read only for the phases of work.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_klong.data.decoded import document_layout, document_phases
from megatron_klong.data.shard import Shard
from megatron_klong.trajectory.phases import Phase, window_phase
from megatron_klong.trajectory.segments import SegmentKind, is_trained_mode, kind_of_mode
from megatron_klong.trajectory.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A distribution in five numbers."""

    smallest: float
    median: float
    mean: float
    p95: float
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KindRow:
    """Tokens of one kind: stored once; trainable of them; in all windows, repeats counted; trained, likewise."""

    kind: str
    stored: int
    trainable: int
    in_windows: int
    trained: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRow:
    """A phase of work: the windows that teach it by majority, all its turns, and their trainable tokens.

    example: the number of its first window, None where it is nowhere the majority.
    """

    phase: Phase
    windows: int
    example: int | None
    turns: int
    trainable_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSummary:
    """The whole shard. Counts of windows count a token once for each window that holds it.

    times_trained: trainable tokens by how often they are trained.  fill: tokens of a window / max_tokens.
    overlap: history a window begins with behind its prefix, in tokens; None, as fill, without windows.
    phases: empty where no tokenizer is at hand, and phases_missing says why.
    """

    prefix: str
    renderer: str
    loss_on: str
    tokenizer: Mapping[str, Any]
    policy: Mapping[str, Any]
    file_bytes: Mapping[str, int]
    formats: Mapping[str, int]
    documents: int
    documents_without_window: int
    turns: int
    segments: int
    tokens: int
    trainable_tokens: int
    windows: int
    windows_without_trained: int
    window_tokens: int
    distinct_window_tokens: int
    prefix_tokens: int
    overlap_tokens: int
    new_tokens: int
    trained_tokens: int
    kinds: tuple[KindRow, ...]
    ends: Mapping[str, int]
    times_trained: Mapping[int, int]
    fill: Spread | None
    overlap: Spread | None
    windows_per_document: Spread | None
    phases: tuple[PhaseRow, ...]
    phases_missing: str

    @property
    def never_trained_tokens(self) -> int:
        """Trainable tokens that no window trains."""
        return self.times_trained.get(0, 0)

    @property
    def context_tokens_per_unique_token(self) -> float | None:
        """What overlap and prefix cost: tokens of the windows for one token that is in any of them."""
        return self.window_tokens / self.distinct_window_tokens if self.distinct_window_tokens else None

    @property
    def window_tokens_per_trained_token(self) -> float | None:
        return self.window_tokens / self.trained_tokens if self.trained_tokens else None

    @property
    def bytes_per_token(self) -> float | None:
        """All files of the shard on disk, for one stored token."""
        return sum(self.file_bytes.values()) / self.tokens if self.tokens else None

    def as_json(self) -> dict[str, Any]:
        """All fields and ratios, for programs."""
        ratios = ("context_tokens_per_unique_token", "window_tokens_per_trained_token", "bytes_per_token")
        return asdict(self) | {name: getattr(self, name) for name in ratios}


def summarise(shard: Shard, tokenizer: Tokenizer | None, phases_missing: str = "") -> ShardSummary:
    """Count a shard. The phases of work need its text, so they are left out without a tokenizer."""
    lengths = shard.index.lengths.astype(np.int64)
    modes = np.unique(shard.index.modes)
    trainable = np.isin(shard.index.modes, [mode for mode in modes if is_trained_mode(int(mode))])
    seen, trained = times_per_sequence(shard)
    trained = np.where(trainable, trained, 0)
    windows_of = np.bincount(shard.column("document"), minlength=len(shard.documents))
    window_tokens = _window_tokens(shard)
    counted = {name: int(shard.column(name).sum()) for name in ("prefix_tokens", "overlap_tokens", "new_tokens")}
    return ShardSummary(
        prefix=str(shard.prefix),
        renderer=shard.manifest["renderer"],
        loss_on=shard.manifest["loss_on"],
        tokenizer={name: value for name, value in shard.manifest["tokenizer"].items() if name != "control_tokens"},
        policy=shard.manifest["policy"],
        file_bytes={suffix: entry["bytes"] for suffix, entry in shard.manifest["files"].items()},
        formats=dict(Counter(document.get("format") or "not recorded" for document in shard.documents)),
        documents=len(shard.documents),
        documents_without_window=int((windows_of == 0).sum()),
        turns=sum(document["turns"] for document in shard.documents),
        segments=len(lengths),
        tokens=int(lengths.sum()),
        trainable_tokens=int(lengths[trainable].sum()),
        windows=len(shard),
        windows_without_trained=int((shard.column("trained_tokens") == 0).sum()),
        window_tokens=int(window_tokens.sum()),
        distinct_window_tokens=int(lengths[seen > 0].sum()),
        trained_tokens=int((lengths * trained).sum()),
        kinds=_kinds(shard, lengths, trainable, seen, trained),
        ends={str(end): count for end, count in Counter(shard.ends()).most_common()},
        times_trained={
            int(times): int(lengths[trainable & (trained == times)].sum()) for times in np.unique(trained[trainable])
        },
        fill=_spread(window_tokens / shard.manifest["policy"]["max_tokens"]),
        overlap=_spread(shard.column("overlap_tokens")),
        windows_per_document=_spread(windows_of),
        phases=_phases(shard, tokenizer, lengths, trainable) if tokenizer else (),
        phases_missing=phases_missing,
        **counted,
    )


def times_per_sequence(shard: Shard) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many windows hold each sequence, and how many of them would train it if its mode says so."""
    ranges, bounds = shard.column("ranges"), shard.column("range_bounds")
    first_trained = np.repeat(shard.column("first_new"), np.diff(bounds))
    if shard.manifest["loss_on"] == "window":
        first_trained = ranges[:, 0]
    counts = []
    for starts in (ranges[:, 0], np.minimum(np.maximum(ranges[:, 0], first_trained), ranges[:, 1])):
        steps = np.zeros(len(shard.index.lengths) + 1, dtype=np.int64)
        np.add.at(steps, starts, 1)
        np.add.at(steps, ranges[:, 1], -1)
        counts.append(np.cumsum(steps)[:-1])
    return counts[0], counts[1]


def _window_tokens(shard: Shard) -> NDArray[np.int64]:
    parts = (shard.column(f"{name}_tokens") for name in ("prefix", "overlap", "new"))
    return np.sum(list(parts), axis=0, dtype=np.int64)


def _kinds(
    shard: Shard,
    lengths: NDArray[np.int64],
    trainable: NDArray[np.bool_],
    seen: NDArray[np.int64],
    trained: NDArray[np.int64],
) -> tuple[KindRow, ...]:
    """Kinds that occur, in the order of their numbers."""
    modes: dict[SegmentKind, list[int]] = {}
    for mode in np.unique(shard.index.modes).tolist():
        modes.setdefault(kind_of_mode(mode), []).append(mode)
    rows = []
    for kind in sorted(modes):
        inside = np.isin(shard.index.modes, modes[kind])
        rows.append(
            KindRow(
                kind=kind.name.lower(),
                stored=int(lengths[inside].sum()),
                trainable=int(lengths[inside & trainable].sum()),
                in_windows=int((lengths * seen)[inside].sum()),
                trained=int((lengths * trained)[inside].sum()),
            )
        )
    return tuple(rows)


def _phases(
    shard: Shard, tokenizer: Tokenizer, lengths: NDArray[np.int64], trainable: NDArray[np.bool_]
) -> tuple[PhaseRow, ...]:
    windows: Counter[Phase] = Counter()
    turns: Counter[Phase] = Counter()
    tokens: Counter[Phase] = Counter()
    examples: dict[Phase, int] = {}
    order = np.argsort(shard.column("document"), kind="stable")
    borders = np.searchsorted(shard.column("document")[order], np.arange(len(shard.documents) + 1))
    for document in tqdm(range(len(shard.documents)), desc="phases", unit="document", delay=2, disable=None):
        layout = document_layout(shard, document)
        phases = document_phases(shard, document, layout, tokenizer)
        turns.update(phases)
        first = int(shard.index.bounds[document])
        for number, turn in enumerate(layout.turns, start=first):
            if turn >= 0 and trainable[number]:
                tokens[phases[turn]] += int(lengths[number])
        for window in order[borders[document] : borders[document + 1]]:
            first_turn = layout.turns[int(shard.column("first_new")[window]) - first]
            last_turn = layout.turns[shard.ranges(window)[-1][-1] - first]
            phase = window_phase(phases[first_turn : last_turn + 1])
            windows[phase] += 1
            examples[phase] = min(int(window), examples.get(phase, int(window)))
    return tuple(
        PhaseRow(
            phase=phase,
            windows=windows[phase],
            example=examples.get(phase),
            turns=turns[phase],
            trainable_tokens=tokens[phase],
        )
        for phase in Phase
        if turns[phase]
    )


def _spread(values: NDArray[Any]) -> Spread | None:
    if not len(values):
        return None
    smallest, median, p95, largest = (float(value) for value in np.quantile(values, [0, 0.5, 0.95, 1]))
    return Spread(smallest=smallest, median=median, mean=float(values.mean()), p95=p95, largest=largest)
