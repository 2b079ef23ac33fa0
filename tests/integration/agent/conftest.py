import asyncio
from pathlib import Path

import pytest

from examples.longhaul.corpus import training_texts
from examples.longhaul.generate import generate_task
from megatron_klong.sandbox.bubblewrap import SandboxUnavailable, check_available
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.integration.agent.playing import settings


@pytest.fixture(scope="session", autouse=True)
def sandbox() -> None:
    """Skips, with the reason, where no sandbox can be had."""
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks t10 and t60, named by how many turns they take."""
    root = tmp_path_factory.mktemp("tasks")
    for turns in (10, 60):
        generate_task(root, task_id=f"t{turns}", seed=1, turns=turns)
    return root / "papers"


@pytest.fixture(scope="session")
def tokenizer(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(training_texts([tasks / "t10"], settings()), vocabulary_size=1500, folder=folder)
    return folder
