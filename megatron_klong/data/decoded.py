"""A stored window or document -> pieces of text one can look at, and rows of its split plan.

Always: every token of a window is in exactly one piece, in order; a control token is told from text that spells it,
by its id; without a tokenizer pieces hold ids, and no phase of work is made up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from megatron_klong.data.shard import Shard, ShardError
from megatron_klong.trajectory.actions import Turn, actions_in
from megatron_klong.trajectory.context import Window, WindowEnd
from megatron_klong.trajectory.phases import Phase, turn_phases
from megatron_klong.trajectory.segments import SegmentKind, is_trained_mode, kind_of_mode
from megatron_klong.trajectory.split_plan import Layout, SplitRow, rows_of
from megatron_klong.trajectory.tokenizer import Tokenizer, TokenizerError, load_template_tokenizer, load_tokenizer

# Of a result this much is enough to see whether a run failed: how it begins, and how it ends.
_RESULT_HEAD_TOKENS, _RESULT_TAIL_TOKENS = 400, 200


class Part(StrEnum):
    """Where in its window a segment stands."""

    PREFIX = "prefix"
    OVERLAP = "overlap"
    NEW = "new"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Text, or one control token (or one id that has no text, or, without a tokenizer, ids)."""

    text: str
    control: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One segment of a window.  sequence: its number in the shard.  left_out_tokens: skipped just before it."""

    sequence: int
    kind: SegmentKind
    part: Part
    trained: bool
    tokens: int
    left_out_tokens: int
    runs: tuple[Run, ...]


def find_tokenizer(shard: Shard, path: Path | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer the shard was written with, or None and why: `path`, else the one its manifest names.

    Raises ShardError if `path` is another tokenizer, TokenizerError if it is none.
    """
    record = shard.manifest["tokenizer"]
    wanted = record["sha256"]
    if path is not None:
        given = _load(path, record)
        if given.sha256 != wanted:
            raise ShardError(
                f"{given.path}: not the tokenizer {shard.prefix} was written with ({given.sha256[:12]} instead of "
                f"{wanted[:12]}); pass the file it was preprocessed with"
            )
        return given, ""
    recorded = record.get("path")
    if not recorded:
        return None, "the manifest names no tokenizer; pass --tokenizer"
    if not Path(recorded).exists():
        return None, f"{recorded}, which the manifest names, is not here; pass --tokenizer"
    found = _load(Path(recorded), record)
    if found.sha256 != wanted:
        return None, f"{recorded} has changed since the shard was written; pass --tokenizer"
    return found, ""


def _load(path: Path, record: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file as the shard knew it: GLM-4.5's control tokens, those appended, or a template's.

    If none of them has the recorded hash, the last that could be loaded.
    """
    literals = "\n".join(record["control_tokens"])
    loaded: list[Tokenizer] = []
    errors: list[TokenizerError] = []
    for load in (
        load_tokenizer,
        partial(load_tokenizer, add_special_tokens=True),
        partial(load_template_tokenizer, literals=literals),
    ):
        try:
            loaded.append(load(path))
        except TokenizerError as error:
            errors.append(error)
            continue
        if loaded[-1].sha256 == record["sha256"]:
            return loaded[-1]
    if not loaded:
        raise errors[0]
    return loaded[-1]


def runs_of(ids: Sequence[int], tokenizer: Tokenizer | None) -> tuple[Run, ...]:
    """Ids as text and control tokens."""
    if tokenizer is None:
        return (Run(text=" ".join(map(str, ids)), control=False),) if len(ids) else ()
    names = {identifier: token for token, identifier in tokenizer.control.items()}
    runs: list[Run] = []
    text: list[int] = []

    def flush() -> None:
        if text:
            runs.append(Run(text=tokenizer.decode(text), control=False))
            text.clear()

    for identifier in map(int, ids):
        if identifier in names or identifier >= tokenizer.vocabulary_size:
            flush()
            runs.append(Run(text=names.get(identifier, f"<id {identifier}>"), control=True))
        else:
            text.append(identifier)
    flush()
    return tuple(runs)


def pieces(shard: Shard, window: int, tokenizer: Tokenizer | None) -> Iterator[Piece]:
    """The segments of one window, in order."""
    first_new, prefix = int(shard.column("first_new")[window]), int(shard.column("prefix_tokens")[window])
    all_count = shard.manifest["loss_on"] == "window"
    lengths = shard.index.lengths
    done = 0
    following = int(shard.index.bounds[int(shard.column("document")[window])])
    for part in shard.ranges(window):
        for number in part:
            skipped = int(lengths[following:number].sum())
            where = Part.NEW if number >= first_new else Part.PREFIX if done < prefix else Part.OVERLAP
            mode = int(shard.index.modes[number])
            yield Piece(
                sequence=number,
                kind=kind_of_mode(mode),
                part=where,
                trained=(where is Part.NEW or all_count) and is_trained_mode(mode),
                tokens=int(lengths[number]),
                left_out_tokens=skipped,
                runs=runs_of(shard.index.tokens(range(number, number + 1)).tolist(), tokenizer),
            )
            done += int(lengths[number])
            following = number + 1


def document_windows(shard: Shard, document: int) -> list[int]:
    """The numbers of the windows of a document."""
    return [int(number) for number in (shard.column("document") == document).nonzero()[0]]


def document_rows(
    shard: Shard, document: int, tokenizer: Tokenizer | None, windows: Sequence[int] | None = None
) -> tuple[SplitRow, ...]:
    """The split plan of a document as it was stored. windows: their numbers, if they are known already."""
    layout = document_layout(shard, document)
    numbers = document_windows(shard, document) if windows is None else windows
    phases = document_phases(shard, document, layout, tokenizer) if tokenizer else None
    first = int(shard.index.bounds[document])
    ends = shard.ends()
    return rows_of(layout, [_window(shard, number, first, ends[number]) for number in numbers], phases)


def document_layout(shard: Shard, document: int) -> Layout:
    """Kinds and lengths of the segments of a document."""
    start, stop = (int(bound) for bound in shard.index.bounds[document : document + 2])
    kinds = [kind_of_mode(mode) for mode in shard.index.modes[start:stop].tolist()]
    return Layout.of(kinds, shard.index.lengths[start:stop].tolist())


def document_phases(shard: Shard, document: int, layout: Layout, tokenizer: Tokenizer) -> list[Phase]:
    """The phase of each turn of a document, from its replies and what came back."""
    first = int(shard.index.bounds[document])
    replies = [""] * (1 + max(layout.turns, default=-1))
    results = list(replies)
    for number, (kind, turn) in enumerate(zip(layout.kinds, layout.turns, strict=True)):
        if turn < 0 or kind not in (SegmentKind.ANSWER, SegmentKind.OBSERVATION, SegmentKind.USER):
            continue
        ids = shard.index.tokens(range(first + number, first + number + 1)).tolist()
        if kind is SegmentKind.ANSWER:
            replies[turn] += _text(ids, tokenizer)
            continue
        if len(ids) > _RESULT_HEAD_TOKENS + _RESULT_TAIL_TOKENS:
            results[turn] += _text(ids[:_RESULT_HEAD_TOKENS], tokenizer) + "\n"
            ids = ids[-_RESULT_TAIL_TOKENS:]
        results[turn] += _text(ids, tokenizer) + "\n"
    return turn_phases(
        Turn(actions=actions_in(reply), results=printed) for reply, printed in zip(replies, results, strict=True)
    )


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode([identifier for identifier in ids if identifier < tokenizer.vocabulary_size])


def _window(shard: Shard, number: int, first: int, end: WindowEnd) -> Window:
    """A stored window as its document sees it: segments numbered from 0."""
    counts = ("prefix_tokens", "overlap_tokens", "new_tokens", "trained_tokens")
    return Window(
        ranges=tuple(range(part.start - first, part.stop - first) for part in shard.ranges(number)),
        first_new=int(shard.column("first_new")[number]) - first,
        end=end,
        **{name: int(shard.column(name)[number]) for name in counts},
    )
