"""The window index of a shard: a column a property, as arrays; never a Python object a window.

    document [W]            number of the document in the shard
    ranges [R, 2]           sequence numbers in the shard
    range_bounds [W + 1]    window w has ranges[bounds[w]:bounds[w + 1]]
    first_new [W]           first sequence that is new in the window
    end [W]                 place in WindowEnd
    prefix_tokens, overlap_tokens, new_tokens [W]; trained_tokens [W], counted as the shard's loss_on says

The file is what numpy's `savez` writes, so `numpy.load` reads it.
"""

import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from megatron_klong.data.shard_files import WINDOWS, shard_file
from megatron_klong.trajectory.context import Window, WindowEnd

ENDS = tuple(WindowEnd)
_COUNTED = ("prefix_tokens", "overlap_tokens", "new_tokens", "trained_tokens")
_ORDER = ("document", "ranges", "range_bounds", "first_new", "end", *_COUNTED)

type Column = tuple[np.dtype[Any], tuple[int, ...], Iterator[NDArray[Any]]]  # type, shape, content piece by piece


class WindowColumns:
    """Collects windows while a shard is written: about 100 bytes each."""

    def __init__(self) -> None:
        self._columns = {name: array("b" if name == "end" else "q") for name in _ORDER}
        self._columns["range_bounds"].append(0)

    def add(self, window: Window, *, document: int, first_sequence: int, trained_tokens: int) -> None:
        """Append a window of a document that begins at `first_sequence`."""
        columns = self._columns
        columns["document"].append(document)
        for part in window.ranges:
            columns["ranges"].extend((part.start + first_sequence, part.stop + first_sequence))
        columns["range_bounds"].append(len(columns["ranges"]) // 2)
        columns["first_new"].append(first_sequence + window.first_new)
        columns["end"].append(ENDS.index(window.end))
        columns["trained_tokens"].append(trained_tokens)
        for name in _COUNTED[:-1]:
            columns[name].append(getattr(window, name))

    def write(self, file: BinaryIO) -> None:
        """Write the index."""
        columns: dict[str, Column] = {}
        for name, values in self._columns.items():
            content: NDArray[Any] = np.array(values, dtype=np.int8 if name == "end" else np.int64)
            if name == "ranges":
                content = content.reshape(-1, 2)
            columns[name] = content.dtype, content.shape, iter([content])
        _write_npz(file, columns)


def write_merged_windows(file: BinaryIO, prefixes: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> None:
    """Write the index of several shards laid end to end, a column of one of them in memory at a time.

    sizes: documents and sequences of each.
    """
    counts = [(int(bounds[-1]), len(bounds) - 1) for bounds in _each(prefixes, "range_bounds")]
    documents, sequences = (_before(size[n] for size in sizes) for n in (0, 1))
    ranges, windows = sum(count[0] for count in counts), sum(count[1] for count in counts)
    shifts = {
        "document": documents,
        "ranges": sequences,
        "first_new": sequences,
        "range_bounds": _before(count[0] for count in counts),
    }
    columns: dict[str, Column] = {}
    for name in _ORDER:
        shape = {"ranges": (ranges, 2), "range_bounds": (windows + 1,)}.get(name, (windows,))
        dtype = np.dtype(np.int8 if name == "end" else np.int64)
        columns[name] = dtype, shape, _merged(prefixes, name, shifts.get(name))
    _write_npz(file, columns)


def _merged(prefixes: Sequence[Path], name: str, shifts: Sequence[int] | None) -> Iterator[NDArray[Any]]:
    if name == "range_bounds":
        yield np.zeros(1, dtype=np.int64)
    for number, content in enumerate(_each(prefixes, name)):
        part = content[1:] if name == "range_bounds" else content
        yield part if shifts is None else part + shifts[number]


def _each(prefixes: Sequence[Path], name: str) -> Iterator[NDArray[Any]]:
    for prefix in prefixes:
        with np.load(shard_file(prefix, WINDOWS), allow_pickle=False) as arrays:
            yield arrays[name]


def _before(counts: Iterator[int]) -> list[int]:
    total, before = 0, []
    for count in counts:
        before.append(total)
        total += count
    return before


def _write_npz(file: BinaryIO, columns: dict[str, Column]) -> None:
    write_header: Callable[..., None] = npy.write_array_header_1_0
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in _ORDER:
            dtype, shape, pieces = columns[name]
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write_header(member, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
                for piece in pieces:
                    member.write(np.ascontiguousarray(piece, dtype=dtype).tobytes())


def read_windows(prefix: Path) -> dict[str, NDArray[Any]]:
    """All columns of a shard's index."""
    with np.load(shard_file(prefix, WINDOWS), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
