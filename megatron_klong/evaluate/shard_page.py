"""A shard -> one HTML page that stands alone: summary, distributions, and a few windows with trained tokens marked.

Always: no script, nothing fetched; follows light and dark displays; text of transcripts is escaped and cannot act;
the same shard gives the same page; what a window holds beyond what the page shows is said.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_klong.data.decoded import Part, Piece, document_rows, document_windows, pieces
from megatron_klong.data.inspect import Inspection, damage_named
from megatron_klong.data.marked import Mark, MarkedLine, marked_lines
from megatron_klong.data.printed import times_in_words
from megatron_klong.data.shard import Shard
from megatron_klong.data.summary import ShardSummary
from megatron_klong.data.visible import one_line
from megatron_klong.evaluate.findings import MISSING, Finding, Headline, fixed, percent, plural, words
from megatron_klong.evaluate.shard_plots import (
    phases_of_work,
    tokens_by_kind,
    window_fill,
    window_overlap,
    windows_per_document,
)
from megatron_klong.evaluate.window_plots import window_composition
from megatron_klong.files import write_atomically
from megatron_klong.trajectory.split_plan import SplitRow

_TEMPLATE = "shard.html.jinja"
_SHOWN_WINDOWS = 4
_SHOWN_DOCUMENTS = 60
_SHOWN_PIECES = {Part.PREFIX: 12, Part.OVERLAP: 12, Part.NEW: 60}
_CONTEXT_CHARACTERS, _TRAINED_CHARACTERS = 900, 6000


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPiece:
    """A segment on the page. cut: how many characters of it are left out."""

    kind: str
    trained: bool
    tokens: int
    left_out_tokens: int
    lines: Sequence[MarkedLine]
    cut: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPart:
    """Prefix, overlap or new part. more: segments not shown, and their tokens."""

    part: Part
    tokens: int
    pieces: Sequence[ShownPiece]
    more: int
    more_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownWindow:
    number: int
    document: int
    id: str
    row: SplitRow
    parts: Sequence[ShownPart]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRow:
    number: int
    id: str
    source: str
    turns: int
    score: float | None
    tokens: int
    windows: int
    trained_tokens: int


def write_shard_page(inspection: Inspection, path: Path) -> Path:
    """Write the page, and return its path. Raises ShardError for a damaged shard."""
    shard = inspection.shard
    summary = inspection.summary()
    with damage_named(inspection.prefix):
        drawn = [
            window_composition(shard),
            tokens_by_kind(summary),
            phases_of_work(summary),
            window_fill(shard),
            window_overlap(shard),
            windows_per_document(shard),
        ]
        content = {
            "summary": summary,
            "headlines": _headlines(summary),
            "findings": _findings(summary),
            "plots": {plot.name: plot for plot in drawn if plot},
            "windows": list(_shown_windows(inspection, summary)),
            "documents": list(_documents(shard)),
            "shown_documents": _SHOWN_DOCUMENTS,
            "facts": _facts(shard, summary),
        }
    write_atomically(path, _environment().get_template(_TEMPLATE).render(content))
    return path


def _headlines(summary: ShardSummary) -> list[Headline]:
    trained = percent(summary.trainable_tokens - summary.never_trained_tokens, summary.trainable_tokens)
    fill = f"{100 * summary.fill.mean:.0f} %" if summary.fill else MISSING
    return [
        Headline(
            label="Transcripts", value=f"{summary.documents:,}", note=f"{plural(summary.turns, 'turn')} by the agent"
        ),
        Headline(
            label="Tokens stored",
            value=f"{summary.tokens:,}",
            note=f"{fixed(summary.bytes_per_token, 2)} bytes each on disk, index included",
        ),
        Headline(
            label="Windows", value=f"{summary.windows:,}", note=f"of at most {summary.policy['max_tokens']:,} tokens"
        ),
        Headline(
            label="Trained tokens", value=f"{summary.trained_tokens:,}", note=f"{trained} of what the agent wrote"
        ),
        Headline(label="Mean fill", value=fill, note="of a window"),
        Headline(
            label="Context tokens a unique token",
            value=fixed(summary.context_tokens_per_unique_token, 2),
            note="what prefix and overlap cost",
        ),
    ]


def _findings(summary: ShardSummary) -> list[Finding]:
    found = []
    if lost := summary.never_trained_tokens:
        share = percent(lost, summary.trainable_tokens)
        found.append(Finding(text=f"{lost:,} trainable tokens ({share}) are trained in no window."))
    if twice := sum(tokens for times, tokens in summary.times_trained.items() if times > 1):
        found.append(Finding(text=f"{twice:,} tokens are trained more than once.", defect=summary.loss_on == "new"))
    if summary.documents_without_window:
        found.append(Finding(text=f"{plural(summary.documents_without_window, 'transcript')} in no window."))
    if summary.windows_without_trained:
        found.append(Finding(text=f"{plural(summary.windows_without_trained, 'window')} without a trained token."))
    if summary.phases_missing:
        found.append(Finding(text=f"Ids instead of text, and no phases of work: {summary.phases_missing}."))
    return found


def _shown_windows(inspection: Inspection, summary: ShardSummary) -> Iterator[ShownWindow]:
    """For each of the most frequent phases its first window; without phases the first, the middle and the last."""
    shard = inspection.shard
    frequent = sorted(summary.phases, key=lambda row: -row.windows)[:_SHOWN_WINDOWS]
    chosen = {row.example for row in frequent if row.example is not None}
    if not chosen and len(shard):
        chosen = {0, len(shard) // 2, len(shard) - 1}
    for number in sorted(chosen):
        yield _shown_window(inspection, number)


def _shown_window(inspection: Inspection, number: int) -> ShownWindow:
    shard = inspection.shard
    document = int(shard.column("document")[number])
    rows = document_rows(shard, document, inspection.tokenizer)
    found = pieces(shard, number, inspection.tokenizer)
    return ShownWindow(
        number=number,
        document=document,
        id=one_line(shard.documents[document]["id"]),
        row=rows[document_windows(shard, document).index(number)],
        parts=[_shown_part(part, list(inside)) for part, inside in groupby(found, key=lambda piece: piece.part)],
    )


def _shown_part(part: Part, inside: Sequence[Piece]) -> ShownPart:
    shown, rest = inside[: _SHOWN_PIECES[part]], inside[_SHOWN_PIECES[part] :]
    return ShownPart(
        part=part,
        tokens=sum(piece.tokens for piece in inside),
        pieces=[_shown_piece(piece) for piece in shown],
        more=len(rest),
        more_tokens=sum(piece.tokens for piece in rest),
    )


def _shown_piece(piece: Piece) -> ShownPiece:
    """A segment, cut to a readable length."""
    room = _TRAINED_CHARACTERS if piece.trained else _CONTEXT_CHARACTERS
    lines: list[MarkedLine] = []
    cut = 0
    for line in marked_lines(piece):
        kept: MarkedLine = []
        for text, mark in line:
            kept.append((text[: max(0, room)], mark))
            cut += len(text) - len(kept[-1][0])
            room -= len(text)
        if any(text for text, _ in kept) or room > 0:
            lines.append(kept)
    return ShownPiece(
        kind=words(piece.kind.name.lower()),
        trained=piece.trained,
        tokens=piece.tokens,
        left_out_tokens=piece.left_out_tokens,
        lines=lines,
        cut=cut,
    )


def _documents(shard: Shard) -> Iterator[DocumentRow]:
    lengths = np.diff(np.concatenate([[0], np.cumsum(shard.index.lengths, dtype=np.int64)])[shard.index.bounds])
    windows = np.bincount(shard.column("document"), minlength=len(shard.documents))
    trained = np.bincount(shard.column("document"), shard.column("trained_tokens"), minlength=len(shard.documents))
    for number, entry in enumerate(shard.documents[:_SHOWN_DOCUMENTS]):
        yield DocumentRow(
            number=number,
            id=one_line(entry["id"]),
            source=one_line(entry["source"]),
            turns=entry["turns"],
            score=entry["score"],
            tokens=int(lengths[number]),
            windows=int(windows[number]),
            trained_tokens=int(trained[number]),
        )


def _facts(shard: Shard, summary: ShardSummary) -> dict[str, str]:
    policy = {words(name): str(value) for name, value in summary.policy.items()}
    tokenizer = f"{summary.tokenizer['file']}, {summary.tokenizer['vocabulary_size']:,} ids"
    files = {
        f"{shard.prefix.name}{suffix}": f"{entry['bytes']:,} bytes, SHA-256 {entry['sha256']}"
        for suffix, entry in shard.manifest["files"].items()
    }
    return {
        **policy,
        "loss on": summary.loss_on,
        "renderer": summary.renderer,
        "tokenizer": f"{tokenizer}, SHA-256 {summary.tokenizer['sha256']}",
        **files,
    }


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
        words=words,
        count=lambda number: f"{number:,}",
        data_uri=lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
    )
    environment.globals.update(
        percent=percent, plural=plural, times_in_words=times_in_words, Mark=Mark, Part=Part, missing=MISSING
    )
    return environment
