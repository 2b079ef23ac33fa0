"""Whole episodes. Scripted is the model alone, over real HTTP; Inspect, worker process, sandbox and judge are real."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples.longhaul.serve_teachers import Options, serving
from megatron_klong.agent.collect import CollectError, collect
from megatron_klong.agent.worker import FinishedEpisode, Played
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.importers import openai_messages
from megatron_klong.trajectory.live import PromptDigest
from megatron_klong.trajectory.replay import replay
from megatron_klong.trajectory.schema import Reading, Role
from megatron_klong.trajectory.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY
from tests.integration.agent.playing import READ, SUBMIT, job, play, play_script, settings
from tests.integration.scripted_endpoint import call, endpoint, say


def fingerprints_on_the_wire(requests: Sequence[dict[str, Any]], renderer: GlmRenderer) -> list[tuple[int, str]]:
    """What an engine would have been given, rendered from the request bodies alone."""
    found = []
    for body in requests:
        tools = [_without_strict(tool) for tool in body["tools"]]
        made = openai_messages.transcript({"messages": body["messages"], "tools": tools}, "wire", 0)
        rendered = renderer.transcript(made)
        last_user = max(n for n, message in enumerate(made.messages) if message.role is Role.USER)
        digest = PromptDigest()
        digest.update(rendered.preamble)
        for number, message in enumerate(rendered.messages):
            # The template's own rule: no reasoning before the last user message.
            hidden = number < last_user
            digest.update([s for s in message.segments if not (hidden and s.kind.name == "REASONING")])
        fingerprint = digest.fingerprint(0, renderer.header)
        found.append((fingerprint.tokens, fingerprint.sha256))
    return found


def _without_strict(tool: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's own addition, which no chat template shows."""
    return {**tool, "function": {k: v for k, v in tool["function"].items() if k != "strict"}}


def test_every_prompt_on_the_wire_is_the_splitters(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    wire = tmp_path / "wire.jsonl"
    with serving(Options(record=wire)) as url:
        record = play(tmp_path, tokenizer, tasks / "t60", url, settings(), model="oracle")
    assert (record.ending, record.score, len(record.turns)) == ("finished", 1.0, 60)
    assert record.windows >= 3
    renderer = GlmRenderer(load_tokenizer(tokenizer))
    assert replay(record, renderer).agrees
    requests = [json.loads(line) for line in wire.read_text().splitlines()]
    assert fingerprints_on_the_wire(requests, renderer) == [
        (turn.prompt_tokens, turn.prompt_sha256) for turn in record.turns
    ]
    assert max(turn.prompt_tokens or 0 for turn in record.turns) <= 2048 - 256 + 1
    assert sum(message.reading is Reading.COMPLETE for message in record.messages) == 1


def test_a_user_message_in_mid_episode_renders_the_history_anew(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    def script(number: int, messages: list[dict[str, Any]]) -> dict[str, Any]:
        if number == 0:
            return READ
        if number % 5 == 0:
            return say("what now?", reasoning="lost")
        return call("bash", cmd=f"echo {number}") if number < 22 else SUBMIT

    with endpoint(script) as served:
        config = settings("--turn_limit", "24", "--reading", "off", "--context.max_tokens", "1700")
        record = play(tmp_path, tokenizer, tasks / "t10", served.url, config)
        requests = served.requests
    renderer = GlmRenderer(load_tokenizer(tokenizer))
    result = replay(record, renderer)
    assert result.agrees
    assert result.turns == 24
    assert record.windows >= 5  # a window ends at each of the four user messages
    assert fingerprints_on_the_wire(requests, renderer) == [
        (turn.prompt_tokens, turn.prompt_sha256) for turn in record.turns
    ]
    assert record.ending == "turn_limit"  # submit was refused: there is no reproduce.sh


NASTY = {
    "ignores_sigterm": "trap '' TERM INT HUP; while :; do sleep 1000; done",
    "floods": "yes 'a flood of output' | cat",
    "daemonises": "(setsid nohup sh -c 'trap \"\" TERM; sleep 1000' &) ; (setsid sleep 1000 &) ; sleep 1000",
    "fills_stdout_from_children": "for i in 1 2 3; do (yes >&1 &) ; done; sleep 1000",
}


# Seconds of the soft and of the hard limit, and most turns. Imports at the first request count as waited for.
LIMITS = [(6, 12, 5), pytest.param((18, 20, 100_000), marks=pytest.mark.slow)]


@pytest.mark.parametrize("limits", LIMITS, ids=["12 s", "20 s"])
@pytest.mark.parametrize("name", NASTY)
def test_an_episode_ends_at_its_deadline_whatever_a_command_does(
    tmp_path: Path, tasks: Path, tokenizer: Path, name: str, limits: tuple[int, int, int]
) -> None:
    soft, hard, turns = limits
    config = settings(
        *("--timeout", f"{soft}s", "--hard_timeout", f"{hard}s", "--command_timeout", f"{soft}s"),
        *("--turn_limit", str(turns)),
    )
    record = play_script(
        tmp_path, tokenizer, tasks / "t10", lambda number, messages: call("bash", cmd=NASTY[name]), config
    )
    # A flood is killed at its output limit, and the agent goes on until it has used up its turns or its time.
    assert (
        record.ending in ("timed_out", "turn_limit")
        if "flood" in name or "fills" in name
        else record.ending == "timed_out"
    )
    assert record.seconds < hard + 2
    assert record.score == 0.0


def test_the_hard_limit_cuts_from_outside_and_the_episode_is_scored(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    def script(number: int, messages: list[dict[str, Any]]) -> dict[str, Any] | int:
        # Waiting for a busy engine is given back, so the soft limit moves behind the hard one.
        if number < 2:
            return 429
        return call("bash", cmd="echo begun > results.txt; sleep 1000")

    config = settings("--timeout", "5s", "--hard_timeout", "6s", "--command_timeout", "5s")
    record = play_script(tmp_path, tokenizer, tasks / "t10", script, config)
    assert record.ending == "hard_timed_out"
    assert record.turns[0].given_back_seconds > 1
    assert record.seconds < 6 + 2
    assert record.score == 0.0


def test_an_engine_that_only_fails_is_a_typed_ending(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    record = play_script(
        tmp_path, tokenizer, tasks / "t10", lambda number, messages: 500, settings("--engine_retries", "1")
    )
    assert record.ending == "engine_failed"
    assert record.error
    assert record.turns == []
    assert record.score == 0.0


def test_a_task_that_does_not_fit_the_window_is_a_typed_ending(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    config = settings(
        "--context.max_tokens", "400", "--context.reserve_tokens", "100", "--context.prefix_cap_tokens", "200"
    )
    record = play_script(tmp_path, tokenizer, tasks / "t10", lambda number, messages: READ, config)
    assert record.ending == "context_error"
    assert "tools and task have" in (record.error or "")


def test_submit_is_refused_with_the_reason_until_it_may(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    replies = [SUBMIT, call("bash", cmd="ls"), READ, SUBMIT, call("bash", cmd="echo true > reproduce.sh"), SUBMIT]
    record = play_script(
        tmp_path, tokenizer, tasks / "t10", lambda number, messages: replies[number], settings("--reading", "refuse")
    )
    results = [message.content for message in record.messages if message.role is Role.TOOL]
    assert results[0].startswith("Not accepted: the paper is not read yet (0 of ")
    assert results[1].startswith("Refused: read /home/paper/paper.md first")
    assert results[2].splitlines()[-1] == "[paper read]" or "[time left" in results[2].splitlines()[-1]
    assert results[3].startswith("Not accepted: /home/submission/reproduce.sh is missing.")
    assert results[5].startswith("Submitted.")
    assert record.ending == "finished"


def test_calls_a_model_gets_wrong_are_answered_and_the_episode_goes_on(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    broken = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": '{"cmd": "ls'}}
    replies = [
        {"role": "assistant", "content": None, "tool_calls": [broken]},
        call("no_such_tool", x=1),
        call("bash", command="ls"),
        call("read_file_chunk", file="/home/paper/absent.md"),
        call("bash", cmd="exit 3"),
    ]
    record = play_script(
        tmp_path, tokenizer, tasks / "t10", lambda number, messages: replies[number], settings("--turn_limit", "5")
    )
    results = [message.content for message in record.messages if message.role is Role.TOOL]
    assert len(results) == 5
    assert all("rror" in result for result in results[:4])
    assert "[exit code 3]" in results[4]
    assert [message.trained for message in record.messages if message.role is Role.ASSISTANT][:2] == [False, True]
    assert replay(record, GlmRenderer(load_tokenizer(tokenizer))).agrees


def test_a_worker_that_cannot_run_is_an_error_that_names_its_output(
    tmp_path: Path, tasks: Path, tokenizer: Path
) -> None:
    broken = tmp_path / "t10"
    shutil.copytree(tasks / "t10", broken)
    (broken / "paper.md").unlink()
    with pytest.raises(CollectError, match=r"finished 0 of 1 episodes .*paper\.md: missing"):
        play(tmp_path, tokenizer, broken, "http://127.0.0.1:9/v1", settings())


def test_a_worker_is_gone_when_the_collection_ends_in_a_fault(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    def refuse(finished: FinishedEpisode) -> None:
        raise KeyError("bank")

    with endpoint(lambda number, messages: call("bash", cmd="sleep 0.2")) as served:
        made = job(tmp_path, tokenizer, tasks / "t10", served.url, settings("--turn_limit", "2"))
        endless = settings("--turn_limit", "1000")
        episodes = [Played(task_folder=str(tasks / "t10"), rollout=number) for number in (1, 2)]
        jobs = [made, made.model_copy(update={"name": "endless", "settings": endless, "episodes": episodes})]
        with pytest.raises(KeyError, match="bank"):
            collect(jobs, workers=2, output_folder=tmp_path / "output", on_finished=refuse)
    workers = [child for child in psutil.Process().children() if "megatron_klong.agent.worker" in child.cmdline()]
    assert workers == []


def test_a_worker_that_still_imports_ends_with_its_collector(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    program = """
import sys
from pathlib import Path
from megatron_klong.agent.collect import collect
from megatron_klong.agent.worker import Job
collect([Job.model_validate_json(sys.argv[1])], workers=1, output_folder=Path(sys.argv[2]))
"""
    given = job(tmp_path, tokenizer, tasks / "t10", "http://127.0.0.1:9/v1", settings())
    collector = subprocess.Popen(
        [sys.executable, "-c", program, given.model_dump_json(), str(tmp_path / "output")], cwd=REPOSITORY
    )
    while not (workers := psutil.Process(collector.pid).children()):
        assert collector.poll() is None
    collector.kill()
    collector.wait()
    time.sleep(1)  # its imports take longer; a zombie waits for whoever adopted it
    assert [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE] == []
