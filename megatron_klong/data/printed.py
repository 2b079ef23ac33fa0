"""A summary, a document's split plan and a window as lines of text for people."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from megatron_klong.data.decoded import Part, Piece
from megatron_klong.data.marked import Mark, marked_lines
from megatron_klong.data.shard import Shard
from megatron_klong.data.summary import ShardSummary, Spread
from megatron_klong.data.terminal import Span, Style, Terminal
from megatron_klong.data.visible import one_line
from megatron_klong.tables import aligned
from megatron_klong.trajectory.split_plan import SplitRow

_BAR_CELLS = 24
_GUTTER = 22
_PART_NOTES = {
    Part.PREFIX: "pinned",
    Part.OVERLAP: "history",
    Part.NEW: "in no earlier window",
}


def summary_lines(summary: ShardSummary, terminal: Terminal) -> Iterator[str]:
    """The whole shard on one screen."""
    policy = summary.policy
    yield terminal.paint(
        f"{summary.prefix}: {summary.documents:,} documents, {summary.windows:,} windows of at most "
        f"{policy['max_tokens']:,} tokens",
        Style.TITLE,
    )
    yield from _facts(summary)
    yield from ("", terminal.paint("Tokens by kind", Style.TITLE))
    yield from _kind_table(summary)
    yield from ("", terminal.paint("Windows", Style.TITLE))
    yield from _window_table(summary)
    yield from ("", terminal.paint("Training", Style.TITLE))
    yield from _training_table(summary)
    yield from ("", terminal.paint("Phases of work", Style.TITLE))
    yield from _phase_table(summary)


def _facts(summary: ShardSummary) -> list[str]:
    policy, tokenizer = summary.policy, summary.tokenizer
    size = ", ".join(f"{suffix} {count:,}" for suffix, count in summary.file_bytes.items())
    rows = [
        ["policy", ", ".join(f"{name} {_number(value)}" for name, value in policy.items()) + _loss(summary)],
        ["tokenizer", f"{tokenizer['file']} {tokenizer['sha256'][:12]}, {tokenizer['vocabulary_size']:,} ids"],
        ["renderer", summary.renderer],
        ["formats", ", ".join(f"{count:,} {name}" for name, count in summary.formats.items()) or "none"],
        ["disk", f"{_ratio(summary.bytes_per_token)} bytes a stored token ({size})"],
    ]
    return aligned(rows, left=2, indent="  ")


def _loss(summary: ShardSummary) -> str:
    return f", loss_on {summary.loss_on}"


def _kind_table(summary: ShardSummary) -> list[str]:
    rows = [["", "stored", "trainable", "in windows", "trained", ""]]
    for row in summary.kinds:
        counts = (row.stored, row.trainable, row.in_windows, row.trained)
        name = row.kind.replace("_", " ")
        rows.append([name, *(f"{count:,}" for count in counts), _bar(row.in_windows, summary.window_tokens)])
    total = (summary.tokens, summary.trainable_tokens, summary.window_tokens, summary.trained_tokens)
    rows.append(["all", *(f"{count:,}" for count in total), ""])
    width = max(len(row[-1]) for row in rows)
    return aligned([[*row[:-1], row[-1].ljust(width)] for row in rows], indent="  ")


def _window_table(summary: ShardSummary) -> list[str]:
    ends = ", ".join(f"{count:,} {end}" for end, count in summary.ends.items())
    parts = ("prefix", "overlap", "new")
    shares = ", ".join(f"{part} {percent(getattr(summary, f'{part}_tokens'), summary.window_tokens)}" for part in parts)
    most = summary.policy["max_tokens"]
    rows = [
        ["end", ends or "none"],
        ["made of", shares],
        ["fill", _spread(summary.fill, lambda value: f"{100 * value:.1f} %") + f" of {most:,}"],
        ["overlap", _spread(summary.overlap, lambda value: f"{value:,.0f}") + " tokens of history behind the prefix"],
        ["in a document", _spread(summary.windows_per_document, lambda value: f"{value:,.1f}") + " windows"],
    ]
    if summary.windows_without_trained:
        rows.append(["train nothing", f"{summary.windows_without_trained:,} windows"])
    if summary.documents_without_window:
        rows.append(["in no window", f"{summary.documents_without_window:,} documents"])
    return aligned(rows, left=2, indent="  ")


def _training_table(summary: ShardSummary) -> list[str]:
    rows = [
        [f"trained {times_in_words(times)}", f"{tokens:,}", percent(tokens, summary.trainable_tokens)]
        for times, tokens in summary.times_trained.items()
    ]
    rows += [
        ["context tokens for one unique token", _ratio(summary.context_tokens_per_unique_token), ""],
        ["window tokens for one trained token", _ratio(summary.window_tokens_per_trained_token), ""],
    ]
    return aligned(rows, indent="  ")


def _phase_table(summary: ShardSummary) -> list[str]:
    if summary.phases_missing:
        return [f"  not known without the text: {summary.phases_missing}"]
    rows = [["", "windows", "such as", "turns", "trainable tokens", ""]]
    for row in summary.phases:
        example = "" if row.example is None else str(row.example)
        bar = _bar(row.trainable_tokens, summary.trainable_tokens)
        rows.append([row.phase, f"{row.windows:,}", example, f"{row.turns:,}", f"{row.trainable_tokens:,}", bar])
    width = max(len(row[-1]) for row in rows)
    return aligned([[*row[:-1], row[-1].ljust(width)] for row in rows], indent="  ")


def document_lines(shard: Shard, document: int, rows: Sequence[SplitRow], windows: Sequence[int]) -> Iterator[str]:
    """The split plan of a document. windows: their numbers in the shard."""
    entry = shard.documents[document]
    name, source = one_line(entry["id"]), one_line(entry["source"])
    yield f"document {document}: {name}, from {source}, {entry['turns']:,} turns, {len(rows)} windows"
    if not rows:
        yield "no window holds any of it: see the report of the preprocessing for the reason"
        return
    head = ["window", "new messages", "new turns", "end", "phase"]
    head += ["prefix", "overlap", "new", "trained", "with last", "with next"]
    lines = [head]
    for number, row in zip(windows, rows, strict=True):
        counts = (row.prefix_tokens, row.overlap_tokens, row.new_tokens, row.trained_tokens)
        shared = (row.shared_with_previous, row.shared_with_next)
        named = [str(number), f"{row.first_message}-{row.last_message}", f"{row.first_turn}-{row.last_turn}"]
        named += [row.end, _phase(row)]
        lines.append([*named, *(f"{count:,}" for count in counts + shared)])
    yield from aligned(lines, left=5)
    kinds = sorted({kind for row in rows for kind in row.tokens_by_kind})
    yield ""
    lines = [["window", *(kind.name.lower().replace("_", " ") for kind in kinds)]]
    for number, row in zip(windows, rows, strict=True):
        lines.append([str(number), *(f"{row.tokens_by_kind.get(kind, 0):,}" for kind in kinds)])
    yield from aligned(lines)


def _phase(row: SplitRow) -> str:
    if row.phase is None:
        return "?"
    return f"{row.phase} {row.turns_by_phase.get(row.phase, 0)} of {row.last_turn - row.first_turn + 1}"


def window_lines(
    shard: Shard, window: int, row: SplitRow, pieces: Iterator[Piece], terminal: Terminal, note: str
) -> Iterator[str]:
    """One window in full. note: why there is no text, if there is none."""
    document = int(shard.column("document")[window])
    total = row.prefix_tokens + row.overlap_tokens + row.new_tokens
    title = f"window {window} of {len(shard):,}, document {document}: {one_line(shard.documents[document]['id'])}"
    yield terminal.paint(title, Style.TITLE)
    yield (
        f"{total:,} of {shard.manifest['policy']['max_tokens']:,} tokens, {row.trained_tokens:,} trained; "
        f"new messages {row.first_message}-{row.last_message}; end: {row.end}; phase: {_phase(row)}"
    )
    if note:
        yield f"token ids instead of text: {note}"
    yield _legend(terminal)
    counts = {Part.PREFIX: row.prefix_tokens, Part.OVERLAP: row.overlap_tokens, Part.NEW: row.new_tokens}
    for part, inside in groupby(pieces, key=lambda piece: piece.part):
        yield terminal.rule(f"{part}: {counts[part]:,} tokens, {_PART_NOTES[part]}")
        for piece in inside:
            yield from _piece_lines(piece, terminal)


def _legend(terminal: Terminal) -> str:
    heavy = [Span("┃ trained", Style.TRAINED), Span("   "), Span("│ not trained", Style.QUIET), Span("   ")]
    control = Span("<|control|>" if terminal.color else "⟦<|control|>⟧", Style.CONTROL)
    unseen = [Span("⏎·⇥⟨ESC⟩", Style.SUBSTITUTE), Span(" unseen characters")]
    return terminal.line([*heavy, control, Span(" not text   "), *unseen])


def _piece_lines(piece: Piece, terminal: Terminal) -> Iterator[str]:
    if piece.left_out_tokens:
        yield terminal.paint(f"{'':{_GUTTER - 2}}┆ {piece.left_out_tokens:,} tokens left out", Style.BORDER)
    label = f"{piece.kind.name.lower().replace('_', ' '):<12}{piece.tokens:>7,} "
    bar = terminal.paint("┃ ", Style.TRAINED) if piece.trained else terminal.paint("│ ", Style.QUIET)
    for line in list(marked_lines(piece)) or [[]]:
        spans = [_span(text, mark, piece.trained, terminal.color) for text, mark in line]
        for part in terminal.wrapped(spans, _GUTTER):
            yield terminal.paint(label, Style.BORDER) + bar + part
            label = " " * (_GUTTER - 2)


def _span(text: str, mark: Mark, trained: bool, color: bool) -> Span:
    match mark:
        case Mark.CONTROL:
            return Span(text if color else f"⟦{text}⟧", Style.TRAINED_CONTROL if trained else Style.CONTROL)
        case Mark.SUBSTITUTE:
            return Span(text, Style.SUBSTITUTE)
        case Mark.TEXT:
            return Span(text, Style.TRAINED if trained else Style.QUIET)


def _spread(spread: Spread | None, show: Callable[[float], str]) -> str:
    if spread is None:
        return "no window"
    return ", ".join(f"{name} {show(getattr(spread, name))}" for name in ("smallest", "median", "mean", "largest"))


def _bar(part: int, whole: int) -> str:
    return "█" * round(_BAR_CELLS * part / whole) if whole else ""


def percent(part: float, whole: float) -> str:
    """A share of a whole that may be nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def times_in_words(times: int) -> str:
    """How often: never, once, 2 times."""
    return {0: "never", 1: "once"}.get(times, f"{times} times")


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
