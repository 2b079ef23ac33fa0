"""A shard: tokens stored once as a Megatron indexed dataset, its windows as views, and a manifest that vouches for all.

    PREFIX.bin, PREFIX.idx     document = transcript, sequence = segment, mode = kind and whether it is trained
    PREFIX.windows.npz         the window index: megatron_klong.data.window_index
    PREFIX.documents.jsonl     a line a document: id, task, source, format, turns, score
    PREFIX.manifest.json       format, version, tokenizer, policy, loss_on, counts, size and SHA-256 of each file

Example: two transcripts of 5 and 4 segments are sequences 0-4 and 5-8. A window of the second that holds its first two
segments and its last one has ranges [[5, 7], [8, 9]]; with first_new 8 and loss_on "new" only sequence 8 is trained,
with loss_on "window" also 5 and 6, and of each only what its mode says.

Killed before the manifest stands: there is no shard, run again. After: there is a whole one. A reader refuses files
whose size or checksum is not what the manifest says, and other versions.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_klong.data.indexed import IndexedReader, IndexedWriter
from megatron_klong.data.loss_on import LossOn, TrainedCounts
from megatron_klong.data.shard_files import (
    BIN,
    DOCUMENTS,
    FORMAT,
    IDX,
    VERSION,
    WINDOWS,
    ShardError,
    check_prefix,
    publish,
    read_manifest,
    retract,
    shard_file,
)
from megatron_klong.data.window_index import ENDS, WindowColumns, read_windows
from megatron_klong.files import HashedFile, atomic_file, checksum
from megatron_klong.trajectory.context import ContextPolicy, WindowEnd
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.segments import RenderedTranscript, is_trained_mode
from megatron_klong.trajectory.tokenizer import Tokenizer
from megatron_klong.trajectory.windows import SplitPlan

__all__ = ["Shard", "ShardError", "ShardWriter", "WindowTokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowTokens:
    """ids [tokens] int32; loss_mask [tokens]: tokens to be predicted and trained on; new_start: first new position.

    group: which of the kinds of windows that a run reports on it belongs to.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    new_start: int
    group: int = 0


class ShardWriter:
    """Writes one shard. Use as a context manager: leaving it normally publishes the shard, an exception discards it."""

    def __init__(
        self,
        prefix: Path,
        tokenizer: Tokenizer,
        policy: ContextPolicy,
        *,
        renderer: str,
        overwrite: bool,
        vocabulary_size: int | None = None,
        loss_on: LossOn = "new",
    ) -> None:
        """vocabulary_size: of the model that sampled the transcripts; it may be padded beyond its tokenizer's."""
        vocabulary_size = max(tokenizer.vocabulary_size, vocabulary_size or 0)
        self._prefix = prefix
        self._header = {
            "format": FORMAT,
            "version": VERSION,
            "renderer": renderer,
            "tokenizer": {
                "file": Path(tokenizer.path).name,
                "path": str(Path(tokenizer.path).resolve()),
                "sha256": tokenizer.sha256,
                "vocabulary_size": vocabulary_size,
                "control_tokens": dict(tokenizer.control),
            },
            "policy": asdict(policy),
            "loss_on": loss_on,
            "sequence_modes": True,
        }
        self._loss_on = loss_on
        self._overwrite = overwrite
        self._vocabulary_size = vocabulary_size
        self._windows = WindowColumns()
        names = ("documents", "segments", "tokens", "turns", "trainable_tokens", "windows", "window_tokens")
        self._counts = dict.fromkeys((*names, "trained_tokens"), 0)

    def __enter__(self) -> Self:
        check_prefix(self._prefix, overwrite=self._overwrite)
        retract(self._prefix)
        self._stack = ExitStack()
        self._tokens = HashedFile(self._stack.enter_context(atomic_file(shard_file(self._prefix, BIN))))
        self._documents = HashedFile(self._stack.enter_context(atomic_file(shard_file(self._prefix, DOCUMENTS))))
        self._index = IndexedWriter(self._tokens, vocabulary_size=self._vocabulary_size)
        return self

    def add(
        self,
        transcript: Transcript,
        rendered: RenderedTranscript,
        plan: SplitPlan,
        trained: TrainedCounts | None = None,
    ) -> None:
        """Append a transcript with its windows; trained: its counts, if they are known already."""
        document, first = self._counts["documents"], self._index.sequences
        segments = rendered.segments
        trained = trained or TrainedCounts(segments, plan, self._loss_on)
        self._index.add_document(segments)
        for window, tokens in zip(plan.windows, trained.windows, strict=True):
            self._windows.add(window, document=document, first_sequence=first, trained_tokens=tokens)
        line = {
            "id": transcript.id,
            "task": transcript.task,
            "source": transcript.source,
            "format": transcript.format,
            "turns": transcript.turns,
            "score": transcript.score,
        }
        self._documents.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
        added = {
            "documents": 1,
            "segments": len(segments),
            "tokens": sum(map(len, segments)),
            "turns": transcript.turns,
            "trainable_tokens": plan.trainable_tokens,
            "windows": len(plan.windows),
            "window_tokens": sum(window.tokens for window in plan.windows),
            "trained_tokens": sum(trained.windows),
        }
        for name, count in added.items():
            self._counts[name] += count

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        self._stack.close()
        with atomic_file(shard_file(self._prefix, IDX)) as file:
            index = HashedFile(file)
            self._index.write_index(index)
        with atomic_file(shard_file(self._prefix, WINDOWS)) as file:
            self._windows.write(file)
        checksums = {
            BIN: self._tokens.checksum,
            IDX: index.checksum,
            WINDOWS: checksum(shard_file(self._prefix, WINDOWS)),
            DOCUMENTS: self._documents.checksum,
        }
        manifest = {**self._header, "dtype": str(self._index.dtype), "counts": self._counts}
        publish(self._prefix, manifest, checksums)


class Shard:
    """A shard opened for reading. len() = windows. Raises ShardError if anything is not as its manifest says."""

    def __init__(self, prefix: str | Path, *, verify_checksums: bool = True) -> None:
        self.prefix = Path(prefix)
        self.manifest: Mapping[str, Any] = read_manifest(self.prefix, verify_checksums=verify_checksums)
        self.index = IndexedReader(self.prefix)
        self._arrays = read_windows(self.prefix)
        self._all_count = self.manifest["loss_on"] == "window"
        lines = shard_file(self.prefix, DOCUMENTS).read_bytes().decode("utf-8", "surrogatepass").split("\n")
        self.documents = [json.loads(line) for line in lines if line]

    def __len__(self) -> int:
        return len(self._arrays["document"])

    def column(self, name: str) -> NDArray[Any]:
        """One array of the window index by its name in the layout."""
        array: NDArray[Any] = self._arrays[name]
        return array

    def ends(self) -> list[WindowEnd]:
        """How each window ended."""
        return [ENDS[code] for code in self._arrays["end"]]

    def ranges(self, window: int) -> list[range]:
        """The sequence numbers a window is made of."""
        start, stop = self._arrays["range_bounds"][window : window + 2]
        return [range(int(a), int(b)) for a, b in self._arrays["ranges"][start:stop]]

    def window(self, number: int) -> WindowTokens:
        """The ids and the loss mask of one window."""
        first_new = int(self._arrays["first_new"][number])
        ids: list[NDArray[Any]] = []
        mask: list[NDArray[np.bool_]] = []
        new_start = 0
        for part in self.ranges(number):
            ids.append(self.index.tokens(part))
            lengths = self.index.lengths[part.start : part.stop]
            counts = [(self._all_count or n >= first_new) and is_trained_mode(int(self.index.modes[n])) for n in part]
            mask.append(np.repeat(np.array(counts, dtype=np.bool_), lengths))
            new_start += int(lengths[: max(0, first_new - part.start)].sum())
        return WindowTokens(
            ids=np.concatenate(ids).astype(np.int32), loss_mask=np.concatenate(mask), new_start=new_start
        )
