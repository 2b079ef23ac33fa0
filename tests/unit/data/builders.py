"""Transcript files and runs of the preprocess program for tests."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_klong.data import units
from megatron_klong.data.preprocess import PreprocessReport, preprocess
from megatron_klong.trajectory.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY
from tests.unit.trajectory.builders import policy

PROGRAM = REPOSITORY / "tools" / "preprocess_trajectories.py"
SUFFIXES = (".bin", ".idx", ".windows.npz", ".documents.jsonl", ".manifest.json", ".report.json")
_WORDS = ["the", "loss", "of", "a", "model", "is", "lower", "when", "data", "are", "clean", "and", "café", "数据"]
# Small units, so that small inputs are worked on in many pieces; the program as a user runs it otherwise.
_SMALL_UNITS = """
import runpy, sys
from megatron_klong.data import units
units.UNIT_BYTES = {unit_bytes}
sys.argv[0] = {program!r}
runpy.run_path({program!r}, run_name="__main__")
"""


COUNTED = ("transcripts", "turns", "tokens", "trained_tokens", "windows")
_UNIT_BYTES = 12_000
_RULE = policy(1200, reserve=150, keep=300)


def row(seed: int, turns: int = 6) -> dict[str, Any]:
    """An OpenAI row of a tool-using agent."""
    chosen = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(chosen.choices(_WORDS, k=words))

    messages: list[dict[str, Any]] = [{"role": "system", "content": "work"}, {"role": "user", "content": text(12)}]
    for number in range(turns):
        call = {"id": f"c{number}", "function": {"name": "bash", "arguments": json.dumps({"cmd": text(4)})}}
        messages.append({"role": "assistant", "content": text(8), "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": text(chosen.randint(5, 60))})
    return {"id": f"row-{seed}", "messages": [*messages, {"role": "assistant", "content": "done"}]}


def write_inputs(folder: Path, *, files: int = 8, rows_of_large: int = 25, refused: bool = True) -> Path:
    """Small files, one with many rows, and some that are of no use."""
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"{number:03}.json").write_text(json.dumps(row(number)))
    (folder / "large.jsonl").write_text("".join(json.dumps(row(100 + n)) + "\n" for n in range(rows_of_large)))
    if refused:
        (folder / "cut.json").write_text('[{"messages": ')
        (folder / "empty.jsonl").write_text("")
    return folder


@contextmanager
def small_units() -> Iterator[None]:
    """So that small inputs are worked on in many pieces."""
    with patch.object(units, "UNIT_BYTES", _UNIT_BYTES):
        yield


def make(source: Path, prefix: Path, tokenizer: Path, **how: Any) -> PreprocessReport:
    """What the program does, with small units, in this process."""
    with small_units():
        return preprocess([source], prefix, load_tokenizer(tokenizer), _RULE, **how)


def arguments(source: Path, prefix: Path, tokenizer: Path, *more: object) -> list[str]:
    """Of the program, for windows that such transcripts fill several of."""
    fixed = ("--max-tokens", 1200, "--overlap-tokens", 300)
    given = ("--input", source, "--output-prefix", prefix, "--tokenizer", tokenizer, *fixed, *more)
    return [str(argument) for argument in given]


def start(*given: object, **how: Any) -> subprocess.Popen[str]:
    """The program with small units, in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    code = _SMALL_UNITS.format(program=str(PROGRAM), unit_bytes=_UNIT_BYTES)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **how,
    )


def run(*given: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """The program with small units, until it ends."""
    process = start(*given, **how)
    out, errors = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def content(prefix: Path) -> dict[str, bytes]:
    """Every file of a shard, its report included."""
    return {suffix: prefix.with_name(prefix.name + suffix).read_bytes() for suffix in SUFFIXES}
