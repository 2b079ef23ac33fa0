"""The `.distcp` files of one writer of a torch_dist checkpoint, as a stream: one piece in memory at a time.

torch's FileSystemWriter writes the same bytes, but keeps every tensor of a file until the file is done.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_klong.files import HashedFile
from megatron_klong.model.conversion.flushing import Flusher
from megatron_klong.model.tensor_files import PIECE_BYTES

MAX_FILE_BYTES = 5 * 10**9
_BUFFER_BYTES = 1 << 18


class _Stream(HashedFile):
    """What torch writes to: a file that is hashed on the way, a little at a time while that is in the cache."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.flush = file.flush

    def write(self, content: bytes, /) -> int:
        view = memoryview(content)
        for start in range(0, len(view), PIECE_BYTES):
            super().write(view[start : start + PIECE_BYTES])  # type: ignore[arg-type]
        return len(view)


class ChunkFiles:
    """Writes pieces one behind the other, into a new file after MAX_FILE_BYTES. A context manager.

    results, checksums: what was written where, and the files by name; whole once the context is left.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self._file: BinaryIO | None = None
        self._stream: _Stream
        self._transforms = _StorageWriterTransforms()
        self._flusher = Flusher()
        self.results: list[WriteResult] = []
        self.checksums: dict[str, dict[str, Any]] = {}

    def add(self, item: WriteItem, content: torch.Tensor | io.BytesIO) -> None:
        """Append one piece; a tensor that is a view of a larger one is copied, or torch would store all of that."""
        if self._file is None:
            self._file = (self._folder / self._name).open("wb", buffering=_BUFFER_BYTES)
            self._stream = _Stream(self._file)
        if isinstance(content, torch.Tensor) and content.untyped_storage().nbytes() != content.nbytes:
            content = content.clone(memory_format=torch.contiguous_format)
        with _no_crc32():
            written = _write_item(
                self._transforms,
                self._stream,  # type: ignore[arg-type]
                content,
                item,
                self._name,
                SerializationFormat.TORCH_SAVE,
            )
        self.results.append(written)
        self._flusher.wrote(self._file.fileno(), written.size_in_bytes)
        if self._stream.tell() >= MAX_FILE_BYTES:
            self._close()

    @property
    def _name(self) -> str:
        return f"__{self._number}_{len(self.checksums)}.distcp"

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            self._flusher.finish(self._file.fileno())
            self._file.close()
            self._file = None
            self.checksums[self._name] = self._stream.checksum

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._flusher:
            if error is None:
                self._close()
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def _no_crc32() -> Iterator[None]:
    """torch's own checksum of each piece takes as long as all the rest, and the file has a better one."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
