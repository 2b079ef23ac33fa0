"""What a run is trained on: named sources, each a list of windows with what blending and reporting ask about them.

    windows      preprocessed shards: sub-trajectories with stored masks (megatron_klong.data.shard)
    documents    any Megatron indexed dataset: texts to be learnt whole, in pieces of a row. A piece begins with the
                 last token of the one before it, so each token but a document's first is learnt once

Nothing here imports torch, and no token is read before a window is asked for.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megatron_klong.config import Config
from megatron_klong.data.indexed import IndexedError, IndexedReader
from megatron_klong.data.shard import Shard, ShardError, WindowTokens
from megatron_klong.data.shard_files import DOCUMENTS, IDX, MANIFEST, MATERIALIZED, shard_file
from megatron_klong.files import checksum
from megatron_klong.trajectory.tokenizer import Tokenizer, TokenizerError, load_tokenizer


class SourceConfig(Config):
    """Data that is weighted, and reported, as one."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Prefixes of shards, or of indexed datasets; all of one tokenizer."""
    kind: Literal["windows", "documents"] = "windows"
    """Preprocessed sub-trajectories, or plain documents of which every token is trained."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the run's trained tokens, beside the other weights; without any, each source's own size."""
    validation_share: float | None = Field(default=None, ge=0, le=1)
    """Of this source's tasks, held out; 1 keeps all of it for validation. Without it: the run's."""


class Source(Protocol):
    """Windows and their columns. Whatever has one key must stay on one side of a split."""

    lengths_tokens: NDArray[np.int64]  # [windows]
    trained_tokens: NDArray[np.int64]  # [windows]
    prefix_tokens: NDArray[np.int64]  # [windows], pinned
    continuation: NDArray[np.bool_]  # [windows]: whether it lies behind a cut
    document: NDArray[np.int64]  # [windows]
    keys: Sequence[str]  # [documents]: the task, else the transcript

    def window(self, number: int) -> WindowTokens: ...

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of a shard; of documents, whose tokens nobody checks, with their index."""
        ...


def open_source(config: SourceConfig, *, row_tokens: int, verify: bool = True) -> "ShardSource | DocumentSource":
    """Open its files; verify: read shards once to compare checksums. Raises ShardError, IndexedError."""
    if config.kind == "windows":
        return ShardSource(config.shards, verify=verify)
    return DocumentSource(config.shards, piece_tokens=row_tokens)


class ShardSource:
    """Several shards as one: their windows and documents are numbered through."""

    def __init__(self, prefixes: Sequence[str | Path], *, verify: bool = True) -> None:
        """Raises ShardError if one cannot be read, or if their tokenizers differ."""
        self.shards = [Shard(prefix, verify_checksums=verify) for prefix in prefixes]
        check_one_tokenizer(self.shards)
        self._starts = np.cumsum([0, *map(len, self.shards)])
        self.vocabulary_size = int(self.shards[0].manifest["tokenizer"]["vocabulary_size"])
        self.prefix_tokens = self._column("prefix_tokens")
        self.lengths_tokens = self.prefix_tokens + self._column("overlap_tokens") + self._column("new_tokens")
        self.trained_tokens = self._column("trained_tokens")
        self.keys: Sequence[str] = [key for shard in self.shards for key in _keys(shard)]
        first_documents = np.cumsum([0, *(shard.manifest["counts"]["documents"] for shard in self.shards)])
        self.document = np.concatenate(
            [shard.column("document") + first for shard, first in zip(self.shards, first_documents, strict=False)]
        )
        # the windows of a transcript lie one behind the other
        self.continuation = np.concatenate([[False], self.document[1:] == self.document[:-1]])[: len(self)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _column(self, name: str) -> NDArray[np.int64]:
        return np.concatenate([shard.column(name) for shard in self.shards]).astype(np.int64)

    def window(self, number: int) -> WindowTokens:
        """One window of the shard it lies in."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.shards[shard].window(number - int(self._starts[shard]))

    @property
    def fingerprint(self) -> str:
        files = [shard.manifest["files"] for shard in self.shards]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


class DocumentSource:
    """Plain documents, cut into pieces of at most `piece_tokens`. Documents of one token teach nothing: left out."""

    def __init__(self, prefixes: Sequence[str | Path], *, piece_tokens: int) -> None:
        """Raises IndexedError for a dataset that cannot be read, ShardError for one with masks."""
        self._prefixes = [Path(prefix) for prefix in prefixes]
        for prefix in self._prefixes:
            _refuse_masked(prefix)
        self._readers = [_plain_reader(prefix) for prefix in self._prefixes]
        lengths = [_document_lengths(reader) for reader in self._readers]
        # piece k of a document begins at token k * (piece_tokens - 1)
        self._stride = piece_tokens - 1
        counts = np.concatenate([-(-np.maximum(found - 1, 0) // self._stride) for found in lengths])
        self._first_piece = np.cumsum([0, *counts])
        self._first_document = np.cumsum([0, *map(len, lengths)])
        self.document = np.repeat(np.arange(len(counts)), counts)
        self.trained_tokens = np.minimum(
            self._stride, np.concatenate(lengths)[self.document] - 1 - self._place(np.arange(len(self))) * self._stride
        )
        self.lengths_tokens = self.trained_tokens + 1
        self.prefix_tokens = np.zeros_like(self.lengths_tokens)
        self.continuation = self._place(np.arange(len(self))) > 0
        self.keys: Sequence[str] = [
            f"{prefix.name}:{number}"
            for prefix, found in zip(self._prefixes, lengths, strict=True)
            for number in range(len(found))
        ]

    def __len__(self) -> int:
        return len(self.document)

    def _place(self, piece: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which piece of its document each one is."""
        return np.asarray(piece - self._first_piece[self.document[piece]], dtype=np.int64)

    def window(self, number: int) -> WindowTokens:
        """One piece; all but its first token is trained."""
        document = int(self.document[number])
        dataset = int(np.searchsorted(self._first_document, document, side="right")) - 1
        reader = self._readers[dataset]
        first = document - int(self._first_document[dataset])
        tokens = reader.tokens(range(int(reader.bounds[first]), int(reader.bounds[first + 1])))
        start = (number - int(self._first_piece[document])) * self._stride
        ids = tokens[start : start + int(self.lengths_tokens[number])].astype(np.int32)
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[0] = False
        return WindowTokens(ids=ids, loss_mask=mask, new_start=0)

    @property
    def fingerprint(self) -> str:
        files = [checksum(shard_file(prefix, IDX)) for prefix in self._prefixes]
        return hashlib.sha256(json.dumps([files, self._stride], sort_keys=True).encode()).hexdigest()


def check_one_tokenizer(shards: Sequence[Shard]) -> None:
    """Raises ShardError for a shard of another tokenizer than the first one's."""
    for shard in shards[1:]:
        if shard.manifest["tokenizer"]["sha256"] != shards[0].manifest["tokenizer"]["sha256"]:
            raise ShardError(
                f"{shard.prefix}: another tokenizer than {shards[0].prefix}'s; preprocess them with the same one"
            )


def find_tokenizer(shards: Sequence[Shard], folders: Sequence[Path] = ()) -> Tokenizer | None:
    """The tokenizer the shards were made with, if its file is still there as it was.

    Looked for where a manifest says, in `folders`, beside a shard, and in a folder `tokenizer` there or one above.
    """
    for shard in shards:
        wanted = shard.manifest["tokenizer"]
        beside = shard.prefix.parent
        places = [*folders, beside, beside / "tokenizer", beside.parent / "tokenizer"]
        files = [Path(wanted["path"])] if "path" in wanted else []
        for file in (*files, *(place / wanted["file"] for place in places)):
            found = _tokenizer(file)
            if found and found.sha256 == wanted["sha256"]:
                return found
    return None


def _tokenizer(file: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(file, add_special_tokens=True)
    except TokenizerError:  # not there, or another kind of file
        return None


def _keys(shard: Shard) -> list[str]:
    with shard_file(shard.prefix, DOCUMENTS).open(encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    return [f"task:{line['task']}" if line["task"] else f"transcript:{line['id']}" for line in documents]


def _refuse_masked(prefix: Path) -> None:
    if shard_file(prefix, MANIFEST).exists() or prefix.name.endswith(MATERIALIZED):
        shard = prefix.with_name(prefix.name.removesuffix(MATERIALIZED))
        raise ShardError(
            f"{prefix}: holds sub-trajectories, of which only some tokens are to be trained; give {shard} in a source "
            'of kind = "windows"'
        )


def _plain_reader(prefix: Path) -> IndexedReader:
    if not shard_file(prefix, IDX).exists():
        raise IndexedError(f"{shard_file(prefix, IDX)}: missing; give the prefix of a Megatron indexed dataset")
    return IndexedReader(prefix, with_modes=False)


def _document_lengths(reader: IndexedReader) -> NDArray[np.int64]:
    """[documents] tokens."""
    before = np.concatenate([[0], np.cumsum(reader.lengths, dtype=np.int64)])
    return np.asarray(np.diff(before[reader.bounds]), dtype=np.int64)
