"""Checkpoints: everything a run needs to go on as if nothing had happened, in a folder that is whole or is not there.

    CHECKPOINTS/step_00000020/      Megatron's torch_dist format: weights, optimizer, schedule, random states
                    config.toml     the run's resolved configuration

The folder and its manifest, which also says how far the data is, are those of `model.checkpoint_folder`; `latest`
passes over what is not as its manifest says, and over weights alone, with which no run can go on. What is in the files
is told in `checkpoint_state`, how they are written in `checkpoint_writer`.
Resumed on the same layout and number of processes, losses are bit for bit those of the undisturbed run
(tests/integration/train/test_sft.py). On another layout, whichever, all but the random states is loaded: they belong
to ranks (tests/integration/train/test_checkpoints.py).
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_klong.model.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    CheckpointFolder,
    Setting,
    delete,
    read_checkpoint,
)

if TYPE_CHECKING:
    from megatron_klong.train.optimizer import Training

__all__ = ["Checkpoint", "CheckpointError", "Progress", "Retention", "Setting", "checkpoint_name", "latest", "load"]

_NAME = "step_"  # and the number of the step, so that names sort by age


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is. data_position: rows trained so far, which is the position of the next one."""

    step: int
    data_position: int
    data_fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint of a run, found whole."""

    on_disk: CheckpointFolder
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.on_disk.folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints stay: the `newest` so many, and for ever those of every so many steps."""

    newest: int
    every_steps: int | None = None

    def kept(self, steps: Collection[int]) -> set[int]:
        """Of checkpoints of these steps."""
        for_ever = {step for step in steps if self.every_steps and step % self.every_steps == 0}
        return for_ever | set(sorted(steps)[-self.newest :])

    def delete_others(self, folder: Path) -> None:
        """All others that are whole; what is damaged, or has another name, is left to be looked into."""
        names = [path.name for path in folder.glob(_NAME + 8 * "[0-9]") if (path / MANIFEST).exists()]
        whole = {int(name.removeprefix(_NAME)): folder / name for name in names}
        for step in sorted(whole.keys() - self.kept(whole)):
            delete(whole[step])


def checkpoint_name(step: int) -> str:
    """Of its folder."""
    return f"{_NAME}{step:08d}"


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and why newer ones were passed over. Imports no torch."""
    passed_over: list[str] = []
    for candidate in sorted(folder.glob(f"{_NAME}*"), reverse=True):
        try:
            return _read(candidate), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def _read(folder: Path) -> Checkpoint:
    found = read_checkpoint(folder)
    if found.progress is None:
        raise CheckpointError(f"{folder}: holds weights alone; start from them with megatron_init, and move it away")
    return Checkpoint(on_disk=found, progress=Progress(**found.progress))


def load(checkpoint: Checkpoint, training: "Training", setting: Setting) -> None:
    """Put weights, optimizer, schedule and random states back, called by all processes at once.

    Raises CheckpointError, on every process, for a damaged file or another model.
    """
    from megatron.core import dist_checkpointing

    from megatron_klong.model.load_megatron import verify_together
    from megatron_klong.train.checkpoint_state import state_to_load, take_back

    _refuse_other_model(checkpoint, setting)
    verify_together(checkpoint.on_disk, cure=f"delete {checkpoint.folder} to resume from the one before")
    saved = checkpoint.on_disk
    layout = saved.layout.model_dump(mode="json")
    same = (layout, saved.setting.processes) == (setting.layout, setting.processes)
    loaded = dist_checkpointing.load(state_to_load(training, random=same), str(checkpoint.folder))
    take_back(training, loaded, random=same)


def _refuse_other_model(checkpoint: Checkpoint, setting: Setting) -> None:
    model = checkpoint.on_disk.model.model_dump(mode="json")
    if changed := [name for name in setting.model if model[name] != setting.model[name]]:
        raise CheckpointError(f"{checkpoint.folder}: of another model ({', '.join(changed)}); use another run folder")
