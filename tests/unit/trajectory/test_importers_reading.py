"""Reading: a file's values whatever its shape, packing and size; damage costs what is damaged and nothing else."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.importers.reading import Value, read_values
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from megatron_klong.trajectory.importers.splitting import pieces
from megatron_klong.trajectory.schema import Transcript

ROWS = [{"messages": [{"role": "user", "content": f"t{n}"}, {"role": "assistant", "content": "a"}]} for n in range(3)]
LINES = [json.dumps(row) for row in ROWS]


def values_of(file: Path, **options: int) -> list[Any]:
    """What a file holds; a refusal as its reason."""
    items = read_values(file, is_one_value=lambda value: "role" in value, **options)
    return [item.content if isinstance(item, Value) else item.reason for item in items]


def refusal_of(file: Path) -> Refusal:
    (item,) = read_transcripts(file)
    assert isinstance(item, Refusal)
    return item


def written(folder: Path, content: str | bytes, name: str = "a.jsonl") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


tricky_text = st.text(alphabet='"\\{}[],: \nä\u2028a', max_size=6)
json_values = st.none() | st.integers(0, 99) | tricky_text | st.lists(tricky_text | st.just({}), max_size=2)
layouts: dict[str, Callable[[list[Any]], str]] = {
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "lines, no last end, blank ones": lambda rows: "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "list on one line": json.dumps,
    "list over many lines": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False),
    "list, a row a line": lambda rows: "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n",
    "objects over many lines": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "values on one line": lambda rows: " ".join(json.dumps(row) for row in rows),
}


@settings(max_examples=150)
@given(
    layout=st.sampled_from(sorted(layouts)),
    rows=st.lists(st.dictionaries(tricky_text, json_values, min_size=1, max_size=2), min_size=1, max_size=3),
    chunk=st.integers(min_value=1, max_value=64),
    lines_expected=st.booleans(),
)
def test_values_come_whole_from_any_layout_in_any_chunks(
    layout: str, rows: list[Any], chunk: int, lines_expected: bool
) -> None:
    data = layouts[layout](rows).encode()
    chunks = (data[start : start + chunk] for start in range(0, len(data), chunk))
    split = list(pieces(chunks, limit=1 << 20, is_one_value=lambda element: False, lines_expected=lines_expected))
    found: list[Any] = []
    for piece in split:
        assert piece.fault is None
        value = json.loads(piece.data)
        found += value if isinstance(value, list) else [value]
        assert data[piece.offset : piece.offset + len(piece.data)] == piece.data
        assert piece.line == 1 + data[: piece.offset].count(b"\n")
    assert found == rows


@settings(max_examples=100)
@given(junk=st.binary(max_size=200), chunk=st.integers(min_value=1, max_value=16), limit=st.integers(1, 50))
def test_no_input_hangs_the_splitter_or_makes_it_hold_more_than_its_limit(junk: bytes, chunk: int, limit: int) -> None:
    data = b'[{"a": "' + junk
    for content in (junk, data, data.replace(b'"', b"")):
        chunks = (content[start : start + chunk] for start in range(0, len(content), chunk))
        for piece in pieces(chunks, limit=limit, is_one_value=lambda element: len(element) % 2 == 0):
            assert len(piece.data) <= limit + chunk


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.traj", "a.data"])
@pytest.mark.parametrize("layout", layouts)
def test_the_content_says_what_a_file_is_not_its_name(tmp_path: Path, layout: str, name: str) -> None:
    assert values_of(written(tmp_path, layouts[layout](ROWS), name)) == ROWS


def test_a_bare_list_of_messages_is_one_value_also_as_a_line(tmp_path: Path) -> None:
    bare = [row["messages"] for row in ROWS]
    assert values_of(written(tmp_path, json.dumps(bare[0], indent=1))) == [bare[0]]
    assert values_of(written(tmp_path, "\n".join(map(json.dumps, bare)))) == bare


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    assert values_of(written(tmp_path, b"\xef\xbb\xbf" + LINES[0].encode())) == ROWS[:1]


def packed_gzip(data: bytes) -> bytes:
    return gzip.compress(data)


def packed_zstd(data: bytes) -> bytes:
    """With a checksum, as the zstd program writes: without one, not every change can be seen."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize("pack", [packed_gzip, packed_zstd])
def test_packed_files_are_unpacked_whatever_their_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    data = "\n".join(LINES).encode()
    assert values_of(written(tmp_path, pack(data), "a.json")) == ROWS
    two_members = pack(data + b"\n") + pack(data)
    assert values_of(written(tmp_path, two_members, "a.jsonl.gz")) == ROWS * 2


@pytest.mark.parametrize("pack", [packed_gzip, packed_zstd])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_packed_file_gives_what_is_before_the_damage(
    tmp_path: Path, pack: Callable[[bytes], bytes], damage: str
) -> None:
    noise = [{"messages": ROWS[0]["messages"], "noise": os.urandom(600_000).hex()} for _ in range(6)]
    data = pack("\n".join(map(json.dumps, noise)).encode())
    half = len(data) // 2
    broken = data[:half] if damage == "cut" else data[:half] + b"\x00" * 2000 + data[half + 2000 :]
    *rows, last = read_transcripts(written(tmp_path, broken, "a.jsonl.gz"))
    assert isinstance(last, Refusal)
    assert last.reason is RefusalReason.CORRUPT
    assert "damaged" in last.detail
    if damage == "cut":
        assert 1 <= len(rows) < 6
        assert all(isinstance(row, Transcript) for row in rows)
    else:  # what is changed comes out as something, whatever that is, until the checksum tells
        assert [type(row) for row in rows[:2]] == [Transcript, Transcript]


def test_a_cut_list_keeps_the_rows_before_the_cut(tmp_path: Path) -> None:
    text = json.dumps(ROWS)
    for name in ("a.json", "a.jsonl"):
        found = values_of(written(tmp_path, text[: text.index("t2") + 1], name))
        assert found == [*ROWS[:2], RefusalReason.TRUNCATED]
        assert values_of(written(tmp_path, text[:-1], name)) == [*ROWS, RefusalReason.TRUNCATED]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b'{"messages": [{"role": "user", ', RefusalReason.TRUNCATED),
        (b'{"messages": "no end', RefusalReason.TRUNCATED),
        (b'{"messages": nothing}', RefusalReason.NOT_JSON),
        (b'{"messages": 1]', RefusalReason.NOT_JSON),
        (b"{'messages': 1}", RefusalReason.NOT_JSON),
        (b'{"a": "\xc3\x28"}', RefusalReason.NOT_UTF8),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", RefusalReason.NOT_JSON),
        (b'{"a": ' + b"9" * 10_000 + b"}", RefusalReason.NOT_JSON),
    ],
)
def test_a_broken_line_spoils_nothing_but_itself(
    tmp_path: Path, broken: bytes, reason: RefusalReason, position: int
) -> None:
    lines = [line.encode() for line in LINES[:2]]
    lines.insert(position, broken)
    expected: list[Any] = list(ROWS[:2])
    expected.insert(position, reason)
    assert values_of(written(tmp_path, b"\n".join(lines))) == expected


def test_a_broken_element_spoils_nothing_but_itself(tmp_path: Path) -> None:
    text = f'[{LINES[0]}, {{"a": nothing}}, word, {LINES[1]}, {{"a" 1}}, {LINES[2]}]'
    bad = RefusalReason.NOT_JSON
    assert values_of(written(tmp_path, text)) == [ROWS[0], bad, bad, ROWS[1], bad, ROWS[2]]
    assert values_of(written(tmp_path, f"[{LINES[0]} {LINES[1]}, {LINES[2]}]")) == [ROWS[0], bad]


def test_the_place_of_damage_is_named(tmp_path: Path) -> None:
    data = LINES[0].encode() + b'\n\n{"a": "\xe4\xf6"}\n'
    _, refusal = read_transcripts(written(tmp_path, data))
    assert isinstance(refusal, Refusal)
    assert refusal.source.endswith("a.jsonl#1")
    assert refusal.detail == f"line 3, byte {data.index(0xE4)}: the byte 0xe4 is not UTF-8 (invalid continuation byte)"
    pretty = json.dumps(ROWS, indent=1, ensure_ascii=False).replace("t1", "ä\x01")
    refusals = [item for item in read_transcripts(written(tmp_path, pretty)) if isinstance(item, Refusal)]
    assert [refusal.source[-1] for refusal in refusals] == ["1"]
    assert f"byte {pretty.encode().index(1)}: Invalid control character" in refusals[0].detail


def test_half_characters_are_replaced(tmp_path: Path) -> None:
    row = (
        '{"messages": [{"role": "user", "content": "cut \\ud83d"}, {"role": "assistant", "content": "\\ud83d\\ude00"}]}'
    )
    (made,) = read_transcripts(written(tmp_path, row))
    assert isinstance(made, Transcript)
    assert [message.content for message in made.messages] == ["cut \ufffd", "\U0001f600"]


@pytest.mark.parametrize(
    "make",
    [
        lambda long: f"{LINES[0]}\n{long}\n{LINES[1]}\n",
        lambda long: f"{long}\n{LINES[0]}\n{LINES[1]}\n",
        lambda long: f"[{LINES[0]},{long},{LINES[1]}]",
        lambda long: f"[{long},\n{LINES[0]},{LINES[1]}]",
    ],
)
def test_what_is_over_the_limit_is_passed_over(tmp_path: Path, make: Callable[[str], str]) -> None:
    long = json.dumps({"messages": [{"role": "user", "content": 'x\\"' * 1000}]})
    found = values_of(written(tmp_path, make(long)), max_bytes=500)
    assert sorted(found, key=str) == sorted([*ROWS[:2], RefusalReason.TOO_LARGE], key=str)


class _Long:
    """A line of many gigabytes as chunks, without having it."""

    def __init__(self, chunks: int) -> None:
        self.left = chunks
        self.chunk = b'x\\n"' * (1 << 18)

    def __iter__(self) -> Iterator[bytes]:
        yield b'{"messages": "'
        for _ in range(self.left):
            yield self.chunk.replace(b'"', b"")
        yield b'"}\n' + LINES[0].encode()


def test_memory_does_not_grow_with_a_long_line() -> None:
    tracemalloc.start()
    first, second = pieces(iter(_Long(60)), limit=4 << 20, is_one_value=lambda element: False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first.data, second.data) == (b"", LINES[0].encode())
    assert second.offset > 40 << 20
    assert peak < 20 << 20


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    row = json.dumps({"messages": [*ROWS[0]["messages"], {"role": "user", "content": "x" * 500_000}]})
    for text in (f"{row}\n" * 60, "[" + ",".join([row] * 60) + "]"):
        file = written(tmp_path, text)
        tracemalloc.start()
        count = sum(isinstance(item, Transcript) for item in read_transcripts(file))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 60
        assert peak < 12 << 20  # of 30 MB


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"", RefusalReason.EMPTY, "no byte"),
        (b" \n\n", RefusalReason.EMPTY, "white space"),
        (gzip.compress(b"", mtime=0), RefusalReason.EMPTY, "unpacked"),
        (b"[]", RefusalReason.EMPTY, "no row"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            RefusalReason.LFS_POINTER,
            "git lfs pull",
        ),
        (b"\xff\xfe{\x00}\x00", RefusalReason.NOT_UTF8, "UTF-16"),
        (b"PK\x03\x04rest", RefusalReason.BINARY, "zip"),
        (b"\x7fELF\x02\x01\x00", RefusalReason.BINARY, "7f 45 4c 46"),
        (b"hello\nworld\n", RefusalReason.PLAIN_TEXT, "begins with 'hello"),
        (b"# aider chat started at 2024-01-01\n[1]\n", RefusalReason.PLAIN_TEXT, "aider chat log"),
        (b'"text"', RefusalReason.PLAIN_TEXT, "begins with"),
        (b'{"tid": 1}', RefusalReason.UNKNOWN_FORMAT, "with the keys tid"),
        (b"[[1]]", RefusalReason.UNKNOWN_FORMAT, "list"),
        (gzip.compress(b"x" * 99, mtime=0)[:20], RefusalReason.CORRUPT, "damaged"),
        (b"PAR1 and nothing else", RefusalReason.CORRUPT, "damaged table"),
        (b"ARROW1\x00\x00nothing", RefusalReason.CORRUPT, "damaged table"),
    ],
)
def test_a_file_that_holds_no_transcript_says_why(
    tmp_path: Path, content: bytes, reason: RefusalReason, detail: str
) -> None:
    refusal = refusal_of(written(tmp_path, content, "a.json"))
    assert (refusal.reason, detail in refusal.detail) == (reason, True), refusal
    assert "a.json" in refusal.source


def test_a_first_line_that_is_no_json_spoils_only_itself(tmp_path: Path) -> None:
    data = "INFO started\n" + "\n".join(LINES)
    assert values_of(written(tmp_path, data)) == [RefusalReason.NOT_JSON, *ROWS]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal_of(tmp_path).reason is RefusalReason.NOT_A_FILE
    os.mkfifo(tmp_path / "pipe.json")
    assert refusal_of(tmp_path / "pipe.json").reason is RefusalReason.NOT_A_FILE
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    assert refusal_of(tmp_path / "gone.json").reason is RefusalReason.UNREADABLE


CALLS = [
    {"function": {"name": "read", "arguments": {"path": "a"}}, "id": "1"},
    {"function": {"name": "run", "arguments": {"command": "ls"}}, "id": "2"},
]
TABLE_ROWS = [
    {"id": f"r{n}", "messages": [{"role": "user", "content": "t"}, {"role": "assistant", "tool_calls": [call]}]}
    for n, call in enumerate(CALLS * 20)
]


def write_parquet(table: pyarrow.Table, file: Path) -> None:
    parquet.write_table(table, file, row_group_size=7)


def write_arrow(table: pyarrow.Table, file: Path) -> None:
    with pyarrow.ipc.new_file(file, table.schema) as sink:
        sink.write_table(table, max_chunksize=7)


def write_stream(table: pyarrow.Table, file: Path) -> None:
    with pyarrow.ipc.new_stream(file, table.schema) as sink:
        sink.write_table(table, max_chunksize=7)


def write_feather(table: pyarrow.Table, file: Path) -> None:
    feather.write_feather(table, str(file))


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_stream, write_feather])
def test_tables_are_read_row_by_row(tmp_path: Path, write: Callable[[pyarrow.Table, Path], None]) -> None:
    file = tmp_path / "a.table"
    write(pyarrow.Table.from_pylist(TABLE_ROWS), file)
    made = [item for item in read_transcripts(file) if isinstance(item, Transcript)]
    assert [transcript.task for transcript in made] == [row["id"] for row in TABLE_ROWS]
    # A column of structures gives every call the parameters of all: what was absent must stay absent.
    assert [dict(made[n].messages[1].tool_calls[0].arguments) for n in (0, 1)] == [{"path": "a"}, {"command": "ls"}]
    long = [item for item in read_transcripts(file, max_bytes=10) if isinstance(item, Refusal)]
    assert [refusal.reason for refusal in long] == [RefusalReason.TOO_LARGE] * 40


def test_columns_of_json_text_are_read(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "read"}}]
    rows = [{**row, "messages": json.dumps(row["messages"]), "tools": json.dumps(tools)} for row in TABLE_ROWS[:2]]
    write_parquet(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    made = list(read_transcripts(tmp_path / "a.parquet"))
    assert [item.tools for item in made if isinstance(item, Transcript)] == [tuple(tools)] * 2


def test_a_table_damaged_in_the_middle_keeps_the_rows_before_it(tmp_path: Path) -> None:
    rows = [{"messages": json.dumps(ROWS[0]["messages"]), "noise": os.urandom(20_000).hex()} for _ in range(40)]
    with parquet.ParquetWriter(tmp_path / "a.parquet", pyarrow.Table.from_pylist(rows).schema) as writer:
        for start in range(0, 40, 10):
            writer.write_table(pyarrow.Table.from_pylist(rows[start : start + 10]))
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200_000] = b"\xff" * 200_000
    *before, last = read_transcripts(written(tmp_path, bytes(data), "b.parquet"))
    assert isinstance(last, Refusal)
    assert last.reason in (RefusalReason.CORRUPT, RefusalReason.NOT_UTF8)
    assert 10 <= len(before) < 40
    assert all(isinstance(item, Transcript) for item in before)


def test_files_are_found_by_suffix_in_a_stable_order_without_hidden_ones(tmp_path: Path) -> None:
    names = [
        "b/a.jsonl.gz", "c.json", "c.traj", "d.JSON", "e.ndjson.zst", "f.parquet", "g.eval", "h.arrow",
        ".hidden.json", ".git/x.json", "readme.md", "a.txt", "weights.bin.gz",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [str(file.relative_to(tmp_path)) for file in transcript_files(tmp_path)] == names[:8]
    assert transcript_files(tmp_path / "a.txt") == [tmp_path / "a.txt"]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "in"
    for made in (outside, folder / "sub"):
        made.mkdir(parents=True)
    (outside / "o.json").write_text("")
    (folder / "sub" / "a.json").write_text("")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "again.json").symlink_to(folder / "sub" / "a.json")
    (folder / "elsewhere").symlink_to(outside)
    (folder / "nothing.json").symlink_to(tmp_path / "nowhere")
    found = [str(file.relative_to(folder)) for file in transcript_files(folder)]
    assert found == ["again.json", "elsewhere/o.json", "nothing.json"]
