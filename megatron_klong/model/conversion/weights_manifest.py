"""Checksums of a folder in Hugging Face format, in a file beside them; imports no torch.

`write_weights_manifest` records what a folder is; an import compares, and names the file that has changed
(tests/integration/model/test_convert_refusals.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_klong.files import write_atomically
from megatron_klong.model.conversion.workers import checksums_of

MANIFEST = "klong-manifest.json"
FORMAT = "klong-weights"
VERSION = 1


class ManifestError(ValueError):
    """A folder that is not what its manifest says, or that has no weights; the message names the file."""


def write_weights_manifest(folder: Path, *, processes: int) -> Path:
    """Write sizes and SHA-256 of all weights and of config.json. Raises ManifestError."""
    names = [*sorted(file.name for file in folder.glob("*.safetensors")), "config.json"]
    for name in names:
        if not (folder / name).is_file() or len(names) == 1:
            raise ManifestError(f"{folder}: no {name if len(names) > 1 else '*.safetensors'} there; give its folder")
    files = _checksums(folder, names, processes)
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return folder / MANIFEST


def verify_weights(folder: Path, *, processes: int) -> None:
    """Compare a folder with its manifest, if it has one. Raises ManifestError."""
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        manifest = json.loads(path.read_bytes())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise ManifestError(f"{path}: not {FORMAT} version {VERSION}; write it again, or delete it")
        expected: Mapping[str, Mapping[str, Any]] = manifest["files"]
        for name, entry in expected.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else "no"
            if size != entry["bytes"]:
                raise ManifestError(f"{folder / name}: {size} bytes, {MANIFEST} says {entry['bytes']}; fetch it again")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path}: not readable ({error}); write it again, or delete it") from error
    found = _checksums(folder, list(expected), processes)
    for name in expected:
        if found[name] != expected[name]:
            raise ManifestError(f"{folder / name}: checksum differs from {MANIFEST}'s; fetch it again")


def _checksums(folder: Path, names: list[str], processes: int) -> dict[str, dict[str, Any]]:
    return dict(zip(names, checksums_of([folder / name for name in names], processes=processes), strict=True))
