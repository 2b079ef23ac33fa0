"""Fixtures of the sandbox tests, and the reason why they are skipped where there can be no sandbox."""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_klong.sandbox.bubblewrap import SandboxUnavailable, check_available
from megatron_klong.sandbox.cgroups import remove_tree
from tests.conftest import REPOSITORY
from tests.unit.sandbox.machine import alive


@pytest.fixture(scope="session", autouse=True)
def working_bubblewrap() -> None:
    """Skip everything here, with the reason, on a machine without it."""
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.fixture
def mark() -> Iterator[str]:
    """A duration for `sleep` that no other process has; whatever sleeps it must be gone after the test."""
    mark = f"{600 + time.time_ns() % 10**9 / 10**9:.9f}"
    yield mark
    assert alive(mark) == []


@pytest.fixture
def temporary() -> Iterator[dict[str, str]]:
    """The environment of a runner with a TMPDIR of its own, which the user of a sandbox can reach."""
    directory = tempfile.mkdtemp(prefix="klong-test-", dir="/tmp")
    Path(directory).chmod(0o711)
    yield {**os.environ, "TMPDIR": directory, "PYTHONPATH": str(REPOSITORY)}
    for noted in Path(directory).glob("klong-sandboxes-*/*/cgroups"):  # of a runner that was killed
        for group in noted.read_text().splitlines():
            remove_tree(Path(group))
    shutil.rmtree(directory)
