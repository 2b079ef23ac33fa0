"""Which rows are trained at which step: shards -> packed rows -> one endless, seeded order that any process can enter.

Position n of the order is row `order(epoch)[n % rows]` of epoch `n // rows`: every row once an epoch, in a new order
each epoch, and an epoch may end inside a step. So a data position is one integer, and a resumed run, on any number of
processes, goes on with the very next row. Imports no torch until a batch is made.

Always (tests/unit/train/test_rows.py): each epoch holds each window once; the processes of a step share its rows.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_klong.data.packing import Row, pack_rows
from megatron_klong.data.shard import Shard, ShardError, WindowTokens
from megatron_klong.trajectory.tokenizer import Tokenizer, TokenizerError, load_tokenizer

if TYPE_CHECKING:
    from megatron_klong.data.batch import PackedBatch


class Shards:
    """Several shards as one: their windows are numbered through."""

    def __init__(self, prefixes: Sequence[str | Path]) -> None:
        """Raises ShardError if one cannot be read, or if their tokenizers differ."""
        self._shards = [Shard(prefix) for prefix in prefixes]
        first = self._shards[0]
        for shard in self._shards[1:]:
            if shard.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
                raise ShardError(
                    f"{shard.prefix}: another tokenizer than {first.prefix}'s; preprocess them with the same one"
                )
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self.vocabulary_size = int(first.manifest["tokenizer"]["vocabulary_size"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def window(self, number: int) -> WindowTokens:
        """One window of the shard it lies in."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._shards[shard].window(number - int(self._starts[shard]))

    def find_tokenizer(self, folders: Sequence[Path] = ()) -> Tokenizer | None:
        """The tokenizer the shards were made with, if its file is still there as it was.

        Looked for where a manifest says, in `folders`, beside a shard, and in a folder `tokenizer` there or one above.
        """
        for shard in self._shards:
            wanted = shard.manifest["tokenizer"]
            beside = shard.prefix.parent
            places = [*folders, beside, beside / "tokenizer", beside.parent / "tokenizer"]
            files = [Path(wanted["path"])] if "path" in wanted else []
            for file in (*files, *(place / wanted["file"] for place in places)):
                found = _tokenizer(file)
                if found and found.sha256 == wanted["sha256"]:
                    return found
        return None

    @property
    def lengths_tokens(self) -> list[int]:
        """Of each window."""
        names = ("prefix_tokens", "overlap_tokens", "new_tokens")
        columns = [[shard.column(name) for name in names] for shard in self._shards]
        return [int(length) for parts in columns for length in np.sum(parts, axis=0)]

    @property
    def trained_tokens(self) -> int:
        return sum(int(shard.column("trained_tokens").sum()) for shard in self._shards)

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of any shard."""
        files = [shard.manifest["files"] for shard in self._shards]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _tokenizer(file: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(file, add_special_tokens=True)
    except TokenizerError:  # not there, or another kind of file
        return None


class TrainingRows:
    """The packed rows of a run and their order."""

    def __init__(self, shards: Shards, *, row_tokens: int, seed: int, window_multiple: int = 1) -> None:
        """Raises PackingError for a window that is longer than a row."""
        self.shards = shards
        self.row_tokens = row_tokens
        self._window_multiple = window_multiple
        self.rows: list[Row] = pack_rows(shards.lengths_tokens, row_tokens=row_tokens, window_multiple=window_multiple)
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Two runs with the same one see the same rows in the same order."""
        parts = (self.shards.fingerprint, self.row_tokens, self._seed, self.rows)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def row_at(self, position: int) -> Row:
        """The windows of the row at one position of the order."""
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self.rows))
        return self.rows[int(self._order[place])]

    def batches(self, position: int, rows: int, *, part: int, parts: int) -> "list[PackedBatch]":
        """What process `part` of `parts` trains on of the `rows` rows from `position` on; a batch a row."""
        from megatron_klong.data.batch import pack

        if rows % parts:
            raise ValueError(f"{rows} rows cannot be shared by {parts} data-parallel processes")
        share = rows // parts
        mine = range(position + part * share, position + (part + 1) * share)
        return [
            pack(
                self.shards,
                self.row_at(number),
                row_tokens=self.row_tokens,
                window_multiple=self._window_multiple,
            )
            for number in mine
        ]
