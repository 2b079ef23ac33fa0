"""A checkpoint as a folder: Megatron's torch_dist files, and the manifest that alone makes them one. Imports no torch.

    FOLDER/             .metadata, metadata.json and *.distcp, as Megatron writes them
    FOLDER/klong.json   format, version, setting, progress of the run (null: weights alone), checksums of the files
    .FOLDER.tmp/        one that is being written, or that a kill left behind

Files are written into the temporary folder, then the manifest, then the folder is renamed. Killed at any moment: the
folder under its final name is whole or is not there (tests/integration/model/test_convert_kills.py and, for the
checkpoints of a run, tests/integration/train/test_sft.py).
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_klong.config import Config
from megatron_klong.files import checksum, sync_directory, write_atomically
from megatron_klong.model.config import LayoutConfig, ModelConfig

FORMAT = "klong-checkpoint"
VERSION = 2
MANIFEST = "klong.json"

type Checksums = Mapping[str, Mapping[str, Any]]
"""File name -> {"bytes": ..., "sha256": ...}"""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a checkpoint was written under. model and layout: their configurations as JSON would hold them."""

    model: Mapping[str, Any]
    layout: Mapping[str, Any]
    processes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFolder:
    """A checkpoint found whole: manifest readable, every file there with its size. progress: None for weights alone."""

    folder: Path
    setting: Setting
    progress: Mapping[str, Any] | None
    files: Checksums

    @property
    def model(self) -> ModelConfig:
        """The model whose weights these are. Raises CheckpointError if this version knows no such model."""
        return self._setting(ModelConfig, "model")

    @property
    def layout(self) -> LayoutConfig:
        """The layout that wrote them. Raises CheckpointError if this version knows no such layout."""
        return self._setting(LayoutConfig, "layout")

    def _setting[Kind: Config](self, kind: type[Kind], field: str) -> Kind:
        try:
            return kind.model_validate_json(json.dumps(dict(getattr(self.setting, field))))
        except ValidationError as error:
            raise CheckpointError(
                f"{self.folder / MANIFEST}: setting.{field} is of another version ({error.errors()[0]['msg']}); use "
                "the program that wrote it"
            ) from error


def read_checkpoint(folder: Path) -> CheckpointFolder:
    """Find it whole; checksums are another matter (`changed`). Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); delete {folder}, or make it again") from error
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        found = f"{manifest.get('format')} version {manifest.get('version')}"
        raise CheckpointError(
            f"{path}: {found}, but this program reads {FORMAT} version {VERSION}; continue with the one that wrote it"
        )
    try:
        sizes = {name: expected["bytes"] for name, expected in manifest["files"].items()}
        setting = Setting(**manifest["setting"])
    except (AttributeError, KeyError, TypeError) as error:
        fault = f"damaged ({type(error).__name__}: {error})"
        raise CheckpointError(f"{path}: {fault}; delete {folder}, or make it again") from error
    for name, expected in sizes.items():
        file = folder / name
        size = file.stat().st_size if file.exists() else "no"
        if size != expected:
            raise CheckpointError(f"{file}: {size} bytes, manifest says {expected}; delete {folder}, or make it again")
    return CheckpointFolder(folder=folder, setting=setting, progress=manifest.get("progress"), files=manifest["files"])


def find_checkpoint(path: Path) -> CheckpointFolder:
    """The checkpoint at `path`, or if that is the `checkpoints` folder of a run, its newest whole one."""
    runs = sorted(path.glob("step_*"), reverse=True) if not (path / MANIFEST).exists() else []
    if not runs:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; give a checkpoint, or the checkpoints folder of a run")
        return read_checkpoint(path)
    faults = []
    for candidate in runs:
        try:
            return read_checkpoint(candidate)
        except CheckpointError as error:
            faults.append(str(error))
    raise CheckpointError("\n".join([f"{path}: no whole checkpoint there", *faults]))


def changed(checkpoint: CheckpointFolder, names: Sequence[str]) -> list[str]:
    """Which of these files do not have the checksum that the manifest says."""
    return [name for name in names if checksum(checkpoint.folder / name) != checkpoint.files[name]]


def damaged(checkpoint: CheckpointFolder, names: Sequence[str], cure: str) -> CheckpointError:
    """What to say of files that are not as the manifest says."""
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    return CheckpointError(f"{checkpoint.folder / names[0]}: checksum differs from the manifest's{more}; {cure}")


def checksums(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of files that were just written."""
    return {name: checksum(folder / name) for name in names}


def check_tensors(
    checkpoint: CheckpointFolder, held: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> None:
    """Raises CheckpointError, naming them, unless all expected tensors are held, with those shapes."""
    if missing := sorted(expected.keys() - held.keys()):
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} tensors missing: {shown}; its manifest is of another model, make it "
            "again"
        )
    for key, shape in expected.items():
        if list(held[key]) != list(shape):
            raise CheckpointError(
                f"{checkpoint.folder}: {key} has shape {list(held[key])}, the model needs {list(shape)}; its manifest "
                "is of another model, make it again"
            )


def file_names(folder: Path) -> list[str]:
    """All files of a folder."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def temporary_folder(final: Path) -> Path:
    """Where to write what `publish` will rename."""
    return final.with_name(f".{final.name}.tmp")


def publish(
    temporary: Path, final: Path, *, setting: Setting, files: Checksums, progress: Mapping[str, Any] | None = None
) -> CheckpointFolder:
    """Write the manifest, then rename; a folder that is in the way is deleted."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "progress": progress,
        "setting": asdict(setting),
        "files": {name: files[name] for name in sorted(files)},
    }
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    if final.exists():
        delete(final)
    temporary.rename(final)
    sync_directory(final.parent)
    return CheckpointFolder(folder=final, setting=setting, progress=progress, files=files)


def delete(folder: Path) -> None:
    """The manifest first, so that a kill leaves nothing that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def check_output(folder: Path, needed_bytes: int, *, overwrite: bool) -> None:
    """Raise CheckpointError if a conversion may not write there, or will find no room."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; choose another name")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(f"{folder}: exists already; choose another folder, or pass --overwrite")
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(place, os.W_OK):
        raise CheckpointError(f"{place}: may not be written to; choose another folder")
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder}: needs {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; make room, or choose "
            "another disk"
        )
