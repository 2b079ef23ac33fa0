"""Many processes, and runs that are killed: the shard is the same byte for byte, and never half of one."""

import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_klong.data import units, work_folder
from megatron_klong.data.parts import WorkerError
from megatron_klong.data.preprocess import preprocess
from megatron_klong.data.shard import Shard, ShardError
from megatron_klong.trajectory.importers.refusal import Refusal
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.tokenizer import TokenizerError, load_tokenizer
from tests.conftest import REPOSITORY
from tests.unit.data.builders import PROGRAM, SUFFIXES, arguments, content, make, run, start, write_inputs
from tests.unit.trajectory.builders import policy
from tests.unit.trajectory.test_tokenizer import write_tokenizer

KILLS = [pytest.param(4, id="4 kills"), pytest.param(20, id="20 kills", marks=pytest.mark.slow)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tok", control=True)


def test_the_shard_is_the_same_with_any_number_of_processes_and_units(tmp_path: Path, tokenizer: Path) -> None:
    source = write_inputs(tmp_path / "in")
    for name, workers in (("one", 1), ("two", 2)):
        make(source, tmp_path / name / "s", tokenizer, workers=workers)
        files = sorted(file.name for file in (tmp_path / name).iterdir())
        assert files == sorted(f"s{suffix}" for suffix in SUFFIXES)
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments(source, tmp_path / "whole" / "s", tokenizer)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0
    assert content(tmp_path / "one" / "s") == content(tmp_path / "two" / "s") == content(tmp_path / "whole" / "s")
    rows = [document["id"].split("#")[0] for document in Shard(tmp_path / "one" / "s").documents]
    assert rows == [f"row-{n}" for n in range(8)] + [f"row-{100 + n}" for n in range(25)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path: Path, tokenizer: Path, kills: int) -> None:
    source = write_inputs(tmp_path / "in", files=20, rows_of_large=60)
    started = time.monotonic()
    assert run(*arguments(source, tmp_path / "whole", tokenizer, "--workers", 2)).returncode == 0
    seconds = time.monotonic() - started
    command = arguments(source, tmp_path / "out" / "s", tokenizer, "--workers", 2)
    chosen = random.Random(kills)
    struck = 0
    for _ in range(kills):
        process = start(*command)
        time.sleep(chosen.uniform(0.2, 1.0) * seconds)
        process.kill()
        process.communicate()
        struck += process.returncode == -signal.SIGKILL
        _wait_for_workers(tmp_path / "out")
        if (tmp_path / "out" / "s.manifest.json").exists():
            assert content(tmp_path / "out" / "s")[".bin"] == content(tmp_path / "whole")[".bin"]
            if process.returncode == 0 or not (tmp_path / "out" / "s.parts" / "run").exists():
                shutil.rmtree(tmp_path / "out")  # it had finished: the next one begins anew
    ended = run(*command, *(["--overwrite"] if (tmp_path / "out" / "s.manifest.json").exists() else []))
    assert ended.returncode == 0, ended.stderr
    assert struck > 0
    assert content(tmp_path / "out" / "s") == content(tmp_path / "whole")
    assert [file.name for file in (tmp_path / "out").iterdir() if "parts" in file.name or "tmp" in file.name] == []


def _wait_for_workers(folder: Path) -> None:
    """Until nobody holds the lock of the work folder open."""
    deadline = time.monotonic() + 20
    while _open_below(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _open_below(folder) == []


def _open_below(folder: Path) -> list[str]:
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(f"{folder}/"):
            found.append(target)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_finished_is_not_made_again(tmp_path: Path, tokenizer: Path, workers: int) -> None:
    source, prefix = write_inputs(tmp_path / "in"), tmp_path / "s"
    make(source, prefix, tokenizer, share=(0, 2))
    parts = _parts(prefix)
    assert len(parts) > 1
    assert not (tmp_path / "s.bin").exists()
    make(source, prefix, tokenizer, share=(1, 2), workers=workers)
    after = _parts(prefix)
    assert len(after) > len(parts)
    assert parts.items() <= after.items()
    make(source, prefix, tokenizer, share=(0, 1), workers=workers)
    assert _parts(prefix) == after
    make(source, prefix, tokenizer, workers=workers)
    make(source, tmp_path / "whole", tokenizer)
    assert content(prefix) == content(tmp_path / "whole")


def _parts(prefix: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in prefix.with_name("s.parts").glob("*.bin")}


def test_a_damaged_part_is_made_again_and_said_so(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, prefix = write_inputs(tmp_path / "in"), tmp_path / "s"
    make(source, prefix, tokenizer, share=(0, 1))
    broken = sorted((tmp_path / "s.parts").glob("*.bin"))[1]
    broken.write_bytes(b"\0" * broken.stat().st_size)
    make(source, prefix, tokenizer)
    assert f"{broken.name}: checksum differs" in caplog.text
    assert "made again" in caplog.text
    make(source, tmp_path / "whole", tokenizer)
    assert content(prefix) == content(tmp_path / "whole")


def test_a_part_whose_report_is_gone_is_made_again(tmp_path: Path, tokenizer: Path) -> None:
    source, prefix = write_inputs(tmp_path / "in"), tmp_path / "s"
    make(source, prefix, tokenizer, share=(0, 1))
    sorted((tmp_path / "s.parts").glob("*.report.json"))[1].unlink()
    report = make(source, prefix, tokenizer)
    assert report.as_json() == make(source, tmp_path / "whole", tokenizer).as_json()
    assert content(prefix) == content(tmp_path / "whole")


def test_killed_while_it_removes_its_parts_it_has_finished(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, prefix = write_inputs(tmp_path / "in"), tmp_path / "s"

    def remove_some(folder: Path) -> None:
        for file in sorted(folder.glob("*.report.json"))[:2]:
            file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", remove_some)
        with pytest.raises(KeyboardInterrupt):
            make(source, prefix, tokenizer)
    before = content(prefix)
    with pytest.raises(ShardError, match=r"s\.bin: exists already"):
        make(source, prefix, tokenizer)
    make(source, prefix, tokenizer, overwrite=True)
    assert content(prefix) == before
    assert not (tmp_path / "s.parts").exists()


@pytest.mark.parametrize("what", ["settings", "input"])
def test_parts_of_other_settings_or_input_are_not_used(tmp_path: Path, tokenizer: Path, what: str) -> None:
    source, prefix = write_inputs(tmp_path / "in"), tmp_path / "s"
    make(source, prefix, tokenizer, share=(0, 1))
    loss_on = "new"
    if what == "settings":
        loss_on = "window"
    else:
        (source / "001.json").write_text((source / "002.json").read_text())
    make(source, prefix, tokenizer, loss_on=loss_on)
    make(source, tmp_path / "whole", tokenizer, loss_on=loss_on)
    assert content(prefix) == content(tmp_path / "whole")
    assert not (tmp_path / "s.parts").exists()


def test_a_finished_shard_is_replaced_only_when_told(tmp_path: Path, tokenizer: Path) -> None:
    source, prefix = write_inputs(tmp_path / "in", files=2, rows_of_large=2), tmp_path / "s"
    make(source, prefix, tokenizer)
    before = content(prefix)
    with pytest.raises(ShardError, match=r"s\.bin: exists already; .* --overwrite"):
        make(source, prefix, tokenizer)
    assert content(prefix) == before
    (source / "002.json").write_text((source / "001.json").read_text())
    make(source, prefix, tokenizer, overwrite=True)
    assert len(Shard(prefix).documents) == 5


def test_a_second_run_at_the_same_place_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_folder, "_WAIT_SECONDS", 0.2)
    source, prefix = write_inputs(tmp_path / "in", files=2, rows_of_large=2), tmp_path / "s"
    (tmp_path / "s.parts").mkdir()
    with (tmp_path / "s.parts" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match=r"s\.parts: another run is at work here"):
            make(source, prefix, tokenizer)
    assert make(source, prefix, tokenizer).transcripts == 4


def test_a_run_that_waited_for_another_does_not_replace_its_shard(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, prefix = write_inputs(tmp_path / "in", files=2, rows_of_large=2), tmp_path / "s"
    locked = work_folder._lock

    def finish_first(descriptor: int, folder: Path, *, shared: bool) -> None:
        monkeypatch.setattr(work_folder, "_lock", locked)
        make(source, prefix, tokenizer)
        locked(descriptor, folder, shared=shared)

    monkeypatch.setattr(work_folder, "_lock", finish_first)
    with pytest.raises(ShardError, match=r"s\.bin: exists already"):
        make(source, prefix, tokenizer, loss_on="window")
    make(source, tmp_path / "whole", tokenizer)
    assert content(prefix) == content(tmp_path / "whole")


def test_input_that_changes_while_it_is_read_stops_the_run(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_inputs(tmp_path / "in", files=2, rows_of_large=2)
    read = units.read_transcripts

    def read_and_change(file: Path) -> Iterator[Transcript | Refusal]:
        yield from read(file)
        file.write_text(file.read_text() + " ")

    monkeypatch.setattr(units, "read_transcripts", read_and_change)
    with pytest.raises(units.InputChangedError, match=r"000\.json: changed while it was read"):
        make(source, tmp_path / "s", tokenizer)
    assert not (tmp_path / "s.manifest.json").exists()


def test_a_worker_that_is_killed_ends_the_run_with_the_cure_and_the_same_command_goes_on(
    tmp_path: Path, tokenizer: Path
) -> None:
    source, prefix = write_inputs(tmp_path / "in"), tmp_path / "s"

    def kill_the_first() -> None:
        deadline = time.monotonic() + 60
        while not multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.01)
        for worker in multiprocessing.active_children():
            worker.kill()

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with pytest.raises(WorkerError, match=r"a worker process was killed, .* with fewer --workers: what is finished is"):
        make(source, prefix, tokenizer, workers=2)
    killer.join()
    assert not (tmp_path / "s.manifest.json").exists()
    make(source, prefix, tokenizer)
    make(source, tmp_path / "whole", tokenizer)
    assert content(prefix) == content(tmp_path / "whole")


def test_a_tokenizer_that_changed_since_it_was_loaded_stops_the_workers(tmp_path: Path, tokenizer: Path) -> None:
    source, loaded = write_inputs(tmp_path / "in", files=2, rows_of_large=2), load_tokenizer(tokenizer)
    write_tokenizer(tokenizer, control=False)  # control tokens can be added to it: only the ids would tell
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: changed since it was loaded; run again"):
        preprocess([source], tmp_path / "s", loaded, policy(1200, reserve=150, keep=300), workers=2)
    assert not (tmp_path / "s.manifest.json").exists()


def test_what_a_killed_writer_left_of_this_output_is_removed(tmp_path: Path, tokenizer: Path) -> None:
    source = write_inputs(tmp_path / "in", files=2, rows_of_large=2)
    ours, other = tmp_path / ".s.bin.x1.tmp", tmp_path / ".s2.bin.x1.tmp"
    for file in (ours, other):
        file.write_bytes(b"half")
    make(source, tmp_path / "s", tokenizer, share=(0, 1))
    assert ours.exists()  # of a task beside this one, for all that a task of a job array knows
    make(source, tmp_path / "s", tokenizer)
    assert (ours.exists(), other.exists()) == (False, True)
