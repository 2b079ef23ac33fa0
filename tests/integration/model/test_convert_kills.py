"""A conversion killed at any moment leaves a whole folder or none, no process, and nothing in the next one's way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.conversion.export_checkpoint import export_checkpoint
from megatron_klong.model.conversion.import_checkpoint import import_checkpoint
from tests.conftest import REPOSITORY
from tests.integration.model.launch import kill_in_its_work
from tests.integration.model.weights import assert_same_weights, write_weights

LAYOUT = LayoutConfig(tensor_parallel=2)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
CONVERT_FOREVER = """
import sys
from pathlib import Path
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.conversion.export_checkpoint import export_checkpoint
from megatron_klong.model.conversion.import_checkpoint import import_checkpoint
folder = Path(sys.argv[1])
while True:
    import_checkpoint(folder / "hf", folder / "k", LayoutConfig(tensor_parallel=2), processes=1, overwrite=True)
    export_checkpoint(folder / "k", folder / "out", processes=1, overwrite=True)
    print("done", flush=True)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "hf")


@pytest.mark.parametrize("milliseconds", [40, 230, 410, 660])
def test_one_that_is_killed_leaves_a_whole_folder_or_none(source: Path, tmp_path: Path, milliseconds: int) -> None:
    kill_in_its_work(CONVERT_FOREVER, str(tmp_path), milliseconds=milliseconds)
    if (tmp_path / "k").exists():
        export_checkpoint(tmp_path / "k", tmp_path / "from_k", processes=1)
        assert_same_weights(tmp_path / "from_k", source)
    if (tmp_path / "out").exists():
        assert_same_weights(tmp_path / "out", source)
    import_checkpoint(source, tmp_path / "k", LAYOUT, processes=1, overwrite=True)
    export_checkpoint(tmp_path / "k", tmp_path / "out", processes=1, overwrite=True)
    assert_same_weights(tmp_path / "out", source)
    assert not list(tmp_path.glob(".*"))


def test_workers_end_with_the_program_that_is_killed(source: Path, tmp_path: Path) -> None:
    tool = [sys.executable, "tools/convert_checkpoint.py", "import", "--hf", str(source), "--out", str(tmp_path / "k")]
    converter = subprocess.Popen([*tool, "--processes", "2"], cwd=REPOSITORY, env=ENVIRONMENT)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while len(workers) < 2 and time.monotonic() < deadline:
        workers = psutil.Process(converter.pid).children(recursive=True)
        time.sleep(0.05)
    assert converter.poll() is None
    converter.send_signal(signal.SIGKILL)
    converter.wait(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert not (tmp_path / "k").exists()
    import_checkpoint(source, tmp_path / "k", LAYOUT, processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "k"]
