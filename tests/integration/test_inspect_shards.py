"""The program as a user runs it: what it prints, where, and how it exits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klong.data.shard import ShardWriter
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from megatron_klong.trajectory.windows import split
from tests.conftest import REPOSITORY
from tests.unit.trajectory.builders import assistant, bash, policy, tool, transcript, user

WORK = [m for n in range(6) for m in (assistant(calls=[bash(f"python a.py {n}")]), tool("NameError: \x1b[31mx"))]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("shard")
    train_tokenizer(["python runs"] * 3, vocabulary_size=300, folder=folder)
    tokenizer = load_tokenizer(folder)
    renderer, rule = GlmRenderer(tokenizer), policy(300, reserve=80, keep=100)
    with ShardWriter(folder / "sft", tokenizer, rule, renderer=renderer.name, overwrite=False) as shard:
        rendered = renderer.transcript(transcript(user("task"), *WORK))
        shard.add(transcript(user("task"), *WORK), rendered, split(rendered, rule))
    return folder / "sft"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/inspect_shards.py", *map(str, arguments)]
    path = {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **path, **environment}, timeout=120
    )


def test_the_summary_is_printed(prefix: Path) -> None:
    done = run(prefix, "--tokenizer", prefix.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{prefix}: 1 documents, ")
    for title in ("Tokens by kind", "Windows", "Training", "Phases of work"):
        assert f"\n{title}\n" in done.stdout
    assert "\x1b" not in done.stdout


def test_programs_get_json(prefix: Path) -> None:
    done = run(prefix, "--json", "--tokenizer", prefix.parent)
    summary = json.loads(done.stdout)
    assert summary["trainable_tokens"] == summary["trained_tokens"] == summary["times_trained"]["1"]
    assert [row["phase"] for row in summary["phases"]] == ["running", "debugging"]
    assert summary["context_tokens_per_unique_token"] > 1


def test_a_window_is_coloured_only_where_it_should_be(prefix: Path) -> None:
    arguments = (prefix, "--window", 1, "--tokenizer", prefix.parent)
    piped, forced = run(*arguments), run(*arguments, "--color", "always")
    never = run(*arguments, "--color", "never")
    assert piped.returncode == forced.returncode == 0
    assert "\x1b" not in piped.stdout
    assert "\x1b[7;32m<|observation|>\x1b[0m" in forced.stdout
    assert piped.stdout == never.stdout
    assert "NameError: ⟨ESC⟩[31mx" in piped.stdout


def test_a_document_is_shown_with_its_windows(prefix: Path) -> None:
    done = run(prefix, "--document", 0, "--tokenizer", prefix.parent)
    assert done.stdout.startswith("document 0: t, from test, 6 turns, ")
    assert "debugging" in done.stdout


def test_a_page_is_written(prefix: Path, tmp_path: Path) -> None:
    done = run(prefix, "--html", tmp_path / "new" / "report.html", "--tokenizer", prefix.parent)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "new" / "report.html"))
    assert (tmp_path / "new" / "report.html").read_text("utf-8").startswith("<!doctype html>")


def test_a_sound_shard_is_verified(prefix: Path) -> None:
    done = run(f"{prefix}.bin", "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"✓ {prefix} is sound")


def test_a_reader_that_stops_reading_is_no_error(prefix: Path) -> None:
    command = f"{sys.executable} tools/inspect_shards.py {prefix} --window 0 --color always | head -1"
    done = subprocess.run(
        command, shell=True, cwd=REPOSITORY, capture_output=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert done.stderr == b""


def test_a_poor_console_gets_what_it_can_show(prefix: Path) -> None:
    done = run(prefix, "--window", 0, "--tokenizer", prefix.parent, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "\\u2503" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MISSING"], r"missing.manifest.json: missing, so there is no finished shard at this prefix; preprocess"),
        (["PREFIX", "--window", "99"], "no window 99; its windows are numbered 0 to"),
        (["PREFIX", "--document", "1"], "no document 1; its documents are numbered 0 to 0"),
        (["PREFIX", "--tokenizer", "MISSING"], "no such file"),
        (["DAMAGED", "--verify"], "damaged.bin: checksum differs from the manifest's; delete"),
    ],
)
def test_an_error_is_one_line_with_file_and_cure(prefix: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    damaged = tmp_path / "damaged"
    for file in prefix.parent.glob("sft.*"):
        (tmp_path / file.name.replace("sft", "damaged")).write_bytes(file.read_bytes())
    content = bytearray(Path(f"{damaged}.bin").read_bytes())
    content[10] ^= 1
    Path(f"{damaged}.bin").write_bytes(content)
    paths = {"MISSING": tmp_path / "missing", "PREFIX": prefix, "DAMAGED": damaged}
    done = run(*(paths.get(argument, argument) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['inspect_shards.py', '--help']\n"
        "try:\n import runpy; runpy.run_path('tools/inspect_shards.py', run_name='__main__')\n"
        "except SystemExit: print({'torch', 'megatron.core', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("set()\n")
