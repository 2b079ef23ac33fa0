"""Importers: what becomes a transcript, what is refused, and why."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from megatron_klong.trajectory.schema import Role, ToolCall, Transcript

CALL = {
    "id": "c1",
    "type": "function",
    "index": 0,
    "function": {"name": "bash", "arguments": '{"cmd": "ls"}'},
}
ROW: dict[str, Any] = {
    "instance_id": "repo-1",
    "messages": [
        {"role": "system", "content": "s", "tool_calls": None, "name": None},
        {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "a.py"},
        {"role": "assistant", "content": "done", "tool_calls": None},
    ],
    "tools": [{"type": "function", "function": {"name": "bash"}}],
}


def write(folder: Path, name: str, content: object) -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def only(file: Path) -> Transcript | Refusal:
    (item,) = read_transcripts(file)
    return item


def test_a_row_of_openai_messages_becomes_a_transcript(tmp_path: Path) -> None:
    made = only(write(tmp_path, "a.json", [ROW]))
    assert isinstance(made, Transcript)
    assert (made.id, made.task, made.turns) == ("repo-1#0", "repo-1", 2)
    assert [message.role for message in made.messages] == [
        Role.SYSTEM,
        Role.USER,
        Role.ASSISTANT,
        Role.TOOL,
        Role.ASSISTANT,
    ]
    assert made.messages[1].content == "tu"
    assert made.messages[2].reasoning == "hm"
    assert made.messages[2].tool_calls == (ToolCall(id="c1", name="bash", arguments={"cmd": "ls"}),)
    assert made.tools == tuple(ROW["tools"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("row.json", ROW),
        ("bare.json", ROW["messages"]),
        ("rows.jsonl", json.dumps(ROW) + "\n\n" + json.dumps(ROW["messages"]) + "\n"),
    ],
)
def test_rows_lists_and_lines_are_all_read(tmp_path: Path, name: str, content: object) -> None:
    items = list(read_transcripts(write(tmp_path, name, content)))
    assert items
    assert all(isinstance(item, Transcript) and item.turns == 2 for item in items)


def test_a_call_whose_arguments_are_no_object_is_context_only(tmp_path: Path) -> None:
    broken = {"function": {"name": "bash", "arguments": '{"cmd": "l'}}
    messages = [
        {"role": "user", "content": "t"},
        {"role": "assistant", "content": "", "tool_calls": [broken]},
    ]
    made = only(write(tmp_path, "a.json", messages))
    assert isinstance(made, Transcript)
    assert not made.messages[1].trained
    assert made.messages[1].tool_calls[0].arguments == {"arguments": '{"cmd": "l'}


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        ("", RefusalReason.EMPTY, "no byte"),
        ("[ ]", RefusalReason.EMPTY, "no row"),
        ('[{"messages": ', RefusalReason.TRUNCATED, "line 1, byte 14"),
        ([{"text": "a"}], RefusalReason.UNKNOWN_FORMAT, "keys text"),
        ([{"role": "user", "content": "t"}], RefusalReason.NO_TURN, "no assistant message"),
        ([{"role": "assistant", "content": 3}], RefusalReason.MALFORMED, r"messages\[0\].content"),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            RefusalReason.MALFORMED,
            r"tool_calls\[0\]: no function name",
        ),
        ({"format": "klong-episode", "version": 9}, RefusalReason.MALFORMED, "version"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(
    tmp_path: Path, content: object, reason: RefusalReason, detail: str
) -> None:
    item = only(write(tmp_path, "a.json", content))
    assert isinstance(item, Refusal)
    assert item.reason is reason
    assert re.search(detail, item.detail)
    assert "a.json" in item.source


def test_one_bad_row_does_not_spoil_the_others(tmp_path: Path) -> None:
    items = list(read_transcripts(write(tmp_path, "a.jsonl", json.dumps(ROW) + '\n{"x": 1}\n' + json.dumps(ROW))))
    assert [type(item) for item in items] == [Transcript, Refusal, Transcript]


def test_bytes_that_are_not_utf8_and_absent_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'{"messages": "\xff"}')
    item = only(file)
    assert isinstance(item, Refusal)
    assert item.reason is RefusalReason.NOT_UTF8
    missing = only(tmp_path / "gone.json")
    assert isinstance(missing, Refusal)
    assert missing.reason is RefusalReason.UNREADABLE


def test_folders_are_searched_in_a_stable_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.json", "b/a.jsonl", "readme.md"):
        (tmp_path / name).write_text("")
    assert [file.name for file in transcript_files(tmp_path)] == ["a.jsonl", "c.json"]


def test_the_real_openai_messages_are_all_read(shared_data: Path) -> None:
    (file,) = transcript_files(shared_data / "trajectories" / "openai_messages")
    made = list(read_transcripts(file))
    assert [len(item.messages) for item in made if isinstance(item, Transcript)] == [41, 23, 26, 37, 61]
    assert all(message.trained for item in made if isinstance(item, Transcript) for message in item.messages)
