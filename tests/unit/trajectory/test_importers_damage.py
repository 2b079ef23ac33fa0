"""Damage below the formats: bytes, tables and archives that are not what they say are refused, never followed."""

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from megatron_klong.trajectory.importers import inspect_logs, read_transcripts
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from megatron_klong.trajectory.importers.splitting import Fault, pieces
from megatron_klong.trajectory.schema import Transcript
from tests.unit.trajectory.test_importers_inspect_files import ENTRY, GOOD, START, items, refusal, write_log
from tests.unit.trajectory.test_importers_reading import (
    refusal_of,
    values_of,
    write_arrow,
    write_parquet,
    write_stream,
    written,
)
from tests.unit.trajectory.test_importers_registry import SESSIONS

# -- JSON


def split(data: bytes, *, chunk: int = 1 << 20, limit: int = 1 << 20) -> list[tuple[bytes, Fault | None]]:
    chunks = (data[start : start + chunk] for start in range(0, len(data), chunk))
    return [(piece.data, piece.fault) for piece in pieces(chunks, limit=limit, is_one_value=lambda element: False)]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_texts_and_numbers_among_the_elements_of_a_list_are_values(chunk: int) -> None:
    found = split(b'["a]", 12, {"b": "]"}, null ]', chunk=chunk)
    assert found == [(b'"a]"', None), (b"12", None), (b'{"b": "]"}', None), (b"null", None)]


def test_a_list_that_ends_within_a_number_is_cut_there() -> None:
    assert split(b'[{"a": 1}, 12') == [(b'{"a": 1}', None), (b"12", Fault.CUT)]
    assert split(b"[   ") == [(b"", Fault.CUT)]
    first, second = split(b"[" + b"1" * 50, chunk=4, limit=8)  # not held to its end
    assert (first, second[1]) == ((b"1" * 11, Fault.CUT), Fault.STRAY)


def test_a_value_over_several_lines_in_a_file_of_lines_is_one_value(tmp_path: Path) -> None:
    text = '{"messages":\n{"role": "user",\n"content": "t"}}\n'  # its second line begins like a value and is none
    assert values_of(written(tmp_path, text)) == [json.loads(text)]


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (gzip.compress(b"PAR1 and a table", mtime=0), RefusalReason.CORRUPT, "unpack it first"),
        (b"caf\xe9, and more behind it", RefusalReason.BINARY, "begins with 63 61 66 e9"),
        ("é".encode() * 50_000, RefusalReason.PLAIN_TEXT, "begins with 'é"),  # the head ends within no character
        (b"a" + "é".encode() * 50_000, RefusalReason.PLAIN_TEXT, "begins with 'aé"),  # and here within one
    ],
)
def test_what_is_no_json_says_why(tmp_path: Path, content: bytes, reason: RefusalReason, detail: str) -> None:
    found = refusal_of(written(tmp_path, content, "a.json"))
    assert (found.reason, detail in found.detail) == (reason, True), found


# -- sessions


def session_items(folder: Path, *lines: Any) -> list[Transcript | Refusal]:
    return list(read_transcripts(written(folder, "".join(json.dumps(line) + "\n" for line in lines), "s.jsonl")))


def test_a_session_with_a_field_that_cannot_be_read_is_refused_with_line_and_field(tmp_path: Path) -> None:
    header, asked = SESSIONS["pi"]
    robot = {**asked, "message": {"role": "robot", "content": "x"}}
    said = {**asked, "message": {"role": "assistant", "content": "a"}}
    (found,) = session_items(tmp_path, header, asked, robot, said)
    assert isinstance(found, Refusal)
    assert (found.reason, found.source) == (RefusalReason.MALFORMED, str(tmp_path / "s.jsonl"))
    assert found.detail.startswith("pi: line 3: message.role: 'robot'")


def test_lines_of_a_session_that_are_no_objects_are_passed_over(tmp_path: Path) -> None:
    asked, said = SESSIONS["claude_code"]
    (found,) = session_items(tmp_path, asked, ["log rotated"], said, 3)
    assert isinstance(found, Transcript)
    assert [message.content for message in found.messages] == ["t", "a"]


# -- tables


def test_text_of_a_table_that_is_not_utf8_ends_its_rows(tmp_path: Path) -> None:
    offsets = pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1]
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"ok\xe9\xe9")])
    write_parquet(pyarrow.table({"prompt": ["p", "p"], "completion": broken}), tmp_path / "a.parquet")
    first, second = read_transcripts(tmp_path / "a.parquet")
    assert isinstance(first, Transcript)
    assert isinstance(second, Refusal)
    assert (second.reason, second.source) == (RefusalReason.NOT_UTF8, f"{tmp_path / 'a.parquet'}#1")


@pytest.mark.parametrize("write", [write_arrow, write_stream])
def test_damaged_offsets_of_an_arrow_table_are_refused_not_followed(
    tmp_path: Path, write: Callable[[pyarrow.Table, Path], None]
) -> None:
    rows = [{"prompt": f"prompt {n}", "completion": "c" * n} for n in range(7)]
    write(pyarrow.Table.from_pylist(rows * 2), tmp_path / "a.arrow")  # two batches of seven rows
    data = bytearray((tmp_path / "a.arrow").read_bytes())
    offsets = pyarrow.array([8 * n for n in range(8)], pyarrow.int32()).buffers()[1].to_pybytes()[:32]
    place = data.rindex(offsets)  # of the prompts in the second batch
    data[place + 4 : place + 8] = (1 << 30).to_bytes(4, "little")
    *before, last = read_transcripts(written(tmp_path, bytes(data), "b.arrow"))
    assert [isinstance(item, Transcript) for item in before] == [True] * 7
    assert isinstance(last, Refusal)
    assert last.reason is RefusalReason.CORRUPT
    assert "the 7 rows before it are kept" in last.detail


# -- Inspect's logs


def test_a_sample_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.eval", "w") as archive:
        archive.writestr("header.json", json.dumps(START))
        archive.writestr(ENTRY, b'{"id": "\xe9"}')
    found = refusal(tmp_path / "a.eval")
    assert (found.reason, found.source) == (RefusalReason.NOT_UTF8, f"{tmp_path / 'a.eval'}#{ENTRY}")


@pytest.mark.parametrize(
    ("field", "value", "reason", "detail"),
    [
        (8, 1, RefusalReason.CORRUPT, "marked as encrypted"),  # flags
        (10, 99, RefusalReason.BINARY, "write the log again with Inspect"),  # method
        (6, 76, RefusalReason.CORRUPT, "zip file version 7.6; copy the log again"),  # version needed
    ],
)
def test_a_damaged_directory_of_a_log_is_refused(
    tmp_path: Path, field: int, value: int, reason: RefusalReason, detail: str
) -> None:
    path = write_log(tmp_path / "a.eval", {ENTRY: GOOD})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + field] = value
    path.write_bytes(data)
    (found,) = read_transcripts(path)
    assert isinstance(found, Refusal)
    assert (found.reason, detail in found.detail) == (reason, True), found


def test_a_header_without_names_does_not_hide_those_of_the_journal(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.eval", {"header.json": {"eval": None}, "_journal/start.json": START, ENTRY: GOOD})
    (made,) = items(path)
    assert isinstance(made, Transcript)
    assert made.task == "t/s"


def test_a_log_written_as_json_is_refused_where_it_is_damaged(tmp_path: Path) -> None:
    whole = json.dumps({"version": 2, "status": "success", "eval": START["eval"], "samples": [GOOD, GOOD]})
    (tmp_path / "a.json").write_text(whole)
    assert [type(item) for item in items(tmp_path / "a.json")] == [Transcript, Transcript]
    (tmp_path / "b.json").write_bytes(whole.encode().replace(b'"first"', b'"\xe9"').replace(b"second", b"\xe9"))
    assert refusal(tmp_path / "b.json").reason is RefusalReason.NOT_UTF8
    assert refusal_reasons(tmp_path / "c.json", whole[:-2]) == [None, None, RefusalReason.NOT_JSON]
    (tmp_path / "gone.eval").symlink_to(tmp_path)
    (found,) = inspect_logs.transcripts(tmp_path / "gone.eval")
    assert isinstance(found, Refusal)
    assert found.reason is RefusalReason.UNREADABLE


def refusal_reasons(path: Path, text: str) -> list[RefusalReason | None]:
    path.write_text(text)
    return [item.reason if isinstance(item, Refusal) else None for item in items(path)]
