"""Transcript files -> one shard and a report of what went in, what came out and what was left out, and why.

Always: every input ends as windows, as a refusal with a reason, or as dropped tokens with a reason; the shard is the
same byte for byte whatever the number of processes and however often the run was killed and started again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from megatron_klong.data.loss_on import LossOn
from megatron_klong.data.materialize import materialize
from megatron_klong.data.merge import merge_shards
from megatron_klong.data.parts import REPORT, Settings, load_renderer, make_parts, read_part_report
from megatron_klong.data.report import PreprocessReport
from megatron_klong.data.shard_files import shard_file
from megatron_klong.data.units import find_files, make_units, program_digest
from megatron_klong.data.work_folder import discard, work_folder
from megatron_klong.files import write_atomically
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.tokenizer import Tokenizer

__all__ = ["REPORT", "NothingUsableError", "OutputError", "PreprocessReport", "RefusedError", "Share", "preprocess"]

type Share = tuple[int, int]  # (2, 16): every sixteenth unit, from the third on


class NothingUsableError(ValueError):
    """Not one window came out; the message says what became of the input."""


class RefusedError(ValueError):
    """Input was refused, and the run was not to go on without it; the message says what."""


class OutputError(ValueError):
    """The output cannot be written; the message names place and cure."""


def preprocess(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer: Tokenizer,
    policy: ContextPolicy,
    *,
    loss_on: LossOn = "new",
    chat_template: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    materialized: bool = False,
    share: Share | None = None,
) -> PreprocessReport:
    """Write the shard at `output_prefix` and its report beside it; with `share`, only that share of its parts.

    chat_template: a Hugging Face template with generation markers, whose tokenizer `tokenizer` is; GLM-4.5 without it.

    Raises ShardError if it exists already, FileNotFoundError for an input that is not there, NothingUsableError
    if not one window came out, RefusedError if strict and anything was refused, OutputError for a full disk. Then no
    shard is published; parts that are finished are kept for the next run, unless none was of use.
    """
    files = find_files(inputs)
    settings = Settings(
        policy=policy, loss_on=loss_on, chat_template=str(chat_template) if chat_template is not None else None
    )
    renderer = load_renderer(tokenizer, settings)
    digest = _digest([renderer.tokenizer.sha256, renderer.name, asdict(settings), program_digest()])
    run = _digest([digest, [(file.path, file.size_bytes, file.modified_ns) for file in files]])
    report = PreprocessReport(loss_on=loss_on, files=len(files))
    with (
        _naming(output_prefix),
        work_folder(output_prefix, run, overwrite=overwrite, shared=share is not None) as folder,
    ):
        units = make_units(files, digest)
        if share is not None:
            units = islice(units, share[0], None, share[1])
        parts = []
        with tqdm(desc="preprocess", unit=" transcripts", delay=2, disable=None) as progress:
            for part in make_parts(units, folder, tokenizer, settings, workers=workers):
                counted = read_part_report(part)
                report.absorb(counted)
                progress.update(counted.transcripts)
                parts.append(part)
        if share is not None:
            return report
        if strict and report.refusals:
            raise RefusedError(_refused(report))
        if not report.windows:
            discard(folder)
            raise NothingUsableError(f"no window came out\n{report.summary()}")
        merge_shards(parts, output_prefix, overwrite=True)
        _write_report(report, output_prefix)
        if materialized:
            materialize(output_prefix)
        discard(folder)
    return report


def merge(
    shards: Sequence[Path], output_prefix: Path, *, overwrite: bool = False, materialized: bool = False
) -> PreprocessReport:
    """Make one shard of several, and one report of theirs. Raises ShardError, OutputError."""
    report = PreprocessReport()
    with _naming(output_prefix):
        for shard in shards:
            found = read_part_report(shard)
            report.loss_on = found.loss_on
            report.absorb(found)
        merge_shards(shards, output_prefix, overwrite=overwrite)
        _write_report(report, output_prefix)
        if materialized:
            materialize(output_prefix)
    return report


def _write_report(report: PreprocessReport, prefix: Path) -> None:
    write_atomically(shard_file(prefix, REPORT), json.dumps(report.as_json(), indent=1) + "\n")


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogateescape")).hexdigest()


def _refused(report: PreprocessReport, shown: int = 20) -> str:
    lines = [f"{one.source}: {one.reason}: {one.detail}" for one in report.refusals[:shown]]
    if len(report.refusals) > shown:
        lines.append(f"and {len(report.refusals) - shown} more")
    return "\n".join([f"{len(report.refusals)} inputs refused, so no shard was written: mend or remove them", *lines])


@contextmanager
def _naming(prefix: Path) -> Iterator[None]:
    """What reads input makes refusals of its faults, so a fault of the system is one of the output."""
    try:
        yield
    except OSError as error:
        place = error.filename or prefix
        raise OutputError(
            f"{place}: {error.strerror or error}; give the output room and permission to be written, then run the same "
            "command again: parts that are finished are kept"
        ) from error
