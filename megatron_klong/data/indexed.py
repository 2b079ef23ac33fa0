"""Megatron's indexed dataset (`.bin` tokens, `.idx` index) written and read without torch, byte for byte the same.

Layout of `.idx`: 9 bytes magic, u64 version 1, u8 dtype code, u64 sequences, u64 document bounds, then i32 length,
i64 byte offset of each sequence, i64 document bounds, i8 mode of each sequence. The modes are there only if the
builder was told so, and nothing in the file says it: our manifest does, and this reader checks the file's size.
Source: megatron/core/datasets/indexed_dataset.py (0.19.2).
"""

import struct
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_klong.files import Sink
from megatron_klong.trajectory.segments import Segment

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype(np.uint8),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
# Megatron's own bound: above it, ids would wrap silently in 16 bits.
_UINT16_VOCABULARY = 65500


class IndexedError(ValueError):
    """A `.bin`/`.idx` pair that cannot be written or read; the message names the file and the cure."""


def token_dtype(vocabulary_size: int) -> np.dtype[np.generic]:
    """The dtype Megatron would choose for ids below `vocabulary_size`."""
    return np.dtype(np.uint16 if vocabulary_size < _UINT16_VOCABULARY else np.int32)


class IndexedWriter:
    """Appends documents to an open `.bin`; the `.idx` is written at the end, from what was appended.

    Kept in memory: 5 bytes a sequence and 8 a document. with_modes: whether the index holds modes.
    """

    def __init__(
        self,
        file: Sink,
        *,
        vocabulary_size: int,
        dtype: np.dtype[np.generic] | None = None,
        with_modes: bool = True,
    ) -> None:
        self.dtype = dtype or token_dtype(vocabulary_size)
        self._vocabulary_size = vocabulary_size
        self._with_modes = with_modes
        self._file = file
        self._lengths = array("i")
        self._modes = array("b")
        self._bounds = array("q", [0])

    @property
    def sequences(self) -> int:
        return len(self._lengths)

    def add_document(self, segments: Sequence[Segment]) -> None:
        """Append one document, a sequence a segment. Raises IndexedError for an id outside the vocabulary."""
        lengths = [len(segment) for segment in segments]
        ids = np.fromiter(chain.from_iterable(segment.ids for segment in segments), dtype=np.int64, count=sum(lengths))
        self.add_sequences(ids, lengths, (segment.mode for segment in segments))

    def add_sequences(self, ids: NDArray[np.integer], lengths: Iterable[int], modes: Iterable[int]) -> None:
        """Append one document given as its ids and the length and mode of each sequence. Raises IndexedError."""
        if ids.size and (ids.min() < 0 or ids.max() >= self._vocabulary_size):
            raise IndexedError(f"token id {ids.max()} or {ids.min()} outside the vocabulary of {self._vocabulary_size}")
        self._file.write(ids.astype(self.dtype).tobytes())
        self._lengths.extend(lengths)
        self._modes.extend(modes)
        self._bounds.append(len(self._lengths))

    def write_index(self, file: Sink) -> None:
        """Write the `.idx` that belongs to the `.bin`."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        file.write(_header(self.dtype, len(lengths), len(self._bounds)))
        modes = self._modes.tobytes() if self._with_modes else b""
        for part in (lengths.tobytes(), _byte_offsets(lengths, self.dtype, 0).tobytes(), self._bounds.tobytes(), modes):
            file.write(part)


def write_merged_index(file: Sink, prefixes: Sequence[Path]) -> None:
    """Write the `.idx` of the `.bin` files of `prefixes` laid end to end, with one of theirs in memory at a time."""
    dtype, sequences, documents = None, 0, 0
    for prefix in prefixes:
        reader = IndexedReader(prefix)
        if dtype not in (None, reader.dtype):
            raise IndexedError(f"{prefix}: tokens of type {reader.dtype}, {prefixes[0]} has {dtype}; preprocess again")
        dtype = reader.dtype
        sequences += len(reader.lengths)
        documents += len(reader.bounds) - 1
    assert dtype is not None
    file.write(_header(dtype, sequences, documents + 1))
    for prefix in prefixes:
        file.write(IndexedReader(prefix).lengths.tobytes())
    tokens = 0
    for prefix in prefixes:
        lengths = IndexedReader(prefix).lengths
        file.write(_byte_offsets(lengths, dtype, tokens).tobytes())
        tokens += int(lengths.sum(dtype=np.int64))
    file.write(array("q", [0]).tobytes())
    sequences = 0
    for prefix in prefixes:
        reader = IndexedReader(prefix)
        file.write((reader.bounds[1:] + sequences).tobytes())
        sequences += len(reader.lengths)
    for prefix in prefixes:
        file.write(IndexedReader(prefix).modes.tobytes())


def _header(dtype: np.dtype[np.generic], sequences: int, bounds: int) -> bytes:
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    return _HEADER.pack(_MAGIC, _VERSION, code, sequences, bounds)


def _byte_offsets(lengths: NDArray[np.int32], dtype: np.dtype[np.generic], tokens: int) -> NDArray[np.int64]:
    """Where each sequence begins in the `.bin`, the first one behind so many tokens."""
    offsets = np.full(len(lengths), tokens, dtype=np.int64)
    offsets[1:] += np.cumsum(lengths[:-1], dtype=np.int64)
    return offsets * dtype.itemsize


class IndexedReader:
    """A memory-mapped `.bin`/`.idx` pair.

    lengths [sequences] tokens; offsets [sequences] tokens; bounds [documents + 1] sequences; modes [sequences], all 0
    where it is read without.
    """

    def __init__(self, prefix: Path, *, with_modes: bool = True) -> None:
        index_path, self._bin_path = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
        content = index_path.read_bytes()
        if len(content) < _HEADER.size:
            raise IndexedError(f"{index_path}: {len(content)} bytes, shorter than a header; preprocess again")
        magic, version, code, sequences, bounds = _HEADER.unpack_from(content)
        if magic != _MAGIC or version != _VERSION or code not in _DTYPES:
            raise IndexedError(f"{index_path}: not a Megatron index of version 1 with integer tokens")
        without_modes = _HEADER.size + sequences * (4 + 8) + bounds * 8
        expected = without_modes + sequences * with_modes
        if len(content) != expected:
            raise IndexedError(
                f"{index_path}: {len(content)} bytes where {expected} were expected for {sequences} sequences "
                f"with{'' if with_modes else 'out'} modes; it was cut short, or is of the other kind: preprocess again"
            )
        position = _HEADER.size
        self.lengths = np.frombuffer(content, np.int32, sequences, position)
        byte_offsets = np.frombuffer(content, np.int64, sequences, position + 4 * sequences)
        self.bounds = np.frombuffer(content, np.int64, bounds, position + 12 * sequences)
        modes = np.frombuffer(content, np.int8, offset=without_modes)
        self.modes = modes if with_modes else np.zeros(sequences, np.int8)
        self.dtype = _DTYPES[code]
        self.offsets: NDArray[np.int64] = byte_offsets // self.dtype.itemsize
        expected_bytes = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if self._bin_path.stat().st_size != expected_bytes:
            raise IndexedError(
                f"{self._bin_path}: {self._bin_path.stat().st_size} bytes where the index counts {expected_bytes}; "
                "preprocess again"
            )
        self._tokens = (
            np.memmap(self._bin_path, dtype=self.dtype, mode="r") if expected_bytes else np.empty(0, self.dtype)
        )

    def tokens(self, sequences: range) -> NDArray[np.generic]:
        """The tokens of consecutive sequences, as one view on the file."""
        if not sequences:
            return np.empty(0, self.dtype)
        last = sequences[-1]
        return self._tokens[self.offsets[sequences[0]] : self.offsets[last] + self.lengths[last]]
