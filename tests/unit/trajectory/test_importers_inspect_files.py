"""Inspect AI logs as files: old and new, whole, interrupted and damaged; and the real ones."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.trajectory.importers import inspect_logs
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from megatron_klong.trajectory.schema import Reading, Role, Transcript
from tests.unit.trajectory.test_importers_inspect import SECOND, TASK, Raw, model_event, sample, texts


def write_log(path: Path, entries: Mapping[str, Any]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content if isinstance(content, str) else json.dumps(content))
    return path


def items(path: Path) -> list[Transcript | Refusal]:
    assert inspect_logs.is_log(path, path.read_bytes()[:200])
    return list(inspect_logs.transcripts(path))


def refusal(path: Path) -> Refusal:
    (item,) = items(path)
    assert isinstance(item, Refusal)
    return item


ENTRY = "samples/a/b_epoch_1.json"
GOOD = sample([model_event([TASK], SECOND)], [TASK, SECOND])
START = {"version": 2, "eval": {"task": "t", "model": "m"}}


def test_an_interrupted_run_without_header_is_read(tmp_path: Path) -> None:
    (made,) = items(write_log(tmp_path / "a.eval", {"_journal/start.json": START, ENTRY: GOOD}))
    assert isinstance(made, Transcript)
    assert (made.task, made.turns) == ("t/s", 1)


def test_of_a_sample_written_twice_the_last_counts(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.eval", {"header.json": START, ENTRY: {}})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(ENTRY, json.dumps(GOOD))
    (made,) = items(path)
    assert isinstance(made, Transcript)


def test_one_damaged_sample_does_not_spoil_the_others(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.eval", {"header.json": START, "samples/1_epoch_1.json": "{", ENTRY: GOOD})
    first, second = items(path)
    assert isinstance(first, Refusal)
    assert (first.reason, first.source) == (RefusalReason.NOT_JSON, f"{path}#samples/1_epoch_1.json")
    assert isinstance(second, Transcript)


@pytest.mark.parametrize(
    ("entries", "reason", "detail"),
    [
        ({"header.json": START}, RefusalReason.EMPTY, "no sample"),
        ({ENTRY: sample([], [TASK])}, RefusalReason.NO_TURN, "no reply"),
        ({ENTRY: []}, RefusalReason.MALFORMED, "id: missing"),
        ({ENTRY: "[" * 100_000}, RefusalReason.NOT_JSON, "recursion"),
        ({"samples/1_epoch_1/sample.json": {}}, RefusalReason.UNKNOWN_FORMAT, "in chunks; convert the log"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(
    tmp_path: Path, entries: Raw, reason: RefusalReason, detail: str
) -> None:
    refused = refusal(write_log(tmp_path / "a.eval", entries))
    assert refused.reason is reason
    assert detail in refused.detail


def test_a_sample_over_the_limit_is_not_unpacked(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.eval", {ENTRY: GOOD})
    (refused,) = inspect_logs.transcripts(path, max_bytes=10)
    assert isinstance(refused, Refusal)
    assert refused.reason is RefusalReason.TOO_LARGE


def test_a_log_cut_in_the_middle_is_refused_with_the_cure(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.eval", {ENTRY: GOOD})
    path.write_bytes(path.read_bytes()[:-30])
    refused = refusal(path)
    assert refused.reason is RefusalReason.CORRUPT
    assert "inspect log recover" in refused.detail


def test_a_damaged_entry_is_refused(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a.eval", {ENTRY: GOOD})
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF
    path.write_bytes(data)
    assert refusal(path).reason is RefusalReason.CORRUPT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"version": 2, "status": "success", "eval": {}, "samples": []}', RefusalReason.EMPTY),
        ('{"version": 2, "status": "success", "eval": {}, "samples": null}', RefusalReason.EMPTY),
        ('{"version": 2, "status": "started", "eval": {}, "samples": [', RefusalReason.NOT_JSON),
        ('{"version": 2, "status": "started", "eval": {}', RefusalReason.NOT_JSON),
    ],
)
def test_json_logs_without_samples_are_refused(tmp_path: Path, text: str, reason: RefusalReason) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert refusal(path).reason is reason


@pytest.mark.parametrize("text", ["{}", "[]", '{"version": 2}', '{"schema_version": "ATIF-v1.2", "steps": []}', ""])
def test_other_json_is_no_log(tmp_path: Path, text: str) -> None:
    assert not inspect_logs.is_log(tmp_path / "a.json", text.encode())


@pytest.mark.parametrize("suffix", ["eval", "json"])
def test_a_log_that_inspect_wrote_is_read(tmp_path: Path, suffix: str) -> None:
    """With all that newer logs do to prompts: long texts elsewhere, equal messages in a pool, packed with zstd."""
    log = pytest.importorskip("inspect_ai.log")
    event = pytest.importorskip("inspect_ai.event")
    model = pytest.importorskip("inspect_ai.model")
    tool = pytest.importorskip("inspect_ai.tool")
    long = "long " * 100
    task = model.ChatMessageUser(content=long)
    run, events = [task], []
    for number in range(3):
        calls = [tool.ToolCall(id=f"c{number}", function="bash", arguments={"cmd": long + str(number)})]
        thought = model.ContentReasoning(reasoning=f"thought {number}")
        reply = model.ChatMessageAssistant(content=[thought, model.ContentText(text=long)], tool_calls=calls)
        events.append(
            event.ModelEvent(
                model="m",
                input=[task, *run[1:][-3:]],
                tools=[tool.ToolInfo(name="bash", description=long)],
                tool_choice="auto",
                config=model.GenerateConfig(),
                output=model.ModelOutput(model="m", choices=[model.ChatCompletionChoice(message=reply)]),
            )
        )
        done = model.ChatMessageTool(content="ok", tool_call_id=f"c{number}", metadata={"klong_reading": "part"})
        run += [reply, done, model.ChatMessageUser(content="go on")]
    path = tmp_path / f"a.{suffix}"
    spec = log.EvalSpec(created="2026-01-01T00:00:00+00:00", task="t", dataset=log.EvalDataset(), model="m", config={})
    written = log.EvalSample(id="a/b", epoch=1, input="x", target="", messages=run[-3:], events=events)
    log.write_eval_log(log.EvalLog(eval=spec, samples=[log.condense_sample(written)]), str(path))
    if suffix == "eval":
        with zipfile.ZipFile(path) as archive:
            assert {info.compress_type for info in archive.infolist()} == {93}
    else:
        (raw,) = json.loads(path.read_text())["samples"]
        assert next(e["input_refs"] for e in raw["events"]) == [[0, 1]]
        assert raw["events_data"]["messages"][0]["content"].startswith("attachment://")
    (made,) = items(path)
    assert isinstance(made, Transcript)
    assert texts(made) == [message.text for message in run]
    replies = [message for message in made.messages if message.role is Role.ASSISTANT]
    assert [reply.reasoning for reply in replies] == ["thought 0", "thought 1", "thought 2"]
    assert [reply.tool_calls[0].arguments["cmd"] for reply in replies] == [long + str(number) for number in range(3)]
    assert [m.reading for m in made.messages if m.role is Role.TOOL] == [Reading.PART] * 3
    assert made.tools[0]["function"]["description"] == long


# -- real logs


def real(path: Path) -> list[Transcript]:
    found = items(path)
    assert all(isinstance(item, Transcript) for item in found)
    return [item for item in found if isinstance(item, Transcript)]


def entry(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(name))


def test_the_real_paperbench_rollout(shared_data: Path) -> None:
    path = shared_data / "paperbench" / "runs" / "rice_gpt-4.1" / "rollout.eval"
    raw = entry(path, "samples/1_epoch_1.json")
    prompts = [event["input"] for event in raw["events"] if event["event"] == "model"]
    assert json.dumps(prompts).count("attachment://") == 3940  # the task itself is one of them
    (made,) = real(path)
    assert (made.turns, len(made.messages), len(made.tools), made.score) == (94, 208, 13, None)
    assert texts(made) == [message["content"] for message in raw["messages"]]  # nothing was trimmed in this run
    assert sum(message.role is Role.USER for message in made.messages) == 19
    assert all(message.trained for message in made.messages)
    calls = [found.id for message in made.messages for found in message.tool_calls]
    assert calls == [message.tool_call_id for message in made.messages if message.role is Role.TOOL]


def test_the_real_metr_runs(shared_data: Path) -> None:
    made = real(shared_data / "trajectories" / "inspect" / "metr_small.eval")
    assert [item.turns for item in made] == [13, 12, 12, 13, 14, 12]
    assert [len(item.messages) for item in made] == [39, 36, 36, 39, 42, 36]
    assert {item.score for item in made} == {1.0}
    assert {item.task for item in made} == {"oxdna_simple/default"}
    replies = [message for item in made for message in item.messages if message.role is Role.ASSISTANT]
    assert all(reply.reasoning and reply.trained for reply in replies)


def test_messages_lost_what_the_model_events_of_the_real_metr_runs_have(shared_data: Path) -> None:
    """The scaffold took the call out of the last message, and the reasoning with it."""
    path = shared_data / "trajectories" / "inspect" / "metr_small.eval"
    made = real(path)
    for number, item in enumerate(made, start=1):
        left = entry(path, f"samples/default_epoch_{number}.json")["messages"]
        assert len(left) == len(item.messages)
        assert not left[-1].get("tool_calls")
        assert [found.name for found in item.messages[-1].tool_calls] == ["submit"]
        assert item.messages[-1].reasoning
