"""Input files -> units of work: what one process does at a time, and what is a part on disk when it is done.

Small files come in groups, whose worker reads them itself; a large file is read here, once, and its transcripts are
handed out in groups. Units depend on the input alone, never on how many processes there are, and a unit's name on all
that its part depends on: the settings, the program, and the size and time of change of its files.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.importers.refusal import Refusal
from megatron_klong.trajectory.schema import Transcript

UNIT_BYTES = 8 << 20  # the largest; a part is some files on disk, so that there should not be too many
_SMALLEST = 16  # a smallest unit is so many times smaller
_UNITS = 64  # and between the two, input comes in so many: the last ones are what processes wait for at the end
_LARGE_FILE_UNITS = 4


class InputChangedError(ValueError):
    """A file of the input changed while it was read; the message names it."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file as it was found."""

    path: str
    size_bytes: int
    modified_ns: int

    def check(self) -> None:
        """Raises InputChangedError unless it is still the same."""
        if _look(Path(self.path)) != self:
            raise InputChangedError(f"{self.path}: changed while it was read; run again when nothing writes to it")


@dataclass(frozen=True, slots=True)
class Unit:
    """items: what a large file holds from item `first_item` on; None: read the files."""

    name: str
    files: tuple[InputFile, ...]
    items: tuple[Transcript | Refusal, ...] | None = None
    first_item: int = 0

    def read(self) -> Iterator[Transcript | Refusal]:
        """Its transcripts and refusals in order."""
        if self.items is not None:
            yield from self.items
            return
        for file in self.files:
            yield from read_transcripts(Path(file.path))
            file.check()


def find_files(inputs: Sequence[Path]) -> list[InputFile]:
    """All transcript files in the order of the input. Raises FileNotFoundError for an input that is not there."""
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of transcripts")
    return [_look(file) for path in inputs for file in transcript_files(path)]


def _look(file: Path) -> InputFile:
    if not file.exists():  # gone since the folder was listed: reading it will say so
        return InputFile(str(file), -1, -1)
    status = file.stat()
    return InputFile(str(file), status.st_size, status.st_mtime_ns)


def make_units(files: Sequence[InputFile], settings: str) -> Iterator[Unit]:
    """The units in the order of the input; settings: a digest of all else that parts depend on."""
    group: list[InputFile] = []
    unit_bytes = _unit_bytes(files)
    for file in files:
        large = file.size_bytes > _LARGE_FILE_UNITS * unit_bytes
        if group and (large or sum(one.size_bytes for one in group) + file.size_bytes > unit_bytes):
            yield Unit(_name(settings, group, 0), tuple(group))
            group = []
        if large:
            yield from _units_of_large_file(file, settings, unit_bytes)
        else:
            group.append(file)
    if group:
        yield Unit(_name(settings, group, 0), tuple(group))


def _unit_bytes(files: Sequence[InputFile]) -> int:
    total = sum(file.size_bytes for file in files)
    return min(UNIT_BYTES, max(UNIT_BYTES // _SMALLEST, total // _UNITS))


def _units_of_large_file(file: InputFile, settings: str, unit_bytes: int) -> Iterator[Unit]:
    first, size = 0, 0
    items: list[Transcript | Refusal] = []
    for item in read_transcripts(Path(file.path)):
        items.append(item)
        size += _characters(item)
        if size >= unit_bytes:
            yield Unit(_name(settings, [file], first), (file,), tuple(items), first)
            first, size, items = first + len(items), 0, []
    if items:
        yield Unit(_name(settings, [file], first), (file,), tuple(items), first)
    file.check()


def _characters(item: Transcript | Refusal) -> int:
    if isinstance(item, Refusal):
        return len(item.detail)
    return sum(
        len(message.content)
        + len(message.reasoning or "")
        + sum(len(str(call.arguments)) for call in message.tool_calls)
        for message in item.messages
    )


def _name(settings: str, files: Sequence[InputFile], first_item: int) -> str:
    parts = [settings, [(file.path, file.size_bytes, file.modified_ns) for file in files], first_item]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def program_digest() -> str:
    """Changes with any line of the code that decides what a part holds, so that no part of older code is used."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("trajectory", "data"):
        for file in sorted((Path(__file__).parent.parent / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
