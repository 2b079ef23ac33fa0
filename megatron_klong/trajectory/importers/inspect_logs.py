"""Inspect AI logs -> transcripts: `.eval` (a zip, an entry a sample) and `.json` (one object with all samples).

Always: one sample is in memory at a time (of a `.json` log, its text as well); a damaged entry is a refusal and the
other samples go on. A log without header.json is of a run that was interrupted: its finished samples are read.
Inspect AI itself is not imported. Source of the layout: inspect_ai, `log/_recorders/eval.py` and `json.py`.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile, ZipInfo

from zstandard import ZstdDecompressor, ZstdError

from megatron_klong.trajectory.importers import inspect_samples
from megatron_klong.trajectory.importers.formats import Json
from megatron_klong.trajectory.importers.reading import MAX_TRANSCRIPT_BYTES
from megatron_klong.trajectory.importers.refusal import MalformedRow, Refusal, RefusalReason
from megatron_klong.trajectory.schema import Transcript

FORMAT_NAME = inspect_samples.FORMAT_NAME
_ZSTANDARD = 93  # the zip method that Python's zipfile knows from 3.14 on
_SAMPLE = re.compile(r"samples/.+_epoch_\d+\.json")
_CHUNKED_SAMPLE = re.compile(r"(samples/.+_epoch_\d+)/sample\.json")
_JSON_LOG = re.compile(rb'\s*\{\s*"version"\s*:\s*\d+\s*,\s*"status"\s*:\s*"\w+"\s*,\s*"eval"\s*:\s*\{')
_ENCRYPTED = 1  # the bit of an entry's flags
_BLANK = re.compile(r"[ \t\r\n]*")

type _Found = tuple[str, Mapping[str, Json], Json | Refusal]
"""Where a sample is, what the log says of the whole evaluation, and the sample."""


def is_log(path: Path, head: bytes) -> bool:
    """Whether the file is an Inspect log. head: its first bytes; some 200 are enough."""
    return path.suffix == ".eval" or (path.suffix == ".json" and _JSON_LOG.match(head) is not None)


def transcripts(path: Path, *, max_bytes: int = MAX_TRANSCRIPT_BYTES) -> Iterator[Transcript | Refusal]:
    """Every sample of a log, or why not. max_bytes: of one sample of an `.eval`; a longer one is not unpacked."""
    samples = _zip_samples(path, max_bytes) if path.suffix == ".eval" else _json_samples(path)
    empty = True
    try:
        for place, evaluation, sample in samples:
            empty = False
            yield sample if isinstance(sample, Refusal) else _transcript(sample, evaluation, path, place)
    except OSError as error:
        yield _refusal(path, RefusalReason.UNREADABLE, str(error))
    except BadZipFile as error:
        detail = f"{error}; of a run that was killed, `inspect log recover` may make a log"
        yield _refusal(path, RefusalReason.CORRUPT, detail)
    except UnicodeDecodeError as error:
        yield _refusal(path, RefusalReason.NOT_UTF8, str(error))
    except NotImplementedError as error:  # what a damaged directory of the archive asks for
        yield _refusal(path, RefusalReason.CORRUPT, f"{error}; copy the log again")
    except (ValueError, RecursionError) as error:
        yield _refusal(path, RefusalReason.NOT_JSON, str(error))
    else:
        if empty:
            yield _refusal(path, RefusalReason.EMPTY, "no sample in it; was the evaluation stopped before its first?")


def _transcript(sample: Json, evaluation: Mapping[str, Json], path: Path, place: str) -> Transcript | Refusal:
    try:
        made = inspect_samples.transcript(sample, evaluation, str(path))
    except MalformedRow as error:
        return _refusal(place, RefusalReason.MALFORMED, str(error))
    if made.turns == 0:
        return _refusal(place, RefusalReason.NO_TURN, "no reply of the model in it")
    return made


def _refusal(place: Path | str, reason: RefusalReason, detail: str) -> Refusal:
    return Refusal(source=str(place), reason=reason, detail=detail)


# -- .eval


def _zip_samples(path: Path, max_bytes: int) -> Iterator[_Found]:
    with path.open("rb") as file, ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}  # of entries written twice, the last counts
        evaluation = _evaluation(archive, file, entries)
        for name, info in entries.items():
            place = f"{path}#{name}"
            if chunked := _CHUNKED_SAMPLE.fullmatch(name):
                detail = f"{chunked[1]} is written in chunks; convert the log with `inspect log convert --to json`"
                yield place, evaluation, _refusal(place, RefusalReason.UNKNOWN_FORMAT, detail)
            elif _SAMPLE.fullmatch(name) and info.file_size > max_bytes:
                detail = f"a sample of {info.file_size:,} bytes; the limit on one transcript is {max_bytes:,}"
                yield place, evaluation, _refusal(place, RefusalReason.TOO_LARGE, detail)
            elif _SAMPLE.fullmatch(name):
                yield place, evaluation, _parsed(archive, file, info, place)


def _evaluation(archive: ZipFile, file: BinaryIO, entries: Mapping[str, ZipInfo]) -> Mapping[str, Json]:
    for name in ("header.json", "_journal/start.json"):
        if name in entries:
            found = _parsed(archive, file, entries[name], name)
            evaluation = found.get("eval") if isinstance(found, Mapping) else None
            if isinstance(evaluation, Mapping):
                return evaluation
    return {}


def _parsed(archive: ZipFile, file: BinaryIO, info: ZipInfo, place: str) -> Json | Refusal:
    try:
        return json.loads(_content(archive, file, info))
    except UnicodeDecodeError as error:
        return _refusal(place, RefusalReason.NOT_UTF8, str(error))
    except json.JSONDecodeError as error:
        return _refusal(place, RefusalReason.NOT_JSON, str(error))
    except (BadZipFile, zlib.error, ZstdError, EOFError) as error:
        return _refusal(place, RefusalReason.CORRUPT, f"{error}; the entry is damaged, copy the log again")
    except NotImplementedError as error:
        return _refusal(place, RefusalReason.BINARY, f"{error}; write the log again with Inspect")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        return _refusal(place, RefusalReason.NOT_JSON, str(error))


def _content(archive: ZipFile, file: BinaryIO, info: ZipInfo) -> bytes:
    if info.flag_bits & _ENCRYPTED:  # which Inspect never does, so it is damage
        raise BadZipFile(f"{info.filename!r} is marked as encrypted")
    if info.compress_type != _ZSTANDARD:
        return archive.read(info)
    file.seek(info.header_offset)
    header = file.read(30)  # the local one: its name and extra field may be longer than those in the directory
    lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    file.seek(info.header_offset + 30 + sum(lengths))
    compressed = BytesIO(file.read(info.compress_size))
    # Inspect begins a new frame every so many megabytes.
    content = ZstdDecompressor().stream_reader(compressed, read_across_frames=True).read(info.file_size + 1)
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise BadZipFile(f"bad checksum for {info.filename!r}")
    return content


# -- .json


def _json_samples(path: Path) -> Iterator[_Found]:
    evaluation: Mapping[str, Json] = {}
    for number, (key, value) in enumerate(_members(path.read_bytes().decode("utf-8"))):
        if key == "eval":
            evaluation = value
        elif key == "samples" and value is not None:
            yield f"{path}#{number}", evaluation, value


def _members(text: str) -> Iterator[tuple[str, Json]]:
    """The members of the outer object, those of "samples" one by one. Raises JSONDecodeError."""
    decode = json.JSONDecoder().raw_decode
    place = _expect(text, 0, "{")
    while True:
        key, place = decode(text, _skip(text, place))
        place = _skip(text, _expect(text, place, ":"))
        if key == "samples" and text.startswith("[", place):
            place = _skip(text, place + 1)
            while not text.startswith("]", place):
                value, place = decode(text, place)
                yield key, value
                place = _skip(text, place)
                if not text.startswith("]", place):
                    place = _skip(text, _expect(text, place, ","))
            place += 1
        else:
            value, place = decode(text, place)
            yield key, value
        place = _skip(text, place)
        if not text.startswith(",", place):
            _expect(text, place, "}")
            return
        place += 1


def _skip(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    return match.end() if match else place


def _expect(text: str, place: int, character: str) -> int:
    place = _skip(text, place)
    if not text.startswith(character, place):
        raise json.JSONDecodeError(f"Expecting {character!r}", text, place)
    return place + 1
