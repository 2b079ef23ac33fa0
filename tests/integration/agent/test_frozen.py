"""Frozen in one process, gone on with in another: same messages, same files, same ids, the time that was left."""

import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.model import get_model

from megatron_klong.agent.collect import collect
from megatron_klong.agent.frozen import (
    REQUEST,
    FrozenEpisode,
    FrozenError,
    newest_frozen,
    read_frozen,
    request_freeze,
)
from megatron_klong.agent.records import export_records
from megatron_klong.agent.task import paper_replication
from megatron_klong.agent.worker import FinishedEpisode, Job, Played, sampled_file
from megatron_klong.serve.turns import read_turns
from megatron_klong.trajectory.episode import EpisodeRecord, read_episode
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.replay import replay
from megatron_klong.trajectory.schema import Role
from megatron_klong.trajectory.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY
from tests.integration.agent.playing import job, last_number, play_script, policy, results, settings
from tests.integration.scripted_endpoint import Reply, call, endpoint
from tests.unit.serve.scripted import call as written_call
from tests.unit.serve.scripted import serving

TURNS = 10
OVERRIDES: dict[str, Any] = {
    "freeze_every_turns": 1,
    "reading": "off",
    "tools": '["bash", "submit"]',
    "context.max_tokens": 2048,
    "context.reserve_tokens": 256,
    "context.keep_tokens": 300,
    "context.prefix_cap_tokens": 1400,
}
LEFT = re.compile(r"\[time left: (?:(\d+)m )?(\d+)s\]")


def step(number: int) -> str:
    """Leaves a line, a file that is removed by the next step, and a random one that stays."""
    remove = f"rm /tmp/only-{number - 1}; " if number > 1 else ""
    keep = f"head -c 500 /dev/urandom > random-{number}; touch /tmp/only-{number}; sleep 0.$((RANDOM % 5))"
    return f"{remove}echo {number} >> log.txt; {keep}; echo step {number} done"


LAST = "cat log.txt | tr '\\n' ' '; ls /tmp/only-*; ls random-* | wc -l; cat random-* | sha256sum; echo step 99 done"


def script(number: int, messages: list[dict[str, Any]]) -> Reply:
    """Goes on from what the newest result says, in whatever process."""
    done = last_number(r"step (\d+) done", str(messages[-1]["content"]))
    return call("bash", cmd=step(done + 1) if done < TURNS - 1 else LAST)


def configured(*flags: str, turns: int = TURNS) -> Any:
    every = ("--freeze_every_turns", "1", "--remind_every_turns", "1")
    times = ("--timeout", "10m", "--hard_timeout", "12m")
    return settings("--turn_limit", str(turns), "--reading", "off", *every, *times, *flags)


def many(folder: Path, tokenizer: Path, task: Path, url: str, count: int) -> Job:
    episodes = [Played(task_folder=str(task), rollout=number) for number in range(1, count + 1)]
    made = job(folder, tokenizer, task, url, configured())
    return made.model_copy(
        update={"episodes": episodes, "freeze_folder": str(folder / "frozen"), "max_episodes": count}
    )


def go_on(made: Job, folder: Path, frozen: Sequence[Path | None], name: str = "second") -> list[FinishedEpisode]:
    """Play the job's episodes from their states, in a process of their own."""
    episodes = [
        played.model_copy(update={"frozen": None if path is None else str(path)})
        for played, path in zip(made.episodes, frozen, strict=True)
    ]
    again = made.model_copy(update={"name": name, "episodes": episodes})
    return collect([again], workers=1, output_folder=folder / name)


def seconds_left(text: str) -> int:
    minutes, seconds = LEFT.findall(text)[-1]
    return int(minutes or 0) * 60 + int(seconds)


def newest(made: Job) -> list[Path | None]:
    assert made.freeze_folder is not None
    return [newest_frozen(Path(made.freeze_folder) / f"t10.{played.rollout}") for played in made.episodes]


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_each_episode_goes_on_where_it_was(
    tmp_path: Path, tasks: Path, tokenizer: Path, count: int
) -> None:
    chance = random.Random(count)
    renderer = GlmRenderer(load_tokenizer(tokenizer))
    with endpoint(script) as served:
        made = many(tmp_path, tokenizer, tasks / "t10", served.url, count)
        worker = subprocess.Popen(
            [sys.executable, "-m", "megatron_klong.agent.worker"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert worker.stdin is not None
        worker.stdin.write(made.model_dump_json().encode())
        worker.stdin.close()
        deadline = time.monotonic() + 240
        while (
            len(frozen := [path for path in newest(made) if path]) < count // 2
            or max(path.name for path in frozen) < "turn-000003"
        ):
            assert worker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(chance.random() * 3)
        worker.kill()
        worker.wait()
        states = [None if path is None else read_frozen(path) for path in newest(made)]
        assert len({0 if state is None else state.turns for state in states}) >= 2  # cut at different turns
        finished = go_on(made, tmp_path, newest(made))
    records = {read_episode(Path(one.record)).epoch: read_episode(Path(one.record)) for one in finished}
    for played, state in zip(made.episodes, states, strict=True):
        check_gone_on(records[played.rollout], state, renderer)


def check_gone_on(record: EpisodeRecord, state: FrozenEpisode | None, renderer: GlmRenderer) -> None:
    assert (record.ending, len(record.turns)) == ("turn_limit", TURNS)
    assert replay(record, renderer).agrees
    said = results(record)
    assert said[-1].startswith(" ".join(map(str, range(1, TURNS))) + f" /tmp/only-{TURNS - 1}\n{TURNS - 1}\n")
    if state is None:
        return
    before = [message["content"] for message in state.messages if message["role"] == "tool"]
    assert len(before) == state.turns
    assert said[: len(before)] == before
    # time: what was left in the last result before, less what was used since
    counted = state.total_seconds - state.given_back_seconds
    assert abs(600 - counted - seconds_left(before[-1])) < 2
    turn = record.turns[state.turns]
    spent = turn.model_seconds + turn.tool_seconds
    lost = seconds_left(before[-1]) - seconds_left(said[state.turns])
    assert spent - 1.5 <= lost <= spent + 2.5


def test_asked_to_freeze_it_ends_its_jobs_and_tells_the_agent_later(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    made: Job

    def script(number: int, messages: list[dict[str, Any]]) -> Reply:
        if number == 0:
            return call("background", cmd="while sleep 0.1; do date >> ticks.txt; done")
        if number == 2:
            request_freeze(Path(made.freeze_folder or ""))
        if number == 5:
            return call("background", cmd="cat /tmp/jobs/1.txt")
        return call("bash", cmd=f"sleep 0.3; wc -l < ticks.txt; echo {number}")

    tools = ("--tools", '["bash", "background", "submit"]', "--freeze_every_turns", "0")
    with endpoint(script) as served:
        config = configured(*tools, turns=6)
        made = job(tmp_path, tokenizer, tasks / "t10", served.url, config)
        made = made.model_copy(update={"freeze_folder": str(tmp_path / "frozen")})
        (suspended,) = collect([made], workers=1, output_folder=tmp_path / "first")
        record = read_episode(Path(suspended.record))
        assert (record.ending, record.score, len(record.turns)) == ("suspended", None, 3)
        (state,) = newest(made)
        assert state is not None
        assert read_frozen(state).ended_jobs == ["while sleep 0.1; do date >> ticks.txt; done"]
        before = {file: file.read_bytes() for file in state.parent.iterdir()}
        (suspended,) = go_on(made, tmp_path, [state], name="still")
        assert (suspended.ending, suspended.turns) == ("suspended", 3)
        assert {file: file.read_bytes() for file in state.parent.iterdir()} == before
        (Path(made.freeze_folder or "") / REQUEST).unlink()
        (finished,) = go_on(made, tmp_path, [state])
    record = read_episode(Path(finished.record))
    assert (record.ending, record.score, len(record.turns)) == ("turn_limit", 0.0, 6)
    told = results(record)[3]
    assert "these background commands were ended: 'while sleep 0.1; do date >> ticks.txt; done']" in told
    assert results(record)[5].startswith("Job 2 runs; what it prints goes to /tmp/jobs/2.txt.")
    ticks = [int(text.split()[0]) for text in results(record)[1:5]]
    assert ticks[0] < ticks[1]
    assert ticks[2] == ticks[3]  # ended
    assert "ended" not in results(record)[4]


def test_a_workspace_too_large_to_freeze_ends_an_episode_only_if_it_was_to_end(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    def grow(number: int, messages: list[dict[str, Any]]) -> Reply:
        if number == 3:
            request_freeze(tmp_path / "frozen")
        return call("bash", cmd="head -c 3000000 /dev/urandom > large; echo true > reproduce.sh")

    config = configured("--workspace_bytes", "2000000", turns=6)
    record = play_script(tmp_path, tokenizer, tasks / "t10", grow, config, freeze_folder=str(tmp_path / "frozen"))
    assert (record.ending, len(record.turns), record.score) == ("sandbox_failed", 4, 0.0)
    assert "could not be frozen: /home is larger than 2,000,000 bytes" in (record.error or "")


def test_an_episode_that_has_ended_is_played_anew_and_another_is_gone_on_with(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    asked: list[int] = []

    def play(name: str, *, stop: bool, turns: int) -> EpisodeRecord:
        def once(number: int, messages: list[dict[str, Any]]) -> Reply:
            asked.append(sum(message["role"] == "assistant" for message in messages))
            if stop and number == 1:
                request_freeze(tmp_path / "frozen")
            return script(number, messages)

        with endpoint(once) as served:
            tasked = paper_replication(
                *(str(tasks / "t10"), str(tokenizer)),
                freeze_folder=str(tmp_path / "frozen"),
                **{**OVERRIDES, "turn_limit": turns},
            )
            model = get_model("openai-api/teacher/scripted", base_url=served.url, api_key="unused", memoize=False)
            inspect_eval(tasked, model=model, log_dir=str(tmp_path / name), log_format="eval", display="none")
        (tmp_path / "frozen" / REQUEST).unlink(missing_ok=True)
        (log,) = (tmp_path / name).glob("*.eval")
        return read_episode(export_records(log, tmp_path / name)[0])

    assert play("first", stop=True, turns=4).ending == "suspended"
    assert play("second", stop=False, turns=4).ending == "turn_limit"
    assert asked == [0, 1, 2, 3]
    assert play("third", stop=False, turns=2).ending == "turn_limit"
    assert asked == [0, 1, 2, 3, 0, 1]


def test_ids_and_log_probabilities_go_along_and_other_weights_go_on(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    loaded = load_tokenizer(tokenizer)

    def reply(tail: str) -> str:
        return written_call("bash", cmd=step(last_number(r"step (\d+) done", tail) + 1))

    first, second = policy(loaded, reply), policy(loaded, reply)
    second.policy_epoch = 7
    with serving(first, tokenizer=loaded, max_sequence_length=4096) as url:
        config = configured(turns=3)
        made = job(tmp_path, tokenizer, tasks / "t10", url, config, model="klong/policy")
        made = made.model_copy(update={"freeze_folder": str(tmp_path / "frozen")})
        collect([made], workers=1, output_folder=tmp_path / "first")
    (state,) = newest(made)
    assert state is not None
    assert read_frozen(state).turns == 2  # the third turn reached the limit, where nothing is frozen
    with serving(second, tokenizer=loaded, max_sequence_length=4096) as url:
        longer = made.model_copy(update={"base_url": url, "settings": configured(turns=6)})
        (finished,) = go_on(longer, tmp_path, [state])
    record = read_episode(Path(finished.record))
    assert len(record.turns) == 6
    assert replay(record, GlmRenderer(loaded)).agrees
    sampled = read_turns(sampled_file(Path(finished.record)))
    assert [turn.policy_epoch for turn in sampled] == [((0, 0),)] * 2 + [((0, 7),)] * 4
    assert all(len(turn.ids) == len(turn.log_probs) > 0 for turn in sampled)
    turns = [message for message in record.messages if message.role is Role.ASSISTANT]
    assert [turn.sampled.body for turn in turns if turn.sampled] == [list(turn.body) for turn in sampled]


@pytest.mark.long
def test_the_state_of_another_model_is_not_gone_on_with(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    engine = policy(loaded, lambda tail: written_call("bash", cmd="echo there"))
    with endpoint(script) as teacher, serving(engine, tokenizer=loaded, max_sequence_length=4096) as url:
        models = {"teacher": teacher.url, "klong/policy": url}
        states = {}
        for model, address in models.items():
            made = job(tmp_path / model, tokenizer, tasks / "t10", address, configured(turns=2), model)
            made = made.model_copy(update={"freeze_folder": str(tmp_path / model / "frozen")})
            collect([made], workers=1, output_folder=tmp_path / model)
            (states[model],) = newest(made)
        for model, other, told in (
            ("klong/policy", "teacher", "was played by another model, whose replies have no ids"),
            ("teacher", "klong/policy", "was sampled by a policy of ours"),
        ):
            made = job(tmp_path / "on" / model, tokenizer, tasks / "t10", models[model], configured(turns=4), model)
            (finished,) = go_on(made, tmp_path / "on" / model, [states[other]])
            record = read_episode(Path(finished.record))
            assert record.ending == "agent_failed"
            assert told in (record.error or "")


def test_seconds_spent_freezing_are_none_of_the_episodes(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    began: list[float] = []

    def large(number: int, messages: list[dict[str, Any]]) -> Reply:
        began.append(time.monotonic())
        return call("bash", cmd="head -c 150000000 /dev/urandom > large" if number == 0 else "echo small")

    config = configured(turns=12)
    record = play_script(tmp_path, tokenizer, tasks / "t10", large, config, freeze_folder=str(tmp_path / "frozen"))
    assert record.ending == "turn_limit"
    left = [seconds_left(text) for text in results(record)]
    wall = began[11] - began[1]  # ten small turns, and before each the workspace was packed
    assert wall > 2  # or whole seconds could not tell
    assert left[0] - left[10] < wall / 2


def test_a_state_that_would_be_rendered_otherwise_or_is_damaged_is_refused(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    with endpoint(script) as served:
        made = many(tmp_path, tokenizer, tasks / "t10", served.url, 1)
        short = made.model_copy(update={"settings": configured(turns=9)})
        collect([short], workers=1, output_folder=tmp_path / "first")
        (state,) = newest(made)
        assert state is not None
        other = short.model_copy(update={"settings": configured("--tools", '["bash", "submit"]', turns=12)})
        (finished,) = go_on(other, tmp_path, [state], name="otherwise")
        record = read_episode(Path(finished.record))
        assert record.ending == "agent_failed"
        assert "its prompts are made otherwise here" in (record.error or "")
        archive = next(state.parent.glob("*-home.tar.zst"))
        archive.write_bytes(archive.read_bytes()[:-20])
        (finished,) = go_on(short, tmp_path, [state], name="damaged")
        record = read_episode(Path(finished.record))
        assert record.ending == "agent_failed"
        assert f"{archive}: damaged" in (record.error or "")
    state.write_text("{")
    with pytest.raises(FrozenError, match="not JSON"):
        read_frozen(state)
