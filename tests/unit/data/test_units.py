"""Units: every item of the input in one of them, in order, whatever the sizes."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_klong.data import units
from megatron_klong.data.units import InputFile, find_files, make_units
from megatron_klong.trajectory.importers import read_transcripts
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from tests.unit.data.builders import row, small_units


def large_file(folder: Path) -> Path:
    """25 rows; the last 12 are followed by a line that is no JSON each."""
    lines = [json.dumps(row(number)) + "\n" for number in range(25)]
    file = folder / "large.jsonl"
    file.write_text("".join(line if n < 13 else f"{line}{{broken\n" for n, line in enumerate(lines)))
    return file


def test_a_large_file_is_handed_out_in_groups_its_refusals_among_the_transcripts(tmp_path: Path) -> None:
    file = large_file(tmp_path)
    with small_units():
        made = list(make_units(find_files([file]), "settings"))
    assert len(made) > 2
    assert [unit.first_item for unit in made] == [
        sum(len(one.items or ()) for one in made[:n]) for n in range(len(made))
    ]
    items = [item for unit in made for item in unit.read()]
    assert items == list(read_transcripts(file))
    assert sum(isinstance(item, Refusal) for item in items) == 12
    assert len({unit.name for unit in made}) == len(made)


def test_a_file_that_ends_with_a_full_group_has_no_empty_one_behind_it(tmp_path: Path) -> None:
    file = large_file(tmp_path)
    with patch.object(units, "UNIT_BYTES", 1):
        made = list(make_units(find_files([file]), "settings"))
    assert [len(unit.items or ()) for unit in made] == [1] * 37


def test_a_link_to_nothing_is_an_input_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere.json")
    (file,) = find_files([tmp_path])
    assert file == InputFile(str(tmp_path / "gone.json"), -1, -1)
    (unit,) = make_units([file], "settings")
    (item,) = unit.read()
    assert isinstance(item, Refusal)
    assert item.reason is RefusalReason.UNREADABLE
    assert "gone.json" in item.source


def test_an_input_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent: no such file or folder of transcripts"):
        find_files([tmp_path, tmp_path / "absent"])


def test_names_follow_settings_and_content() -> None:
    first, touched = InputFile("a.json", 10, 1), InputFile("a.json", 10, 2)
    names = [
        unit.name for file, how in ((first, "s"), (touched, "s"), (first, "t")) for unit in make_units([file], how)
    ]
    assert len(set(names)) == 3
    assert next(make_units([first], "s")).name == names[0]


@pytest.mark.parametrize(
    ("total_bytes", "expected"),
    [
        (1 << 20, 2),  # units of half a megabyte are the smallest
        (80 << 20, 64),  # between, 64 units
        (1 << 30, 128),  # units of 8 MiB are the largest
    ],
)
def test_units_are_small_enough_to_share_and_large_enough_to_keep(total_bytes: int, expected: int) -> None:
    size = 128 << 10
    files = [InputFile(f"{number}.json", size, 1) for number in range(total_bytes // size)]
    assert len(list(make_units(files, "settings"))) == expected
