"""Several shards -> one that holds their documents in order: the very shard that their input would have made at once.

Always: one column of one shard is in memory at a time; damage in any of them is noticed and nothing is published.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_klong.data.indexed import write_merged_index
from megatron_klong.data.shard_files import (
    BIN,
    DOCUMENTS,
    IDX,
    PARTS,
    WINDOWS,
    ShardError,
    check_prefix,
    damaged,
    publish,
    read_manifest,
    retract,
    shard_file,
)
from megatron_klong.data.window_index import write_merged_windows
from megatron_klong.files import HashedFile, atomic_file, checksum

_COPIED_BYTES = 1 << 20
_MUST_AGREE = {
    "tokens of another type": ("dtype",),
    "another tokenizer": ("tokenizer", "sha256"),
    "another vocabulary size": ("tokenizer", "vocabulary_size"),
    "another renderer": ("renderer",),
    "another context policy": ("policy",),
    "another loss_on": ("loss_on",),
}


def merge_shards(prefixes: Sequence[Path], output: Path, *, overwrite: bool) -> Mapping[str, Any]:
    """Write the merged shard and return its manifest. Raises ShardError, and leaves what was there."""
    if not prefixes:
        raise ShardError("no shard to merge; name at least one")
    if output.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise ShardError(f"{output}: is one of the shards to merge; choose another output prefix")
    check_prefix(output, overwrite=overwrite)
    first = read_manifest(prefixes[0], verify_checksums=False)
    counts: dict[str, int] = dict.fromkeys(first["counts"], 0)
    sizes = []
    for prefix in prefixes:
        manifest = read_manifest(prefix, verify_checksums=False)
        _refuse_if_different(prefix, manifest, prefixes[0], first)
        for suffix in (IDX, WINDOWS):  # the two that are not copied, and so not checked while they are
            if checksum(shard_file(prefix, suffix)) != manifest["files"][suffix]:
                raise damaged(shard_file(prefix, suffix), prefix)
        counts = {name: counts[name] + manifest["counts"][name] for name in counts}
        sizes.append((manifest["counts"]["documents"], manifest["counts"]["segments"]))
    checksums: dict[str, Mapping[str, Any]] = {}
    with ExitStack() as stack:
        files = {suffix: stack.enter_context(atomic_file(shard_file(output, suffix))) for suffix in PARTS}
        for suffix in (BIN, DOCUMENTS):
            checksums[suffix] = _copy(prefixes, suffix, HashedFile(files[suffix]))
        index = HashedFile(files[IDX])
        write_merged_index(index, prefixes)
        checksums[IDX] = index.checksum
        write_merged_windows(files[WINDOWS], prefixes, sizes)
        retract(output)
    checksums[WINDOWS] = checksum(shard_file(output, WINDOWS))
    made = {**first, "counts": counts}
    publish(output, made, checksums)
    return made


def _refuse_if_different(prefix: Path, manifest: Mapping[str, Any], other: Path, first: Mapping[str, Any]) -> None:
    for what, keys in _MUST_AGREE.items():
        found, expected = manifest, first
        for key in keys:
            found, expected = found[key], expected[key]
        if found != expected:
            raise ShardError(
                f"{prefix}: {what} than {other} ({found} instead of {expected}); shards that differ in it are trained "
                "on side by side, not merged: preprocess one of them again to merge them"
            )


def _copy(prefixes: Sequence[Path], suffix: str, whole: HashedFile) -> Mapping[str, Any]:
    """Lay one file of each shard end to end. Raises ShardError where one is not what its manifest says."""
    for prefix in prefixes:
        source = shard_file(prefix, suffix)
        copied = HashedFile(whole)
        with source.open("rb") as file:
            while content := file.read(_COPIED_BYTES):
                copied.write(content)
        if copied.checksum != read_manifest(prefix, verify_checksums=False)["files"][suffix]:
            raise damaged(source, prefix)
    return whole.checksum
