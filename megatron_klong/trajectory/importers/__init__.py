"""Files of any supported format -> transcripts, one importer a format, the format detected from the content.

A file, or a row of it, that cannot be used is a `Refusal` with the reason, never an exception and never silence;
the rest of the input goes on. Reading holds one transcript at a time, whatever the size of the file.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_klong.trajectory.importers import inspect_logs
from megatron_klong.trajectory.importers.checks import check
from megatron_klong.trajectory.importers.formats import SessionFormat
from megatron_klong.trajectory.importers.opening import first_bytes, suffix_of
from megatron_klong.trajectory.importers.reading import MAX_TRANSCRIPT_BYTES, Value, read_values
from megatron_klong.trajectory.importers.refusal import MalformedRow, Refusal, RefusalReason
from megatron_klong.trajectory.importers.registry import is_one_value, row_format, session_format
from megatron_klong.trajectory.schema import Transcript

SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".traj", ".parquet", ".arrow", ".feather", ".eval"})
_HEAD_LINES = 20  # what a session format is shown
_HEAD_BYTES = 4 << 20  # unless they are longer than this


def transcript_files(path: Path) -> list[Path]:
    """The files under `path` (or `path` itself) that may hold transcripts, in a stable order.

    By suffix, with or without .gz or .zst. Hidden files are left out. Links are followed, each folder and each file
    once. A link to nothing and a folder that cannot be listed are in the list: reading them says so.
    """
    if not path.is_dir():
        return [path]
    found: list[Path] = []
    folders: set[str] = set()

    def keep(error: OSError) -> None:
        found.append(Path(error.filename))

    for name, subfolders, files in os.walk(path, followlinks=True, onerror=keep):
        if os.path.realpath(name) in folders:
            subfolders.clear()
            continue
        folders.add(os.path.realpath(name))
        subfolders[:] = sorted(folder for folder in subfolders if not folder.startswith("."))
        found += [Path(name, file) for file in files if not file.startswith(".") and suffix_of(Path(file)) in SUFFIXES]
    by_target: dict[str, Path] = {}
    for file in sorted(found):
        by_target.setdefault(os.path.realpath(file), file)
    return list(by_target.values())


def read_transcripts(file: Path, *, max_bytes: int = MAX_TRANSCRIPT_BYTES) -> Iterator[Transcript | Refusal]:
    """Every transcript of one file, or why not.

    max_bytes: of one transcript as it is written; a longer one is refused without being held.
    """
    head = first_bytes(file)
    if isinstance(head, Refusal):
        yield head
        return
    if inspect_logs.is_log(file, head):
        for found in inspect_logs.transcripts(file, max_bytes=max_bytes):
            if isinstance(found, Transcript):
                found = _checked(found, inspect_logs.FORMAT_NAME, f"{file}#{found.id}")
            yield found
        return
    items = read_values(file, is_one_value=is_one_value, max_bytes=max_bytes)
    held = _head(items)
    session = session_format([item.content for item in held if isinstance(item, Value)])
    if session:
        yield from _session(session, chain(_given_away(held), items), str(file))
        return
    for item in chain(_given_away(held), items):
        yield item if isinstance(item, Refusal) else _row(item, str(file))


def _head(items: Iterator[Value | Refusal]) -> list[Value | Refusal]:
    """As many values as it takes to tell rows, of which one is enough, from the lines of a session."""
    held: list[Value | Refusal] = []
    for item in items:
        held.append(item)
        values = [value for value in held if isinstance(value, Value)]
        if isinstance(item, Value) and row_format(item.content):
            break
        if len(values) == _HEAD_LINES or sum(value.size for value in values) > _HEAD_BYTES:
            break
    return held


def _given_away[T](held: list[T]) -> Iterator[T]:
    """The elements, each forgotten here as it goes."""
    while held:
        yield held.pop(0)


def _row(value: Value, file: str) -> Transcript | Refusal:
    place = f"{file}#{value.number}"
    format = row_format(value.content)
    if format is None:
        return Refusal(source=place, reason=RefusalReason.UNKNOWN_FORMAT, detail=_looks(value.content))
    try:
        transcript = format.transcript(value.content, file, value.number)
    except MalformedRow as error:
        return Refusal(source=place, reason=RefusalReason.MALFORMED, detail=f"{format.name}: {error}")
    return _checked(transcript, format.name, place)


def _session(format: SessionFormat, items: Iterator[Value | Refusal], file: str) -> Iterator[Transcript | Refusal]:
    """A damaged line ends the session: what the model saw after it is not known."""
    damage: list[Refusal] = []

    def lines() -> Iterator[Any]:
        for item in items:
            if isinstance(item, Refusal):
                damage.append(item)
                return
            if isinstance(item.content, dict):
                yield item.content

    try:
        for number, transcript in enumerate(format.transcripts(lines(), file)):
            yield _checked(transcript, format.name, f"{file}#{number}")
    except MalformedRow as error:
        yield Refusal(source=file, reason=RefusalReason.MALFORMED, detail=f"{format.name}: {error}")
    for line in damage:
        rest = sum(1 for _ in items)
        detail = f"{line.detail}; the session is used up to here, and {rest} lines after it are not"
        yield replace(line, detail=detail)


def _checked(transcript: Transcript, format: str, place: str) -> Transcript | Refusal:
    transcript = replace(transcript, format=format)
    refusal = check(transcript)
    return transcript if refusal is None else replace(refusal, source=place)


def _looks(content: Any) -> str:
    if isinstance(content, dict):
        keys = ", ".join(map(str, list(content)[:8]))
        return f"an object of no known format, with the keys {keys or '(none)'}"
    return f"neither an object nor a list of messages, but {type(content).__name__}"
