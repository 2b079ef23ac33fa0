"""More than 700 turns on a real paper, far past the window: what a week of cluster time looks like, in seconds."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_klong.agent.worker import sampled_file
from megatron_klong.serve.turns import read_turns
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.replay import replay
from megatron_klong.trajectory.schema import Reading
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.integration.agent.playing import last_number, play, policy, settings
from tests.unit.serve.scripted import call, serving

WORK_TURNS = 700
SECRET = "d41c-a-secret-of-the-host-8f2a"


def real_task(shared_data: Path, folder: Path) -> Path:
    """A task of PaperBench whose paper is at hand, in its layout."""
    source, task = shared_data / "paperbench" / "papers" / "rice", folder / "rice"
    task.mkdir()
    for name in ("addendum.md", "blacklist.txt", "config.yaml", "rubric.json"):
        shutil.copy(source / name, task / name)
    shutil.copy(source / "paper.mineru.md", task / "paper.md")
    return task


def reply(tail: str) -> str:
    """Read the paper to its end, then work, then submit, by what the newest result says."""
    newest = tail.rpartition("<|observation|>")[2] if "<|observation|>" in tail else ""
    shown, done = last_number(r"Showing lines \d+ to (\d+)\.", newest), last_number(r"step (\d+) done", newest)
    if not done and "[paper read]" not in newest:
        return "\n<think>on</think>" + call("read_file_chunk", file="/home/paper/paper.md", start_line=str(shown + 1))
    if done >= WORK_TURNS:
        return call("submit", end_message="done")
    command = f"echo $(({done} * {done})) >> results.txt; env | md5sum; seq {done} $(({done} + 20)) | tr '\\n' ' '"
    if done == WORK_TURNS - 1:
        command = "env; cat /proc/*/cmdline /proc/*/environ; cat /etc/hostname /etc/passwd; echo true > reproduce.sh"
    return f"\n<think>step {done + 1}</think>" + call("bash", cmd=f"{command}; echo step {done + 1} done")


@pytest.mark.long
def test_seven_hundred_turns_on_a_real_paper(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLONG_TEST_SECRET", SECRET)
    task = real_task(shared_data, tmp_path)
    folder = tmp_path / "tokenizer"
    text = (task / "paper.md").read_text()
    train_tokenizer([text, "step done seq echo results.txt " * 50], vocabulary_size=3000, folder=folder)
    loaded = load_tokenizer(folder)
    paper_tokens = len(loaded.encode(text))
    window = paper_tokens + 16_000
    config = settings(
        *("--timeout", "30m", "--hard_timeout", "40m", "--turn_limit", "2000", "--output_characters", "40000"),
        *("--context.max_tokens", str(window), "--context.reserve_tokens", "1000", "--context.keep_tokens", "4000"),
        *("--context.prefix_cap_tokens", str(paper_tokens + 10_000), "--remind_every_turns", "50"),
    )
    engine = policy(loaded, reply)
    with serving(engine, tokenizer=loaded, max_sequence_length=window) as url:
        record = play(tmp_path, folder, task, url, config, model="klong/policy")
    assert record.error is None
    assert record.ending == "finished"
    assert record.score is None  # this task has a rubric for a judge, and no programs
    assert len(record.turns) > WORK_TURNS + 10
    assert record.windows >= 6
    result = replay(record, GlmRenderer(loaded))
    assert result.agrees
    assert result.turns == len(record.turns)
    asked = {turn.prompt_sha256 for turn in record.turns}
    sampled = read_turns(sampled_file(next((tmp_path / "records").glob("*.episode.json"))))
    assert {turn.prompt_sha256 for turn in sampled} == asked  # what the engine was really given
    assert len(sampled) == len(engine.asked) == len(record.turns)
    assert max(turn.prompt_tokens for turn in sampled) <= window - 1000 + 1
    assert sum(message.reading is Reading.COMPLETE for message in record.messages) == 1
    assert all(turn.ids and len(turn.ids) == len(turn.log_probs) for turn in sampled)
    # nothing of the host
    whole = "\n".join(message.content for message in record.messages)
    assert "step 700 done" in whole
    host = [SECRET, os.uname().nodename, str(tmp_path), "KLONG_TEST_SECRET"]
    assert [name for name in host if name in whole] == []
