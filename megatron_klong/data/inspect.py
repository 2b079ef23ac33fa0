"""What one can ask of a finished shard, as printed lines: its summary, a window, a document, whether it is sound.

Always: damage is named by file; a number that is not in the shard is refused with the numbers that are.
"""

import argparse
import json
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_klong.data.decoded import document_rows, document_windows, find_tokenizer, pieces
from megatron_klong.data.printed import document_lines, summary_lines, window_lines
from megatron_klong.data.shard import Shard, ShardError
from megatron_klong.data.summary import ShardSummary, summarise
from megatron_klong.data.terminal import Style, Terminal
from megatron_klong.data.verify import verify
from megatron_klong.trajectory.tokenizer import Tokenizer

_SUFFIXES = (".manifest.json", ".bin", ".idx", ".windows.npz", ".documents.jsonl", ".report.json")
_SHOWN_FAULTS = 40
# What reading files that were cut or overwritten may raise.
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, struct.error, zipfile.BadZipFile, EOFError, OSError)


class Inspection:
    """One shard, opened for looking at. Checksums are left to `--verify`, so that opening a large shard is quick."""

    def __init__(self, prefix: Path, tokenizer: Path | None) -> None:
        """prefix: of the shard; the name of one of its files serves too. Raises ShardError, TokenizerError."""
        self.prefix = without_suffix(prefix)
        with damage_named(self.prefix):
            self.shard = Shard(self.prefix, verify_checksums=False)
        self.tokenizer: Tokenizer | None
        self.tokenizer, self.no_text = find_tokenizer(self.shard, tokenizer)

    def summary(self) -> ShardSummary:
        with damage_named(self.prefix):
            return summarise(self.shard, self.tokenizer, self.no_text)

    def summary_lines(self, terminal: Terminal) -> Iterator[str]:
        return summary_lines(self.summary(), terminal)

    def json_lines(self) -> Iterator[str]:
        yield json.dumps(self.summary().as_json(), indent=1)

    def document_lines(self, document: int) -> Iterator[str]:
        """The split plan of a document. Raises ShardError for a number that is none."""
        self._require("document", document, len(self.shard.documents))
        with damage_named(self.prefix):
            windows = document_windows(self.shard, document)
            rows = document_rows(self.shard, document, self.tokenizer)
        if self.no_text:
            yield f"phases are not known: {self.no_text}"
        yield from document_lines(self.shard, document, rows, windows)

    def window_lines(self, window: int, terminal: Terminal) -> Iterator[str]:
        """One window in full. Raises ShardError for a number that is none."""
        self._require("window", window, len(self.shard))
        with damage_named(self.prefix):
            document = int(self.shard.column("document")[window])
            rows = document_rows(self.shard, document, self.tokenizer)
            row = rows[document_windows(self.shard, document).index(window)]
            shown = pieces(self.shard, window, self.tokenizer)
            yield from window_lines(self.shard, window, row, shown, terminal, self.no_text)

    def _require(self, thing: str, number: int, count: int) -> None:
        if not 0 <= number < count:
            there = f"numbered 0 to {count - 1}" if count else "none"
            raise ShardError(f"{self.prefix}: no {thing} {number}; its {thing}s are {there}")


def add_inspect_options(parser: argparse.ArgumentParser) -> "argparse._MutuallyExclusiveGroup":
    """Add the shard and what to show of it; the group returned takes further things to show."""
    parser.add_argument("prefix", type=Path, help="shard path without suffix, such as data/sft")
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--window", type=int, metavar="N", help="print window N, trained tokens coloured")
    show.add_argument("--document", type=int, metavar="N", help="print the split plan of document N")
    show.add_argument("--json", action="store_true", help="print the summary for programs")
    show.add_argument("--verify", action="store_true", help="check every checksum, token id and window")
    parser.add_argument("--tokenizer", type=Path, help="its file or folder, where it is not where the manifest says")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="(default: auto)")
    return show


def inspect_lines(options: argparse.Namespace, terminal: Terminal) -> Iterator[str]:
    """What the options ask for, line by line. Raises ShardError, TokenizerError."""
    if options.verify:
        return verify_lines(options.prefix, terminal)
    shard = Inspection(options.prefix, options.tokenizer)
    if options.json:
        return shard.json_lines()
    if options.window is not None:
        return shard.window_lines(options.window, terminal)
    if options.document is not None:
        return shard.document_lines(options.document)
    return shard.summary_lines(terminal)


def verify_lines(prefix: Path, terminal: Terminal) -> Iterator[str]:
    """Check everything, and say so. Raises ShardError, with the first fault, for a shard that is not sound."""
    prefix = without_suffix(prefix)
    with damage_named(prefix):
        shard, wrong = verify(prefix)
    for fault in wrong[:_SHOWN_FAULTS]:
        yield terminal.paint(f"✗ {fault}", Style.BAD)
    if len(wrong) > _SHOWN_FAULTS:
        yield f"  and {len(wrong) - _SHOWN_FAULTS:,} more"
    if wrong:
        raise ShardError(f"{prefix}: {len(wrong):,} faults; delete {prefix}.* and preprocess again")
    files = ", ".join(shard.manifest["files"])
    yield terminal.paint(f"✓ {prefix} is sound", Style.GOOD)
    yield f"  checksums of {files}; the index of {len(shard.index.lengths):,} segments; every token id;"
    yield f"  {len(shard):,} windows: bounds, prefix, turns, new part, length, trained tokens; the manifest's counts"


@contextmanager
def damage_named(prefix: Path) -> Iterator[None]:
    """Turn what damaged files bring about into the name of the damaged file, by its checksum."""
    try:
        yield
    except ShardError:
        raise
    except _DAMAGE as error:
        reason = f"{prefix}: cannot be read ({type(error).__name__}: {error}); preprocess again"
        try:
            Shard(prefix, verify_checksums=True)
        except ShardError:
            raise
        except _DAMAGE:  # the manifest itself: no checksum says what it should be
            raise ShardError(reason) from error
        raise ShardError(reason) from error


def without_suffix(prefix: Path) -> Path:
    """The prefix, where one of its files was named."""
    for suffix in _SUFFIXES:
        if prefix.name.endswith(suffix):
            return prefix.with_name(prefix.name.removesuffix(suffix))
    return prefix
