"""How a request over real HTTP may end: its place is free again, the engine knows of it, and metrics count it."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_klong.serve.interface import Load
from megatron_klong.serve.protocol import (
    CHAT,
    COMPLETIONS,
    HEALTH,
    METRICS,
    REFIT,
    DeadlinePassed,
    EngineStopped,
    ReplyError,
)
from tests.unit.serve.scripted import Scripted, connected, eventually, get, head, post, serving
from tests.unit.trajectory.builders import byte_tokenizer

BYTES = byte_tokenizer()
ASK = {"prompt": [1], "max_tokens": 9}
CHATTED = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
LONG = [5] * 9
FULL: dict[str, Any] = {"max_requests": 1, "max_waiting": 1}


def scripted(*replies: Any, **settings: Any) -> Scripted:
    return Scripted(*replies, tokenizer=BYTES, vocabulary_size=BYTES.vocabulary_size, **settings)


def counted(url: str, name: str, **labels: str) -> float | None:
    """A sample of the metrics, as their own parser reads them."""
    families = text_string_to_metric_families(get(url, METRICS).text)
    samples = [sample for family in families for sample in family.samples]
    return next((s.value for s in samples if s.name == name and labels.items() <= s.labels.items()), None)


def answers(url: str, path: str, status: int) -> float | None:
    return counted(url, "klong_answers_total", route=path, status=str(status))


def in_flight(url: str) -> int:
    return int(get(url, HEALTH).json()["in_flight"])


@contextmanager
def asking(url: str, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that has sent its request; it leaves when the context ends."""
    content = json.dumps(body).encode()
    with connected(url) as wire:
        wire.sendall(head(path, length=len(content)) + content)
        yield wire


def read_until(wire: socket.socket, part: bytes) -> bytes:
    seen = b""
    while part not in seen:
        more = wire.recv(9999)
        assert more, seen
        seen += more
    return seen


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, {**ASK, "n": 2}), (CHAT, CHATTED)])
def test_a_client_that_leaves_ends_its_requests(path: str, body: dict[str, Any], stream: bool, seen: bool) -> None:
    """seen: it leaves with the reply begun, of which it has read some if it is streamed."""
    count = int(body.get("n", 1))
    engine = scripted(lambda request: LONG, held=True)
    with serving(engine, tokenizer=BYTES, **FULL) as url:
        with asking(url, path, {**body, "stream": stream}) as wire:
            eventually(lambda: len(engine.asked) == count)
            engine.let(2 * seen)
            if stream and seen:
                read_until(wire, b"data: ")
            assert in_flight(url) == count
            assert engine.ended == []
        eventually(lambda: len(engine.ended) == count)
        eventually(lambda: answers(url, path, 499) == 1)
        assert answers(url, path, 200) is None
        assert counted(url, "klong_generated_tokens_total") == 0
        assert in_flight(url) == 0
        engine.let()
        assert post(url, {**body, "stream": stream}, path).status_code == 200
        assert answers(url, path, 200) == 1
        assert len(engine.ended) == count


def test_a_client_that_leaves_before_its_body_is_whole_is_counted() -> None:
    with serving(scripted()) as url:
        with connected(url) as wire:
            wire.sendall(head(COMPLETIONS, length=99) + b"{")
        eventually(lambda: answers(url, COMPLETIONS, 499) == 1)


def test_a_full_server_says_when_to_come_back() -> None:
    engine = scripted(lambda request: LONG, held=True)
    with serving(engine, **FULL) as url:
        with asking(url, COMPLETIONS, {**ASK, "n": 2}):
            eventually(lambda: len(engine.asked) == 2)
            full = post(url, ASK)
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            assert "2 requests are in flight already" in full.json()["error"]["message"]
            assert "max_requests 1 and max_waiting 1" in full.json()["error"]["message"]
            assert get(url, HEALTH).status_code == 200
        eventually(lambda: in_flight(url) == 0)
        engine.let()
        assert post(url, ASK).status_code == 200
        assert answers(url, COMPLETIONS, 429) == 1


def test_every_replica_has_its_places() -> None:
    engine = scripted(lambda request: LONG, held=True)
    engine.loads = [Load()] * 3
    with serving(engine, **FULL) as url, asking(url, COMPLETIONS, {**ASK, "n": 4}):
        eventually(lambda: len(engine.asked) == 4)
        words = "4 requests are in flight already, of max_requests 1 on each of 3 replicas and max_waiting 1"
        full = post(url, ASK)
        assert (full.status_code, words in full.json()["error"]["message"]) == (429, True)


def test_a_client_that_stops_reading_is_left() -> None:
    tokens = 60_000  # some 30 MB: more than any socket holds
    engine = scripted(lambda request: [5] * request.max_tokens)
    with serving(engine, body_seconds=1, max_sequence_length=tokens + 1, max_requests=1, max_waiting=0) as url:
        body = {"prompt": [1], "max_tokens": tokens, "stream": True, "logprobs": 20}
        with asking(url, COMPLETIONS, body) as wire:
            read_until(wire, b"data: ")
            eventually(lambda: in_flight(url) == 0)
            assert post(url, ASK).status_code == 200
            assert answers(url, COMPLETIONS, 499) == 1
            with pytest.raises(ConnectionResetError):  # its connection is no more
                read_until(wire, b"[DONE]")


def test_a_client_that_reads_slowly_gets_all_of_it() -> None:
    engine = scripted(lambda request: [5] * request.max_tokens)
    with serving(engine, body_seconds=1, max_sequence_length=20_001) as url:
        body = {"prompt": [1], "max_tokens": 20_000, "stream": True, "logprobs": 20}
        with asking(url, COMPLETIONS, body) as wire:
            seen, started = b"", time.monotonic()
            while not seen.endswith(b"0\r\n\r\n"):  # the last chunk
                if time.monotonic() - started < 3:
                    time.sleep(0.1)
                seen = seen[-99:] + wire.recv(1 << 16)
        eventually(lambda: answers(url, COMPLETIONS, 200) == 1)


def leaves(url: str, body: dict[str, Any]) -> None:
    with asking(url, COMPLETIONS, body):
        eventually(lambda: in_flight(url) == 2)


ENDINGS: dict[str, tuple[Any, dict[str, Any], Callable[[str, dict[str, Any]], Any]]] = {
    "whole": (LONG, {}, post),
    "stopped": (LONG, {"stop_token_ids": [5]}, post),
    "past its deadline": (LONG, {"deadline_seconds": 0.01}, post),
    "an error": (EngineStopped("gone"), {}, post),
    "an error in the middle": ([5, EngineStopped("gone")], {}, post),
    "a fault": (RuntimeError("a fault"), {}, post),
    "too much asked": (LONG, {"top_k": 999}, post),
    "its client gone": (LONG, {}, leaves),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_its_place_is_free_again_whatever_its_end(ending: str, stream: bool) -> None:
    reply, fields, ask = ENDINGS[ending]
    waits = ending in ("past its deadline", "its client gone")
    engine = scripted(lambda request: reply, held=waits)
    with serving(engine, **FULL) as url:
        ask(url, {**ASK, "n": 2, "stream": stream, **fields})
        eventually(lambda: in_flight(url) == 0)
        engine.let()
        engine.replies = [LONG, LONG]
        again = post(url, {**ASK, "n": 2})
    assert again.status_code == 200
    assert [choice["generation_token_ids"] for choice in again.json()["choices"]] == [LONG, LONG]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ReplyError("no ids"), 502),
        (EngineStopped("the engine has ended: out of memory"), 503),
        (DeadlinePassed("too late"), 504),
        (RuntimeError("a fault"), 500),
    ],
)
@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, ASK), (CHAT, CHATTED)])
def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    path: str, body: dict[str, Any], error: Exception, status: int
) -> None:
    with serving(scripted([5, 6, error]), tokenizer=BYTES) as url:
        with asking(url, path, {**body, "stream": True}) as wire:
            received = read_until(wire, b'"error"')
        eventually(lambda: answers(url, path, status) == 1)
        assert answers(url, path, 200) is None
        assert counted(url, "klong_generated_tokens_total") == 0
    assert received.startswith(b"HTTP/1.1 200 ")
    *pieces, last = [line for line in received.split(b"\r\n") if line.startswith(b"data: ")]
    assert [json.loads(piece[6:])["choices"][0]["finish_reason"] for piece in pieces] == [None, None]
    kind = "server_error"
    assert json.loads(last[6:]) == {"error": {"message": str(error), "type": kind, "param": None, "code": status}}


def test_of_several_replies_one_that_fails_ends_the_others() -> None:
    engine = scripted([5, EngineStopped("gone")], LONG, held=True)
    with serving(engine, **FULL) as url:
        with asking(url, COMPLETIONS, {**ASK, "n": 2}) as wire:
            eventually(lambda: len(engine.asked) == 2)
            engine.let(3)
            assert read_until(wire, b"}}").startswith(b"HTTP/1.1 503 ")
        assert len(engine.ended) == 1
        assert in_flight(url) == 0


def test_an_engine_that_does_not_finish_a_reply_is_at_fault() -> None:
    class Short(Scripted):
        async def stream(self, request: Any) -> Any:
            async for part in super().stream(request):
                if part.policy_epoch == ():
                    yield part

    with serving(Short([5, 6])) as url:
        reply = post(url, {**ASK, "stream": True})
    assert '"code":502' in reply.text.split("\n\n")[-2]


def test_metrics_count_what_was_answered_and_sampled() -> None:
    engine = scripted(lambda request: LONG, policy_epoch=4)
    with serving(engine, tokenizer=BYTES) as url:
        post(url, {"prompt": [1, 2], "max_tokens": 3})
        post(url, {"prompt": [1, 2], "max_tokens": 3, "n": 2, "stream": True})
        post(url, {"prompt": [1], "max_tokens": 3, "stop_token_ids": [5]})
        post(url, CHATTED, CHAT)
        post(url, b"{")
        post(url, {"weights": "/new"}, REFIT)
        get(url, METRICS)
        expected = {
            ("klong_answers_total", (("route", COMPLETIONS), ("status", "200"))): 3,
            ("klong_answers_total", (("route", COMPLETIONS), ("status", "400"))): 1,
            ("klong_answers_total", (("route", CHAT), ("status", "200"))): 1,
            ("klong_answers_total", (("route", REFIT), ("status", "200"))): 1,
            ("klong_answers_total", (("route", METRICS), ("status", "200"))): 1,
            ("klong_replies_total", (("reason", "length"),)): 4,
            ("klong_replies_total", (("reason", "stop"),)): 1,
            ("klong_prompt_tokens_total", ()): 2 + 2 * 2 + 1 + len(engine.asked[-1].prompt_token_ids),
            ("klong_generated_tokens_total", ()): 3 + 2 * 3 + 1 + 9,
            ("klong_reply_seconds_count", ()): 4,
            ("klong_in_flight", ()): 0,
            ("klong_policy_epoch", ()): 5,
            ("klong_engine_running", (("replica", "0"),)): 1,
            ("klong_engine_blocks", (("replica", "0"),)): 8,
            ("klong_engine_prefill_reused", (("replica", "0"),)): 3,
        }
        text = get(url, METRICS)
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(text.text)
    found = {(one.name, tuple(sorted(one.labels.items()))): one.value for f in families for one in f.samples}
    assert {name: found.get(name) for name in expected} == expected
    answered = {name: value for name, value in found.items() if name[0] == "klong_answers_total"}
    assert answered == {name: value for name, value in expected.items() if name[0] == "klong_answers_total"}


def test_metrics_say_how_many_replies_are_waited_for() -> None:
    engine = scripted(lambda request: LONG, held=True)
    with serving(engine) as url, asking(url, COMPLETIONS, {**ASK, "n": 3, "stream": True}) as wire:
        eventually(lambda: len(engine.asked) == 3)
        assert counted(url, "klong_in_flight") == 3
        engine.let()
        received = read_until(wire, b"[DONE]").decode()
        eventually(lambda: counted(url, "klong_in_flight") == 0)
    assert received.count('"finish_reason":"length"') == 3


def test_a_stream_that_was_read_to_its_end_is_counted_as_answered() -> None:
    with serving(scripted([5, 6])) as url:
        with asking(url, COMPLETIONS, {**ASK, "stream": True}) as wire:
            read_until(wire, b"[DONE]")  # not one byte further, as clients do it
        eventually(lambda: answers(url, COMPLETIONS, 200) == 1)
        assert answers(url, COMPLETIONS, 499) is None
