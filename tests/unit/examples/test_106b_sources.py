"""The catalogue of data sets: a row in each one's columns goes through its command and is read with what is trained."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from examples.glm45_air_106b.columns import Change, changed_row, main
from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript
from tests.conftest import REPOSITORY

CATALOGUE = (REPOSITORY / "examples" / "glm45_air_106b" / "sources.md").read_text(encoding="utf-8")
PROGRAM = "-m examples.glm45_air_106b.columns"

CALL = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
TOOL = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}
CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
AGENT = [
    {"role": "user", "content": "List the files."},
    {"role": "assistant", "content": "Look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "a.py", "tool_call_id": "c1", "name": "bash"},
    {"role": "assistant", "content": "4"},
]
THOUGHT = "<think>\nAdd.\n</think>\n\n4"
ANSWER = Message(role=Role.ASSISTANT, content="4")
REASONED = Message(role=Role.ASSISTANT, content="4", reasoning="Add.")
LOOK = Message(
    role=Role.ASSISTANT, content="Look.", tool_calls=(ToolCall(id="c1", name="bash", arguments={"command": "ls"}),)
)
WEATHER = Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="weather", arguments={"city": "Bonn"}),))
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
SHAREGPT_CALLS = [
    {"from": "human", "value": "Weather in Bonn?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
    {"from": "observation", "value": "rain"},
    {"from": "gpt", "value": "4"},
]
WEATHER_TOOLS = json.dumps([{"name": "weather", "description": "d", "parameters": {"city": {"type": "str"}}}])

# folder below downloads/ -> a row in the columns that the data set's card has, the turns that are trained, its tools
SAMPLES: dict[str, tuple[dict[str, Any], list[Message], int]] = {
    "tulu3": ({"id": "a", "messages": CHAT, "source": "s"}, [ANSWER], 0),
    "openhermes": ({"conversations": SHAREGPT, "source": "s", "category": "c"}, [ANSWER], 0),
    "smoltalk": ({"messages": CHAT, "source": "s"}, [ANSWER], 0),
    "nemotron": (
        {"uuid": "u", "category": "chat", "reasoning": "on", "messages": [CHAT[0], {**CHAT[1], "content": THOUGHT}]},
        [REASONED],
        0,
    ),
    "openthoughts3": (
        {
            "difficulty": 3,
            "source": "s",
            "domain": "math",
            "conversations": [SHAREGPT[0], {"from": "gpt", "value": THOUGHT}],
        },
        [REASONED],
        0,
    ),
    "opencodereasoning": (
        {"id": "p", "input": "2+2?", "output": THOUGHT, "solution": "4", "split": "t"},
        [REASONED],
        0,
    ),
    "magicoder": ({"lang": "python", "index": 1, "seed": "s", "problem": "2+2?", "solution": "4"}, [ANSWER], 0),
    "opencoder": ({"seq_id": 1, "instruction": "2+2?", "output": "4", "code": "4"}, [ANSWER], 0),
    "numinamath": ({"source": "s", "problem": "2+2?", "solution": "4", "messages": CHAT}, [ANSWER], 0),
    "openmathinstruct2": (
        {"problem": "2+2?", "generated_solution": "4", "expected_answer": "4", "problem_source": "math"},
        [ANSWER],
        0,
    ),
    "toolmind": ({"id": "a", "conversations": AGENT, "tools": [TOOL]}, [LOOK, ANSWER], 1),
    "xlam": (
        {
            "id": 7,
            "query": "Weather in Bonn?",
            "answers": '[{"name": "weather", "arguments": {"city": "Bonn"}}]',
            "tools": WEATHER_TOOLS,
        },
        [WEATHER],
        1,
    ),
    "apigen-mt": ({"conversations": SHAREGPT_CALLS, "system": "policy", "tools": WEATHER_TOOLS}, [WEATHER, ANSWER], 1),
    "miroverse": ({"messages": CHAT, "split": "s"}, [ANSWER], 0),
    "swe-smith": (
        {"messages": json.dumps(AGENT), "instance_id": "o__r.1.x", "resolved": True, "model": "m", "patch": "p"},
        [LOOK, ANSWER],
        0,
    ),
    "swe-rebench": (
        {"instance_id": "o__r-1", "trajectory": AGENT, "tools": [TOOL], "exit_status": "submit", "resolved": 1},
        [LOOK, ANSWER],
        1,
    ),
    "swe-zero": ({"instance_id": "o__r-1", "trajectory": AGENT, "model_patch": "p", "dataset": "d"}, [LOOK, ANSWER], 0),
    "swe-gym": ({"messages": CHAT}, [ANSWER], 0),
    "mini-swe": ({"instance_id": "o__r-1", "messages": CHAT}, [ANSWER], 0),
    "openthoughts-agent": ({"conversations": CHAT, "agent": "terminus-2", "task": "t", "run_id": "r"}, [ANSWER], 0),
}


def commands() -> dict[str, list[str]]:
    """Folder below downloads/ -> the arguments of its `columns`, behind the input; [] where it is read as it is."""
    found = {name: list[str]() for name in re.findall(r"--local-dir downloads/(\S+)", CATALOGUE)}
    for line in CATALOGUE.replace("\\\n", " ").splitlines():
        if PROGRAM in line:
            folder, *arguments = shlex.split(line.split(PROGRAM)[1])
            found[Path(folder).name] = arguments
    return found


def prepared(tmp_path: Path, name: str, row: dict[str, Any]) -> tuple[int, Path]:
    """Exit status of the command of a data set that holds this row, and what preprocessing is then given."""
    folder = tmp_path / "downloads" / name
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "train-00000-of-00001.parquet")
    arguments = commands()[name]
    if not arguments:
        return 0, folder
    option, out, *rest = arguments
    return main([str(folder), option, str(tmp_path / out), *rest]), tmp_path / out


def trained(transcript: Transcript) -> list[Message]:
    return [
        message
        for message in transcript.messages
        if message.role is Role.ASSISTANT and message.trained and message.provenance is Provenance.MODEL
    ]


def test_every_command_of_the_catalogue_has_a_row_here() -> None:
    assert commands().keys() == SAMPLES.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_row_of_the_data_set_is_read_after_its_command(name: str, tmp_path: Path) -> None:
    row, turns, tools = SAMPLES[name]
    status, path = prepared(tmp_path, name, row)
    (transcript,) = (item for file in transcript_files(path) for item in read_transcripts(file))
    assert status == 0
    assert isinstance(transcript, Transcript), transcript.detail
    assert trained(transcript) == turns
    assert len(transcript.tools) == tools


@pytest.mark.parametrize(("name", "unsolved"), [("swe-smith", False), ("swe-rebench", 0)])
def test_what_was_not_solved_is_left_out(
    name: str, unsolved: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, path = prepared(tmp_path, name, {**SAMPLES[name][0], "resolved": unsolved})
    assert (status, path.exists()) == (2, False)
    assert "1 left out: resolved is not" in capsys.readouterr().err


def test_a_row_without_a_column_is_counted_and_the_rest_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": "2+2?", "a": "4", "id": 1}, {"q": "3+3?", "id": 2}, {"q": "", "a": "6"}, 7]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert main([str(tmp_path / "rows.jsonl"), "--out", str(out), "--turn", "q=human", "--turn", "a=gpt"]) == 0
    said = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"id": 1, "conversations": said}]
    printed = capsys.readouterr().out
    for line in (
        "1 written",
        "1 left out: nothing in a",
        "1 left out: nothing in q",
        "1 left out: not a row of columns",
    ):
        assert line in printed


def test_a_renamed_column_keeps_its_value_and_the_others_stay() -> None:
    row = {"trajectory": CHAT, "id": "a"}
    assert changed_row(row, Change(renamed=(("trajectory", "messages"),))) == {"id": "a", "messages": CHAT}


def test_nothing_to_write_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    out = tmp_path / "out.jsonl"
    out.write_text("old", encoding="utf-8")
    assert main([str(tmp_path / "rows.jsonl"), "--out", str(out), "--only", "a=2"]) == 2
    assert out.read_text(encoding="utf-8") == "old"
    assert "1 left out: a is not 2" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]
