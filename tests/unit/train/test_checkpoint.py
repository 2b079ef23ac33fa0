"""Which checkpoint is found: the newest whole one, never a part of one. Whole runs: tests/integration/train."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klong.model.checkpoint_folder import FORMAT, MANIFEST, VERSION
from megatron_klong.train.checkpoint import Retention, latest


def write(folder: Path, step: int) -> Path:
    made = folder / f"step_{step:08d}"
    made.mkdir(parents=True)
    (made / "__0_0.distcp").write_bytes(b"weights")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "progress": {"step": step, "data_position": 4 * step, "data_fingerprint": "f"},
        "setting": {"model": {}, "layout": {}, "processes": 2},
        "files": {"__0_0.distcp": {"bytes": 7, "sha256": "unread"}},
    }
    (made / MANIFEST).write_text(json.dumps(manifest))
    return made


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") == (None, [])


def test_the_newest_is_found(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        write(tmp_path, step)
    found, passed_over = latest(tmp_path)
    assert found is not None
    assert (found.progress.step, found.progress.data_position, passed_over) == (100, 400, [])


def cut_short(made: Path) -> None:
    (made / "__0_0.distcp").write_bytes(b"weight")


def lose_a_file(made: Path) -> None:
    (made / "__0_0.distcp").unlink()


def lose_the_manifest(made: Path) -> None:
    (made / MANIFEST).unlink()


def cut_the_manifest(made: Path) -> None:
    (made / MANIFEST).write_text((made / MANIFEST).read_text()[:-9])


def another_version(made: Path) -> None:
    (made / MANIFEST).write_text((made / MANIFEST).read_text().replace('"version": 2', '"version": 1'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_short, r"step_00000009/__0_0\.distcp: 6 bytes, manifest says 7"),
        (lose_a_file, r"__0_0\.distcp: no bytes, manifest says 7"),
        (lose_the_manifest, r"klong\.json: not readable"),
        (cut_the_manifest, r"klong\.json: not readable"),
        (another_version, r"version 1, but this program reads klong-checkpoint version 2"),
    ],
)
def test_a_partial_one_is_passed_over_with_the_reason(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    import re

    write(tmp_path, 8)
    damage(write(tmp_path, 9))
    found, passed_over = latest(tmp_path)
    assert found is not None
    assert found.progress.step == 8
    assert len(passed_over) == 1
    assert re.search(reason, passed_over[0])


def test_one_that_is_being_written_is_not_seen(tmp_path: Path) -> None:
    write(tmp_path, 8).rename(tmp_path / ".step_00000008.tmp")
    assert latest(tmp_path) == (None, [])


def test_weights_alone_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 8)
    manifest = write(tmp_path, 9) / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "progress": None}))
    found, passed_over = latest(tmp_path)
    assert found is not None
    assert found.progress.step == 8
    assert "step_00000009: holds weights alone" in passed_over[0]


@pytest.mark.parametrize(
    ("newest", "every_steps", "kept"),
    [
        (1, None, [47]),
        (2, None, [40, 47]),
        (2, 20, [20, 40, 47]),  # 40 for both reasons
        (1, 10, [10, 20, 30, 40, 47]),
        (9, None, [5, 10, 15, 20, 30, 40, 47]),
    ],
)
def test_the_newest_are_kept_and_those_at_multiples_for_ever(
    newest: int, every_steps: int | None, kept: list[int], tmp_path: Path
) -> None:
    for step in (5, 10, 15, 20, 30, 40, 47):
        write(tmp_path, step)
    lose_the_manifest(write(tmp_path, 50))  # counts for nothing, and is not touched
    write(tmp_path, 6).rename(tmp_path / "step_00000006_of_mine")
    Retention(newest=newest, every_steps=every_steps).delete_others(tmp_path)
    found = [path.name for path in sorted(tmp_path.iterdir())]
    assert found == sorted(["step_00000006_of_mine", *(f"step_{step:08d}" for step in (*kept, 50))])
