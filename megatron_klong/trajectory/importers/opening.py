"""A path -> what kind of file it is, by its first bytes, and its content as chunks, unpacked.

Always: the suffix never decides what a file is; a stream that cannot be unpacked to its end raises DamagedStream
where the damage is, after all that could be read before it.
"""

import gzip
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 1 << 16
_ZSTD_BYTES = 1 << 12  # packed; what they unpack to is at most 128 MiB
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHER_PACKERS = {b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip", b"\x04\x22\x4d\x18": "lz4"}
_LFS = b"version https://git-lfs.github.com/spec/"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".traj"})


class Kind(Enum):
    JSON = auto()
    PARQUET = auto()
    ARROW_FILE = auto()
    ARROW_STREAM = auto()


_TABLES = {b"PAR1": Kind.PARQUET, b"ARROW1": Kind.ARROW_FILE, b"\xff\xff\xff\xff": Kind.ARROW_STREAM}


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """chunks: the unpacked content from its first byte on; empty for a table."""

    kind: Kind
    chunks: Iterator[bytes]


class DamagedStream(Exception):
    """Compressed data, or the disk under it, gave out in mid-file."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def first_bytes(path: Path) -> bytes | Refusal:
    """The raw first bytes of a regular file that is not empty, and not a pointer to itself."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            next(path.iterdir(), None)  # a folder that cannot be listed is the worse problem, and raises
            return _refused(path, RefusalReason.NOT_A_FILE, "a folder; name the files in it, or use transcript_files")
        if not stat.S_ISREG(mode):
            return _refused(path, RefusalReason.NOT_A_FILE, "a pipe or a device; write its content to a file first")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return _refused(path, RefusalReason.UNREADABLE, str(error))
    if head.startswith(_LFS):
        detail = "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        return _refused(path, RefusalReason.LFS_POINTER, detail)
    return head or _refused(path, RefusalReason.EMPTY, "no byte in it")


def open_content(path: Path) -> Opened | Refusal:
    """Look into a file and unpack it as far as that takes."""
    head = first_bytes(path)
    if isinstance(head, Refusal):
        return head
    packed = head.startswith((_GZIP, _ZSTD))
    chunks = _chunks(path, head)
    try:
        first = next(chunks, b"")
    except DamagedStream as error:
        return _refused(path, error.reason, str(error))
    if not first.strip():
        first = next((chunk for chunk in chunks if chunk.strip()), b"")
    if not first:
        return _refused(path, RefusalReason.EMPTY, "nothing in it once unpacked" if packed else "white space only")
    for magic, kind in _TABLES.items():
        if first.startswith(magic):
            if not packed:
                return Opened(kind=kind, chunks=iter(()))
            detail = "a compressed table cannot be read in parts; unpack it first (tables have their own compression)"
            return _refused(path, RefusalReason.CORRUPT, detail)
    refusal = _not_json(path, first)
    return refusal or Opened(kind=Kind.JSON, chunks=_without_mark(_chunks(path, head)))


def suffix_of(path: Path) -> str:
    """The suffix that says what is in it, lower case: ".jsonl" for "a.jsonl.gz"."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return Path(name).suffix


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """White space in place of a byte order mark: offsets stay those of the file."""
    first = next(chunks, b"")
    yield b"   " + first.removeprefix(_BOM) if first.startswith(_BOM) else first
    yield from chunks


def _not_json(path: Path, first: bytes) -> Refusal | None:
    """Why a file with these first bytes cannot hold JSON, if it cannot."""
    if first.startswith(_UTF16):
        return _refused(path, RefusalReason.NOT_UTF8, "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    text = first.removeprefix(_BOM).lstrip()
    if text[:1] in (b"{", b"["):
        return None
    packer = next((name for magic, name in _OTHER_PACKERS.items() if first.startswith(magic)), None)
    if packer:
        detail = f"a {packer} archive; unpack it, or pack it again with gzip or zstd"
        return _refused(path, RefusalReason.BINARY, detail)
    head = first[:HEAD_BYTES]
    if b"\x00" in head or not _is_text(head):
        detail = f"neither text nor a known archive or table; begins with {head[:8].hex(' ')}"
        return _refused(path, RefusalReason.BINARY, detail)
    if text.startswith(b"# aider chat started at"):
        detail = "an aider chat log: text in which replies, files and commands cannot be told apart for certain"
        return _refused(path, RefusalReason.PLAIN_TEXT, detail)
    rows_follow = any(line.startswith((b"{", b"[")) for line in head.splitlines())
    if rows_follow and suffix_of(path) in _JSON_SUFFIXES:
        return None  # a broken first line does not spoil the others
    detail = f"text without structure, begins with {text[:40].decode('utf-8', 'replace')!r}; write messages as JSON"
    return _refused(path, RefusalReason.PLAIN_TEXT, detail)


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # a character that the end of the head cuts
    return True


def _chunks(path: Path, head: bytes) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from _unpacked(file, head)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        # a checksum comes last: that it differs says nothing of where
        kept = "what was read before this was seen is kept, and may be spoilt in parts; pack the file again"
        detail = f"the compressed data is damaged: {error}; {kept}"
        raise DamagedStream(RefusalReason.CORRUPT, detail) from error
    except OSError as error:
        raise DamagedStream(RefusalReason.UNREADABLE, str(error)) from error


def _unpacked(file: BinaryIO, head: bytes) -> Iterator[bytes]:
    if head.startswith(_ZSTD):
        return _unpacked_zstd(file)
    source = gzip.GzipFile(fileobj=file) if head.startswith(_GZIP) else file
    return iter(lambda: source.read(CHUNK_BYTES), b"")


def _unpacked_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's own stream reader takes a file that is cut for one that ends."""
    frame = None
    while data := file.read(_ZSTD_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            if unpacked := frame.decompress(data):
                yield unpacked
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("the file ends in the middle of a frame")


def _refused(path: Path, reason: RefusalReason, detail: str) -> Refusal:
    return Refusal(source=str(path), reason=reason, detail=detail)
