"""Units of work -> parts, each a shard of its own with a report, in this process or in several.

A part that stands is not made again: a run that was killed goes on where it was, and the tasks of a job array share
the work by sharing the folder. Nothing of torch is imported, here or in a worker.
"""

import json
import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_klong.data.encoding import RepeatedTexts
from megatron_klong.data.loss_on import LossOn, TrainedCounts
from megatron_klong.data.report import PreprocessReport
from megatron_klong.data.shard import ShardWriter
from megatron_klong.data.shard_files import MANIFEST, ShardError, read_manifest, shard_file
from megatron_klong.data.units import Unit
from megatron_klong.files import write_atomically
from megatron_klong.processes import end_with_parent
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from megatron_klong.trajectory.renderer import Renderer, RenderError
from megatron_klong.trajectory.template_renderer import load_template_renderer
from megatron_klong.trajectory.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from megatron_klong.trajectory.windows import split

REPORT = ".report.json"
_LOG = logging.getLogger(__name__)


class WorkerError(ValueError):
    """The workers cannot do their work; the message gives the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is done with every transcript. chat_template: a file; without one, transcripts are rendered as GLM-4.5's."""

    policy: ContextPolicy
    loss_on: LossOn
    chat_template: str | None = None


class PartMaker:
    """Reads, renders, splits and writes, a transcript at a time."""

    def __init__(self, renderer: Renderer, settings: Settings) -> None:
        self._settings = settings
        self._renderer = renderer

    def make(self, unit: Unit, folder: Path) -> Path:
        """The prefix of the unit's part, made unless it stands already. Raises OSError for a disk that is full."""
        prefix = folder / unit.name
        if part_stands(prefix):
            return prefix
        report = PreprocessReport(loss_on=self._settings.loss_on)
        with ShardWriter(
            prefix,
            self._renderer.tokenizer,
            self._settings.policy,
            renderer=self._renderer.name,
            overwrite=True,
            loss_on=self._settings.loss_on,
        ) as shard:
            for item in unit.read():
                if isinstance(item, Refusal):
                    report.refusals.append(item)
                    continue
                try:
                    rendered = self._renderer.transcript(item)
                except RenderError as error:
                    report.refusals.append(
                        Refusal(source=item.source, reason=RefusalReason.MALFORMED, detail=f"{item.format}: {error}")
                    )
                    continue
                plan = split(rendered, self._settings.policy)
                trained = TrainedCounts(rendered.segments, plan, self._settings.loss_on)
                shard.add(item, rendered, plan, trained)
                report.add(item, rendered, plan, trained)
            write_atomically(shard_file(prefix, REPORT), json.dumps(report.as_json()))
        return prefix


def load_renderer(tokenizer: Tokenizer, settings: Settings) -> Renderer:
    """The renderer the settings ask for. Raises TemplateError, TokenizerError for a template that cannot be used."""
    if settings.chat_template is not None:
        return load_template_renderer(settings.chat_template, tokenizer.path)
    return GlmRenderer(replace(tokenizer, encode=RepeatedTexts(tokenizer.encode)))


def part_stands(prefix: Path) -> bool:
    """Whether there is a whole part; one that is damaged is reported and counts as missing."""
    if not (shard_file(prefix, MANIFEST).exists() and shard_file(prefix, REPORT).exists()):
        return False  # the report is written first, but a run killed while it removed its parts may leave a manifest
    try:
        read_manifest(prefix, verify_checksums=True)
    except ShardError as error:
        _LOG.warning("%s; this part is made again", error)
        return False
    return True


def read_part_report(prefix: Path) -> PreprocessReport:
    """The report beside a shard. Raises ShardError if there is none."""
    path = shard_file(prefix, REPORT)
    try:
        return PreprocessReport.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not the report of a shard ({error}); preprocess again") from error


def make_parts(
    units: Iterator[Unit], folder: Path, tokenizer: Tokenizer, settings: Settings, *, workers: int
) -> Iterator[Path]:
    """The parts of all units, in their order, as they are finished. Raises WorkerError, ShardError, OSError."""
    if workers == 1:
        maker = PartMaker(load_renderer(tokenizer, settings), settings)
        for unit in units:
            yield maker.make(unit, folder)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit whatever threads hold at that moment
    arguments = (os.getpid(), tokenizer.path, tokenizer.sha256, settings)
    _renderer_again(tokenizer.path, tokenizer.sha256, settings)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments) as pool:
        try:
            yield from _in_order(pool, units, folder, 2 * workers)
        except BrokenProcessPool as error:
            raise WorkerError(
                "a worker process was killed, most likely for want of memory; run the same command again with fewer "
                "--workers: what is finished is kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, units: Iterator[Unit], folder: Path, ahead: int) -> Iterator[Path]:
    """At most `ahead` units are in the hands of workers, so that what large files hold never piles up."""
    waiting: deque[Future[Path] | Path] = deque()
    for unit in units:
        if unit.items is not None and part_stands(folder / unit.name):  # no need to hand its content over
            waiting.append(folder / unit.name)
        else:
            waiting.append(pool.submit(_make, replace(unit), folder))
        if len(waiting) >= ahead:
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _result(part: Future[Path] | Path) -> Path:
    return part if isinstance(part, Path) else part.result()


# -- in a worker

_maker: PartMaker | None = None


def _start_worker(parent: int, tokenizer_path: str, sha256: str, settings: Settings) -> None:
    global _maker
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent says when to end
    _maker = PartMaker(_renderer_again(tokenizer_path, sha256, settings), settings)


def _make(unit: Unit, folder: Path) -> Path:
    assert _maker is not None
    return _maker.make(unit, folder)


def _renderer_again(path: str, sha256: str, settings: Settings) -> Renderer:
    """The renderer with the tokenizer of that file; the checksum tells whether control tokens had been added to it."""
    if settings.chat_template is not None:
        renderer: Renderer = load_template_renderer(settings.chat_template, path)
    else:
        renderer = load_renderer(load_tokenizer(path, add_special_tokens=True), settings)
    if renderer.tokenizer.sha256 != sha256:
        raise TokenizerError(f"{path}: changed since it was loaded; run again")
    return renderer
