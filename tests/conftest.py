"""Fixtures every test may use."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Test machines are busy: an example that takes long says nothing about the code.
settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")

# Started in the background by a shell without job control, pytest and all its children would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """An evaluation played in the test's process changes the levels and handlers for all that follow."""
    root = logging.getLogger()
    known = [root, *(found for found in root.manager.loggerDict.values() if isinstance(found, logging.Logger))]
    before = [(found, found.level, found.disabled, found.propagate, list(found.handlers)) for found in known]
    disabled = root.manager.disable
    yield
    logging.disable(disabled)
    for found, level, was_disabled, propagate, handlers in before:
        found.setLevel(level)
        found.disabled, found.propagate, found.handlers = was_disabled, propagate, handlers


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real transcripts, templates and tokenizers that nobody here wrote; they lie beside the repository."""
    folder = Path(os.environ.get("KLONG_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder}; set KLONG_SHARED_DATA to its folder")
    return folder
