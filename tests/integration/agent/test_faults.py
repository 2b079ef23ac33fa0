"""What an engine may do wrong: the episode goes on, or ends with the right type; a turn is never silently empty."""

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_klong.agent.collect import collect
from megatron_klong.agent.worker import Played
from megatron_klong.sandbox.directories import runner_directory
from megatron_klong.serve.protocol import sha256_of_ids
from megatron_klong.trajectory.episode import read_episode
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.replay import replay
from megatron_klong.trajectory.schema import Role
from megatron_klong.trajectory.tokenizer import load_tokenizer
from tests.integration.agent.playing import job, play, play_script, policy, results, settings
from tests.integration.scripted_endpoint import Fault, Reply, call, endpoint, say
from tests.unit.serve.scripted import Scripted, serving
from tests.unit.serve.scripted import call as written_call

FAULTS: list[Reply] = [429, 500, Fault.HANG, Fault.CUT, Fault.GARBAGE, Fault.EMPTY]


@contextmanager
def faulty(url: str, fault: Callable[[], Reply | None]) -> Iterator[str]:
    """A server of ours behind one that does, in place of passing a request on, what `fault` says."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(httpx.get(url + self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            match fault():
                case None | Fault.CUT as cut:
                    answer = httpx.post(url + self.path, content=body)
                    self._send(answer, cut=cut is Fault.CUT)
                case Fault.HANG:
                    over.wait()
                case Fault.GARBAGE:
                    self._send(httpx.Response(200, content=b'{"choices": [{"ind'))
                case Fault.EMPTY:
                    sampled = {"generation_token_ids": [], "generation_log_probs": [], "finish_reason": "length"}
                    stated = {"prompt_sha256": sha256_of_ids(json.loads(body)["prompt"])}
                    self._send(httpx.Response(200, json={"choices": [{**sampled, **stated}]}))
                case status:
                    assert isinstance(status, int)
                    self._send(httpx.Response(status, json={"error": "scripted"}))

        def _send(self, answer: httpx.Response, *, cut: bool = False) -> None:
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.close_connection = cut
            self.wfile.write(answer.content[: len(answer.content) // 2] if cut else answer.content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


@pytest.mark.long
@pytest.mark.parametrize("model", ["teacher", "klong/policy"])
def test_faults_at_ten_percent_each_are_outlived_or_typed(
    tmp_path: Path, tasks: Path, tokenizer: Path, model: str
) -> None:
    chance, lock, seen = random.Random(5), threading.Lock(), set[Reply]()

    def fault() -> Reply | None:
        with lock:
            place = int(chance.random() * 10)
            if place >= len(FAULTS):
                return None
            seen.add(FAULTS[place])
            return FAULTS[place]

    def script(number: int, messages: list[dict[str, Any]]) -> Reply:
        return fault() or call("bash", cmd="echo there")

    config = settings(
        *("--turn_limit", "4", "--engine_timeout", "1s", "--engine_retries", "6", "--reading", "off"),
        # waiting between tries is given back, and may be long: two turns that each fail six times wait for 80 s
        *("--hard_timeout", "6m"),
    )
    with ExitStack() as servers:
        if model.startswith("klong/"):
            loaded = load_tokenizer(tokenizer)
            engine = policy(loaded, lambda tail: written_call("bash", cmd="echo there"))
            front = servers.enter_context(serving(engine, tokenizer=loaded, max_sequence_length=4096))
            url = servers.enter_context(faulty(front, fault))
        else:
            url = servers.enter_context(endpoint(script)).url
        made = job(tmp_path, tokenizer, tasks / "t10", url, config, model)
        episodes = [Played(task_folder=str(tasks / "t10"), rollout=number) for number in range(1, 9)]
        finished = collect([made.model_copy(update={"episodes": episodes})], workers=1, output_folder=tmp_path)
    records = [read_episode(Path(one.record)) for one in finished]
    assert seen == set(FAULTS)
    assert {record.ending for record in records} <= {"turn_limit", "engine_failed"}
    # one turn in 36 meets seven faults in a row, so one episode in nine is given up: five of eight in 1,800 runs once
    assert sum(record.ending == "turn_limit" for record in records) >= 4
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


def test_what_a_policys_server_cannot_give_is_not_asked_again(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    class WithoutIds(Scripted):
        asked_about_ids = 0

        @property
        def exact_tokens(self) -> bool:  # type: ignore[override]
            self.asked_about_ids += 1
            return False

    engine, loaded = WithoutIds(), load_tokenizer(tokenizer)
    with serving(engine, tokenizer=loaded, max_sequence_length=4096) as url:
        record = play(tmp_path, tokenizer, tasks / "t10", url, settings("--engine_retries", "5"), model="klong/policy")
    assert (record.ending, record.turns, engine.asked_about_ids) == ("engine_failed", [], 1)
    assert "its replies hold no sampled ids" in (record.error or "")


@pytest.mark.parametrize("when", ["bash", "background", "read_file_chunk", "scoring"])
def test_a_sandbox_that_is_gone_ends_the_episode_as_its_fault(
    tmp_path: Path, tasks: Path, tokenizer: Path, when: str
) -> None:
    calls = {
        "bash": call("bash", cmd="ls"),
        "background": call("background", cmd="ls"),
        "read_file_chunk": call("read_file_chunk", file="/home/paper/paper.md"),
        "scoring": say("nothing more"),
    }

    def script(number: int, messages: list[dict[str, Any]]) -> Reply:
        if number == 0:
            return call("bash", cmd="echo true > reproduce.sh")
        (home,) = runner_directory().glob("*/home")
        shutil.rmtree(home)
        return calls[when]

    tools = ("--tools", '["bash", "background", "read_file_chunk", "submit"]')
    config = settings(*tools, "--turn_limit", "2", "--reading", "off")
    record = play_script(tmp_path, tokenizer, tasks / "t10", script, config)
    assert (record.score, len(record.turns)) == (0.0, 2)
    if when == "scoring":
        assert record.ending == "turn_limit"
    else:
        assert record.ending == "sandbox_failed"
        assert record.error
