"""What runs without a model imports no torch, and no `--help` does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

WITHOUT_TORCH = [
    "megatron_klong.trajectory.windows",
    "megatron_klong.trajectory.importers",
    "megatron_klong.trajectory.replay",
    "megatron_klong.trajectory.tokenizer_training",
    "megatron_klong.sandbox.provider",
    "megatron_klong.config",
    "megatron_klong.judge.grading",
    "megatron_klong.agent.registry",
    "megatron_klong.agent.collect",
    "megatron_klong.evaluate.report",
    "megatron_klong.data.preprocess",
    "megatron_klong.data.shard",
    "megatron_klong.data.packing",
    "megatron_klong.model.config",
    "megatron_klong.model.checkpoint_folder",
    "megatron_klong.model.conversion.weights_manifest",
    "megatron_klong.model.conversion.program",
    "megatron_klong.model.planner.program",
    "megatron_klong.train.config",
    "megatron_klong.data.mixture",
    "megatron_klong.serve.provider",
    "megatron_klong.serve.app",
    "megatron_klong.serve.launch",
    "megatron_klong.processes",
    "megatron_klong.rl.config",
    "megatron_klong.rl.experience",
    "megatron_klong.rl.loop",
    "megatron_klong.rl.bank",
    "megatron_klong.rl.advantages",
    "megatron_klong.rl.stages",
]
PROGRAMS = [[str(file.relative_to(REPOSITORY))] for file in sorted((REPOSITORY / "tools").glob("*.py"))] + [
    ["-m", "examples.quickstart"],
    ["-m", "megatron_klong.train.sft"],
    ["-m", "megatron_klong.serve"],
    ["-m", "megatron_klong.rl"],
    ["-m", "examples.longhaul.make_tasks"],
    ["-m", "examples.longhaul.serve_teachers"],
]
_HEAVY = ("torch", "megatron", "transformers")
_LIST_HEAVY = f"import sys; print([name for name in {_HEAVY} if name in sys.modules])"


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_it_imports_no_torch(module: str) -> None:
    made = _run(["-c", f"import {module}; {_LIST_HEAVY}"])
    assert made.stdout.strip().splitlines()[-1:] == ["[]"], made.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: Path(program[-1]).stem)
def test_help_imports_no_torch(program: list[str]) -> None:
    # -X importtime names every module that is imported.
    made = _run(["-X", "importtime", *program, "--help"])
    assert made.returncode == 0, made.stderr
    assert "usage" in made.stdout.lower()
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in made.stderr.splitlines() if "|" in line}
    assert not imported & set(_HEAVY)


def test_no_file_is_longer_than_400_lines() -> None:
    files = [file for folder in ("megatron_klong", "tools", "examples") for file in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 40
    lengths = {str(file.relative_to(REPOSITORY)): len(file.read_text().splitlines()) for file in files}
    assert max(lengths.values()) < 400, max(lengths, key=lengths.__getitem__)
