"""The writer of a run's checkpoints: a thread of each process writes its files while training goes on.

    save     all processes copy their state to memory and agree on a plan of files; then training goes on
    thread   writes this process's files into the temporary folder, flushes them to disk, computes their checksums
    poll     once all processes are done: the index of the files, the manifest, the rename that makes it a checkpoint

A thread, because it ends with its process however that ends: no writer is left behind by a kill, and none needs a fork
beside CUDA and gloo, or the program started again. It takes no part in collectives; those are in `save`, `poll` and
`finish`, which all processes call at the same steps.

Always (tests/integration/train/test_checkpoints.py): one save is in flight at most; what is being written is not what
later steps make of the weights; a file that could not be written ends the run at the next poll, on every process.
"""

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import distributed

from megatron_klong.config import Config, write_resolved
from megatron_klong.model.checkpoint_folder import (
    CheckpointError,
    Checksums,
    Setting,
    checksums,
    file_names,
    publish,
    temporary_folder,
)
from megatron_klong.train.checkpoint import Progress, Retention, checkpoint_name
from megatron_klong.train.checkpoint_state import state_to_save
from megatron_klong.train.optimizer import Training
from megatron_klong.train.step import TrainingDiverged

CONFIG = "config.toml"


@dataclass(kw_only=True, slots=True)
class _Save:
    """One that is in flight. files, fault: filled by the thread; finalize: Megatron's, for all processes at once."""

    final: Path
    temporary: Path
    progress: Progress
    setting: Setting
    finalize: list[Callable[[], None]]
    thread: threading.Thread | None = None
    files: Checksums = field(default_factory=dict)
    fault: str | None = None


class CheckpointWriter:
    """Of one run. As a context it is left with nothing in flight, unless by an error that one process has alone."""

    def __init__(self, folder: Path, config: Config, retention: Retention, *, background: bool) -> None:
        self._folder = folder
        self._config = config
        self._retention = retention
        self._background = background
        self._current: _Save | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, TrainingDiverged):  # which every process raises
            self.finish()

    def save(self, training: Training, progress: Progress, setting: Setting) -> None:
        """Begin to write a checkpoint, after the one before is whole. Raises CheckpointError."""
        self.finish()
        final = self._folder / checkpoint_name(progress.step)
        temporary = temporary_folder(final)
        _by_rank_0(lambda: self._make_room(temporary))
        _keep_results_in_this_process()
        request = dist_checkpointing.save(
            state_to_save(training), str(temporary), async_sharded_save=True, async_strategy="mcore"
        )
        save = _Save(
            final=final, temporary=temporary, progress=progress, setting=setting, finalize=request.finalize_fns
        )
        write = _writing(request, save)
        self._current = save
        if self._background:
            save.thread = threading.Thread(target=write, name=f"writes {final.name}", daemon=True)
            save.thread.start()
        else:
            write()
            self.finish()

    def poll(self) -> None:
        """Publish the one in flight if every process has written its part; does not wait. Raises CheckpointError."""
        if self._current is None:
            return
        thread = self._current.thread
        done = torch.tensor(int(thread is None or not thread.is_alive()), device=torch.cuda.current_device())
        distributed.all_reduce(done, distributed.ReduceOp.MIN)
        if int(done):
            self.finish()

    def finish(self) -> None:
        """Wait for the one in flight, and publish it. Raises CheckpointError."""
        if self._current is None:
            return
        save, self._current = self._current, None
        if save.thread is not None:
            save.thread.join()
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, (save.files, save.fault))
        if faults := [fault for _, fault in parts if fault]:
            raise CheckpointError(faults[0])
        for finalize in save.finalize:
            finalize()
        _by_rank_0(lambda: self._publish(save, {name: entry for files, _ in parts for name, entry in files.items()}))

    def _make_room(self, temporary: Path) -> None:
        for left_by_a_kill in self._folder.glob(".step_*.tmp"):
            shutil.rmtree(left_by_a_kill)
        temporary.mkdir(parents=True)

    def _publish(self, save: _Save, files: Checksums) -> None:
        write_resolved(self._config, save.temporary / CONFIG)
        others = [name for name in file_names(save.temporary) if name not in files]
        whole = {**files, **checksums(save.temporary, others)}
        # what is in the way is damaged: a run goes on behind the newest whole one
        publish(save.temporary, save.final, setting=save.setting, files=whole, progress=asdict(save.progress))
        self._retention.delete_others(self._folder)


def _keep_results_in_this_process() -> None:
    """Keep Megatron from starting a process for a queue of results that here never leaves this one.

    That process takes seconds to start, runs the program's file again, and outlives a kill of the trainer.
    """
    filesystem_async._results_queue = queue.Queue()


def _writing(request: Any, save: _Save) -> Callable[[], None]:
    """What the thread does. Before this returns, all that it will write has been copied from the device."""
    if request.async_fn is None:
        return lambda: None  # this process holds only what others write
    (transforms, _), (_, _, results) = request.async_fn.args, request.async_fn_args
    buckets = request.preload_fn()

    def write() -> None:
        try:
            results.put({number: _write_file(number, bucket, transforms) for number, bucket in enumerate(buckets)})
            save.files = checksums(save.temporary, [Path(path).name for path, _, _ in buckets])
        except Exception as error:  # the edge of the thread: `finish` raises it, on every process
            save.fault = f"{error}; see to the disk, and start again to go on"

    return write


def _write_file(number: int, bucket: Any, transforms: list[Any]) -> list[Any]:
    """What Megatron wants to know of the file that it wrote."""
    path = bucket[0]
    _, written = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, None, None, use_fsync=True
    )
    if isinstance(written, Exception):
        raise OSError(f"{path}: {_first(written)}") from written
    places: list[Any] = written
    return places


def _first(error: BaseException) -> BaseException:
    """What went wrong before what is said last: torch closes a file that it could not write, and trips over its end."""
    return _first(error.__context__) if error.__context__ else error


def _by_rank_0(work: Callable[[], None]) -> None:
    """Have one process do it. Raises CheckpointError on all where that fails."""
    fault: list[str | None] = [None]
    if distributed.get_rank() == 0:
        try:
            work()
        except OSError as error:
            fault[0] = f"{error.filename}: {error.strerror}; see to the disk, and start again to go on"
    distributed.broadcast_object_list(fault, src=0)
    if fault[0]:
        raise CheckpointError(fault[0])
