"""A shard: tokens stored once as a Megatron indexed dataset, its windows as views, and a manifest that vouches for all.

    PREFIX.bin, PREFIX.idx     document = transcript, sequence = segment, mode = kind and whether it is trained
    PREFIX.windows.npz         document [W], ranges [R, 2] of sequence numbers in the shard, range_bounds [W + 1],
                               first_new [W], prefix_tokens / overlap_tokens / new_tokens / trained_tokens [W], end [W]
    PREFIX.documents.jsonl     a line a document: id, task, source, turns, score
    PREFIX.manifest.json       format, version, tokenizer, policy, counts, sources, size and SHA-256 of each file

Example: two transcripts of 5 and 4 segments are sequences 0-4 and 5-8. A window of the second that holds its first two
segments and its last one has ranges [[5, 7], [8, 9]]; with first_new 8 only sequence 8 is trained, and of it only
what its mode says.

The manifest is written last and removed first. Killed before it stands: there is no shard, run again. After: there is
a whole one. A reader refuses files whose size or checksum is not what the manifest says, and other versions.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_klong.data.indexed import IndexedReader, IndexedWriter
from megatron_klong.files import atomic_file, write_atomically
from megatron_klong.trajectory.context import ContextPolicy, Window, WindowEnd
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.segments import RenderedTranscript, is_trained_mode
from megatron_klong.trajectory.tokenizer import Tokenizer
from megatron_klong.trajectory.windows import SplitPlan

FORMAT = "klong-shard"
VERSION = 1
_PARTS = (".bin", ".idx", ".windows.npz", ".documents.jsonl")
_MANIFEST = ".manifest.json"
_ENDS = tuple(WindowEnd)


class ShardError(ValueError):
    """A shard that cannot be written or read; the message names the file and the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowTokens:
    """ids [tokens] int32; loss_mask [tokens]: tokens to be predicted and trained on; new_start: first new position."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    new_start: int


def _part(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


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
                "sha256": tokenizer.sha256,
                "vocabulary_size": vocabulary_size,
                "control_tokens": dict(tokenizer.control),
            },
            "policy": asdict(policy),
            "loss_on": "new",
            "sequence_modes": True,
        }
        self._overwrite = overwrite
        self._vocabulary_size = vocabulary_size
        self._windows: list[tuple[int, int, Window]] = []  # document, its first sequence
        self._documents: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        if self._prefix.name in ("", ".."):
            raise ShardError(f"{self._prefix}: an output prefix needs a file name, such as data/sft")
        manifest = _part(self._prefix, _MANIFEST)
        existing = [path for suffix in (*_PARTS, _MANIFEST) if (path := _part(self._prefix, suffix)).exists()]
        if existing and not self._overwrite:
            raise ShardError(f"{existing[0]}: exists already; choose another output prefix, or pass --overwrite")
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._files[".bin"] = self._stack.enter_context(atomic_file(_part(self._prefix, ".bin")))
        self._index = IndexedWriter(self._files[".bin"], vocabulary_size=self._vocabulary_size)
        return self

    def add(self, transcript: Transcript, rendered: RenderedTranscript, plan: SplitPlan) -> None:
        """Append a transcript with its windows."""
        document, first = len(self._documents), self._index.sequences
        segments = rendered.segments
        self._index.add_document(segments)
        self._windows += [(document, first, window) for window in plan.windows]
        self._documents.append(
            {
                "id": transcript.id,
                "task": transcript.task,
                "source": transcript.source,
                "turns": transcript.turns,
                "score": transcript.score,
            }
        )
        self._counts.update(
            documents=1,
            segments=len(segments),
            tokens=sum(map(len, segments)),
            turns=transcript.turns,
            trainable_tokens=plan.trainable_tokens,
            windows=len(plan.windows),
            window_tokens=sum(window.tokens for window in plan.windows),
            trained_tokens=sum(window.trained_tokens for window in plan.windows),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        self._stack.close()
        with atomic_file(_part(self._prefix, ".idx")) as file:
            self._index.write_index(file)
        with atomic_file(_part(self._prefix, ".windows.npz")) as file:
            np.savez(file, **_window_arrays(self._windows))  # type: ignore[arg-type]
        lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in self._documents)
        write_atomically(_part(self._prefix, ".documents.jsonl"), lines)
        manifest = {
            **self._header,
            "dtype": str(self._index.dtype),
            "counts": dict(self._counts),
            "files": {suffix: _checksum(_part(self._prefix, suffix)) for suffix in _PARTS},
        }
        write_atomically(_part(self._prefix, _MANIFEST), json.dumps(manifest, indent=1) + "\n")


def _window_arrays(windows: Sequence[tuple[int, int, Window]]) -> dict[str, NDArray[Any]]:
    ranges = [(part.start + first, part.stop + first) for _, first, window in windows for part in window.ranges]
    bounds = np.cumsum([0, *(len(window.ranges) for _, _, window in windows)], dtype=np.int64)
    arrays: dict[str, NDArray[Any]] = {
        "document": np.array([document for document, _, _ in windows], dtype=np.int64),
        "ranges": np.array(ranges, dtype=np.int64).reshape(-1, 2),
        "range_bounds": bounds,
        "first_new": np.array([first + window.first_new for _, first, window in windows], dtype=np.int64),
        "end": np.array([_ENDS.index(window.end) for _, _, window in windows], dtype=np.int8),
    }
    for name in ("prefix_tokens", "overlap_tokens", "new_tokens", "trained_tokens"):
        arrays[name] = np.array([getattr(window, name) for _, _, window in windows], dtype=np.int64)
    return arrays


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class Shard:
    """A shard opened for reading. len() = windows. Raises ShardError if anything is not as its manifest says."""

    def __init__(self, prefix: str | Path, *, verify_checksums: bool = True) -> None:
        self.prefix = Path(prefix)
        self.manifest = _read_manifest(self.prefix, verify_checksums)
        self.index = IndexedReader(self.prefix)
        with np.load(_part(self.prefix, ".windows.npz"), allow_pickle=False) as arrays:
            self._arrays = {name: arrays[name] for name in arrays.files}
        self.documents = [
            json.loads(line) for line in _part(self.prefix, ".documents.jsonl").read_text("utf-8").splitlines()
        ]

    def __len__(self) -> int:
        return len(self._arrays["document"])

    def column(self, name: str) -> NDArray[Any]:
        """One array of the window index by its name in the layout."""
        array: NDArray[Any] = self._arrays[name]
        return array

    def ends(self) -> list[WindowEnd]:
        """How each window ended."""
        return [_ENDS[code] for code in self._arrays["end"]]

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
            trained = [n >= first_new and is_trained_mode(int(self.index.modes[n])) for n in part]
            mask.append(np.repeat(np.array(trained, dtype=np.bool_), lengths))
            new_start += int(lengths[: max(0, first_new - part.start)].sum())
        return WindowTokens(
            ids=np.concatenate(ids).astype(np.int32), loss_mask=np.concatenate(mask), new_start=new_start
        )


def _read_manifest(prefix: Path, verify_checksums: bool) -> Mapping[str, Any]:
    path = _part(prefix, _MANIFEST)
    if not path.exists():
        raise ShardError(f"{path}: missing, so there is no finished shard at this prefix; preprocess (again)")
    try:
        manifest: Mapping[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}); delete {prefix}.* and preprocess again") from error
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ShardError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('version')!r}, this program reads "
            f"{FORMAT!r} version {VERSION}; preprocess again with this version"
        )
    if not manifest.get("sequence_modes"):
        raise ShardError(f"{path}: written without sequence modes, so nothing says what is trained; preprocess again")
    for suffix, expected in manifest["files"].items():
        file = _part(prefix, suffix)
        if not file.exists() or file.stat().st_size != expected["bytes"]:
            size = file.stat().st_size if file.exists() else "no"
            raise ShardError(
                f"{file}: {size} bytes, manifest says {expected['bytes']}; delete {prefix}.* and preprocess again"
            )
        if verify_checksums and _checksum(file)["sha256"] != expected["sha256"]:
            raise ShardError(f"{file}: checksum differs from the manifest's; delete {prefix}.* and preprocess again")
    return manifest
