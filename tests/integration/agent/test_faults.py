"""What an engine may do wrong: the episode goes on, or ends with the right type; a turn is never silently empty."""

import random
import threading
from pathlib import Path
from typing import Any

from megatron_klong.agent.collect import collect
from megatron_klong.agent.worker import Played
from megatron_klong.trajectory.episode import read_episode
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.replay import replay
from megatron_klong.trajectory.schema import Role
from megatron_klong.trajectory.tokenizer import load_tokenizer
from tests.integration.agent.playing import job, play_script, results, settings
from tests.integration.scripted_endpoint import Fault, Reply, call, endpoint

FAULTS: list[Reply] = [429, 500, Fault.HANG, Fault.CUT, Fault.GARBAGE, Fault.EMPTY]


def test_faults_at_ten_percent_each_are_outlived_or_typed(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    chance, lock, seen = random.Random(5), threading.Lock(), set[Reply]()

    def script(number: int, messages: list[dict[str, Any]]) -> Reply:
        with lock:
            place = int(chance.random() * 10)
            if place < len(FAULTS):
                seen.add(FAULTS[place])
                return FAULTS[place]
        return call("bash", cmd="echo there")

    config = settings("--turn_limit", "4", "--engine_timeout", "1s", "--engine_retries", "6", "--reading", "off")
    with endpoint(script) as served:
        made = job(tmp_path, tokenizer, tasks / "t10", served.url, config)
        episodes = [Played(task_folder=str(tasks / "t10"), rollout=number) for number in range(1, 9)]
        finished = collect([made.model_copy(update={"episodes": episodes})], workers=1, output_folder=tmp_path)
    records = [read_episode(Path(one.record)) for one in finished]
    assert seen == set(FAULTS)
    assert {record.ending for record in records} <= {"turn_limit", "engine_failed"}
    assert sum(record.ending == "turn_limit" for record in records) >= 6
    renderer = GlmRenderer(load_tokenizer(tokenizer))
    for record in records:
        turns = [message for message in record.messages if message.role is Role.ASSISTANT]
        assert all(turn.tool_calls for turn in turns)
        assert len(turns) == len(record.turns) == (4 if record.ending == "turn_limit" else len(turns))
        assert (record.error is None) == (record.ending == "turn_limit")
        assert replay(record, renderer).agrees
    # hanging and trying again took seconds, and none of the episodes' own
    turns_played = [turn for record in records for turn in record.turns]
    waited = [turn for turn in turns_played if turn.given_back_seconds > 1]
    assert waited
    assert all(turn.model_seconds < turn.given_back_seconds for turn in waited)


def test_replies_that_are_only_empty_end_the_episode_as_the_engines_fault(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    record = play_script(
        tmp_path, tokenizer, tasks / "t10", lambda number, messages: Fault.EMPTY, settings("--engine_retries", "1")
    )
    assert (record.ending, record.turns) == ("engine_failed", [])
    assert record.error == "the engine sent an empty reply 2 times"


def test_an_engine_that_calls_a_prompt_too_long_is_asked_with_half_the_history(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    def script(number: int, messages: list[dict[str, Any]]) -> Reply:
        # it takes ten messages, where the policy's window has room for more
        return Fault.TOO_LONG if len(messages) > 10 else call("bash", cmd=f"echo {number}")

    record = play_script(tmp_path, tokenizer, tasks / "t10", script, settings("--turn_limit", "12", "--reading", "off"))
    assert record.ending == "turn_limit"
    halved = [turn.halved for turn in record.turns]
    assert sum(halved) >= 2
    assert record.windows == 1 + sum(halved)
    assert replay(record, GlmRenderer(load_tokenizer(tokenizer))).agrees
    assert len(results(record)) == 12


def test_an_engine_too_small_for_the_task_is_a_typed_ending(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    record = play_script(tmp_path, tokenizer, tasks / "t10", lambda number, messages: Fault.TOO_LONG, settings())
    assert record.ending == "context_error"
    assert "lower max_tokens, 2048, to what it serves" in (record.error or "")
