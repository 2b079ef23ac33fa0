"""The files of a shard: their names, their checksums, and the manifest that alone makes them a shard.

Always: the manifest is written last and removed first, so whatever is killed when, a prefix holds a whole shard or
none.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_klong.files import checksum, write_atomically

FORMAT = "klong-shard"
VERSION = 1
BIN, IDX, WINDOWS, DOCUMENTS = ".bin", ".idx", ".windows.npz", ".documents.jsonl"
PARTS = (BIN, IDX, WINDOWS, DOCUMENTS)
MANIFEST = ".manifest.json"
MATERIALIZED, MATERIALIZED_MASK = ".materialized", ".materialized_mask"  # made of the shard: they go with it


class ShardError(ValueError):
    """A shard that cannot be written or read; the message names the file and the cure."""


def shard_file(prefix: Path, suffix: str) -> Path:
    """The file of a shard with that suffix."""
    return prefix.with_name(prefix.name + suffix)


def check_prefix(prefix: Path, *, overwrite: bool) -> None:
    """Raises ShardError if no shard can be called so, or if one, or a part of one, is there and may not be replaced."""
    if prefix.name in ("", ".."):
        raise ShardError(f"{prefix}: an output prefix needs a file name, such as data/sft")
    existing = [path for suffix in (*PARTS, MANIFEST) if (path := shard_file(prefix, suffix)).exists()]
    if existing and not overwrite:
        raise ShardError(f"{existing[0]}: exists already; choose another output prefix, or pass --overwrite")


def retract(prefix: Path) -> None:
    """From here on there is no shard at this prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (MANIFEST, MATERIALIZED + IDX, MATERIALIZED_MASK + IDX):
        shard_file(prefix, suffix).unlink(missing_ok=True)


def publish(prefix: Path, manifest: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of files that stand; files: suffix -> checksum. From here on there is a shard."""
    content = {**manifest, "files": {suffix: files[suffix] for suffix in PARTS}}
    write_atomically(shard_file(prefix, MANIFEST), json.dumps(content, indent=1) + "\n")


def read_manifest(prefix: Path, *, verify_checksums: bool) -> Mapping[str, Any]:
    """The manifest, once the files are found to be as it says. Raises ShardError."""
    path = shard_file(prefix, MANIFEST)
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
        file = shard_file(prefix, suffix)
        if not file.exists() or file.stat().st_size != expected["bytes"]:
            size = file.stat().st_size if file.exists() else "no"
            raise ShardError(
                f"{file}: {size} bytes, manifest says {expected['bytes']}; delete {prefix}.* and preprocess again"
            )
        if verify_checksums and checksum(file)["sha256"] != expected["sha256"]:
            raise damaged(file, prefix)
    return manifest


def damaged(file: Path, prefix: Path) -> ShardError:
    """What to say of a file whose content is not what the manifest says."""
    return ShardError(f"{file}: checksum differs from the manifest's; delete {prefix}.* and preprocess again")
