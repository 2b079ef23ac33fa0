"""Rows of a public data set -> JSON Lines in columns that tools/preprocess_trajectories.py knows.

    python -m examples.glm45_air_106b.columns downloads/openmathinstruct2/data --out data/raw/maths/openmath.jsonl \
        --turn problem=human --turn generated_solution=gpt

Always: a row is written whole or counted as left out, with the reason; other columns stay as they are (dates become
text), so that id, task, tools and score are still there; `--out` appears once it is whole.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klong.files import atomic_file
from megatron_klong.trajectory.importers import transcript_files
from megatron_klong.trajectory.importers.reading import read_values
from megatron_klong.trajectory.importers.refusal import Refusal
from megatron_klong.trajectory.importers.registry import is_one_value

type Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """turns: (column, speaker as in ShareGPT), in the order in which they were said; they become `conversations`.

    renamed: (column, its new name).  only: (column, the value a row must have there).
    """

    turns: Pairs = ()
    renamed: Pairs = ()
    only: Pairs = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 not a single row to write."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.glm45_air_106b.columns",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", nargs="+", type=Path, help="files or folders: Parquet, Arrow, JSON, JSON Lines")
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON Lines to write")
    parser.add_argument(
        "--turn",
        action="append",
        type=_pair,
        default=[],
        metavar="COLUMN=SPEAKER",
        help="make a turn of a column: human, gpt, system, function_call (JSON calls) or observation",
    )
    parser.add_argument("--rename", action="append", type=_pair, default=[], metavar="COLUMN=NAME")
    parser.add_argument(
        "--only", action="append", type=_pair, default=[], metavar="COLUMN=VALUE", help="keep rows with this value"
    )
    options = parser.parse_args(arguments)
    change = Change(turns=tuple(options.turn), renamed=tuple(options.rename), only=tuple(options.only))
    try:
        counts = convert(options.input, options.out, change)
    except ValueError as error:
        print(f"columns: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{count:>12,} {what}" for what, count in counts.most_common()))
    return 0


def convert(inputs: Sequence[Path], out: Path, change: Change) -> Counter[str]:
    """How many rows were written, and how many left out for which reason. Raises ValueError if there are none."""
    counts: Counter[str] = Counter()
    with atomic_file(out) as file:
        for row in _rows(inputs, counts):
            changed = changed_row(row, change)
            if isinstance(changed, str):
                counts[changed] += 1
                continue
            file.write(json.dumps(changed, ensure_ascii=False, default=str).encode() + b"\n")
            counts["written"] += 1
        if not counts["written"]:
            reasons = ", ".join(f"{count:,} {what}" for what, count in counts.most_common()) or "no input"
            raise ValueError(f"no row to write ({reasons}); compare the columns of the data with --turn and --only")
    return counts


def changed_row(row: Mapping[str, Any], change: Change) -> dict[str, Any] | str:
    """The row as it is to be written, or why it is left out."""
    for column, value in change.only:
        if _shown(row.get(column)) != value:
            return f"left out: {column} is not {value}"
    for column, _ in (*change.turns, *change.renamed):
        if row.get(column) in (None, ""):
            return f"left out: nothing in {column}"
    moved = {column for column, _ in (*change.turns, *change.renamed)}
    made = {column: value for column, value in row.items() if column not in moved}
    made |= {name: row[column] for column, name in change.renamed}
    if change.turns:
        made["conversations"] = [{"from": speaker, "value": row[column]} for column, speaker in change.turns]
    return made


def _rows(inputs: Sequence[Path], counts: Counter[str]) -> Iterator[Mapping[str, Any]]:
    for file in (file for path in inputs for file in transcript_files(path)):
        for value in read_values(file, is_one_value=is_one_value):
            if isinstance(value, Refusal):
                counts[f"left out: {value.reason}"] += 1
                print(f"columns: {value.source}: {value.detail}", file=sys.stderr)
            elif isinstance(value.content, Mapping):
                yield value.content
            else:
                counts["left out: not a row of columns"] += 1


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _pair(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form COLUMN=...")
    return left, right


if __name__ == "__main__":
    sys.exit(main())
