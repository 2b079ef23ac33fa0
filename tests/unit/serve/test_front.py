"""The front over real HTTP: who is answered, what is refused with which words, and what replies hold.

Headers in bytes, which httpx takes and its types do not know, are why type errors are ignored.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from megatron_klong.serve import completions
from megatron_klong.serve.protocol import (
    CHAT,
    COMPLETIONS,
    HEALTH,
    METRICS,
    MODELS,
    REFIT,
    DeadlinePassed,
    EngineStopped,
    RefitRefused,
    RefitReply,
    ReplyError,
)
from tests.unit.serve.scripted import Scripted, call, connected, events, get, head, log_prob, post, serving, written
from tests.unit.trajectory.builders import byte_tokenizer

BYTES = byte_tokenizer()
SIZE = BYTES.vocabulary_size
USER = BYTES.control["<|user|>"]
ASK = {"prompt": [1, 2], "max_tokens": 3}
HELLO = [{"role": "user", "content": "hello"}]


def scripted(*replies: Any, **settings: Any) -> Scripted:
    return Scripted(*replies, tokenizer=BYTES, vocabulary_size=SIZE, **settings)


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    """A server without a tokenizer, whose replies are 5, 6, 7."""
    with serving(scripted(lambda request: [5, 6, 7]), max_sequence_length=100, max_body_mib=0.01) as url:
        yield url


@pytest.fixture(scope="module")
def texts() -> Iterator[str]:
    """A server with a tokenizer, whose replies are "abc"."""
    engine = scripted(lambda request: BYTES.encode("abc"))
    with serving(engine, tokenizer=BYTES, max_sequence_length=100, max_requests=2, max_waiting=2) as url:
        yield url


@pytest.fixture(scope="module")
def obedient() -> Iterator[tuple[Scripted, str]]:
    """A server with a tokenizer, and its engine, to which a test says what to reply."""
    engine = scripted()
    with serving(engine, tokenizer=BYTES) as url:
        yield engine, url


def refused(response: httpx.Response, status: int, *words: str) -> None:
    """It is an error as OpenAI writes it, which says these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(name, error)] = response.json().items()
    assert (name, set(error)) == ("error", {"message", "type", "param", "code"})
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["code"] == status
    assert all(word in error["message"] for word in words), error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ["no JSON"]),
        (b'{"prompt": [1', ["no JSON"]),
        (b"[]", ["no JSON object"]),
        (b'{"prompt": ' + b"[" * 4000 + b"]" * 4000 + b"}", ["no JSON", "recursion"]),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", ["prompt: a list of token ids"]),
        (b'{"frequency_penalty": ' + b"[" * 900 + b"]" * 900 + b"}", ["frequency_penalty: ", "not implemented"]),
        (b'{"\\ud800": 1}', ["no JSON", "surrogates"]),
        ({**ASK, "seed": "x"}, ["seed: "]),
        ({**ASK, "made_up": 1}, ["made_up: no such field", "leave it out"]),
        ({**ASK, "prompt": "text"}, ["prompt: this server has no tokenizer", "--tokenizer"]),
        ({**ASK, "stop": "x"}, ["stop: this server has no tokenizer", "stop_token_ids"]),
        ({**ASK, "prompt": [1, SIZE]}, [f"prompt: token id {SIZE} at place 1", f"0 to {SIZE - 1}"]),
        ({**ASK, "prompt": [[1], [-1]]}, ["prompt: token id -1 at place 0"]),
        ({**ASK, "stop_token_ids": [1, 2, 10**30]}, ["stop_token_ids: token id 1000", "at place 2"]),
        ({**ASK, "prompt": [1] * 98}, ["98 tokens of prompt", "max_tokens 3", "101", "length of 100"]),
        ({**ASK, "top_k": SIZE}, [f"top_k {SIZE}", f"vocabulary's {SIZE}"]),
        ({**ASK, "routes": True}, ["routes: ", "--routes true"]),
    ],
)
def test_a_malformed_request_is_refused_with_the_field_and_the_cure(plain: str, body: Any, words: list[str]) -> None:
    refused(post(plain, body), 400, *words)


def test_what_just_fits_is_taken(plain: str) -> None:
    assert post(plain, {**ASK, "prompt": [1] * 97, "top_k": SIZE - 1}).status_code == 200
    assert post(plain, {**ASK, "prompt": [0, SIZE - 1]}).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, ["messages: "]),
        ({"messages": HELLO, "tool_choice": "required"}, ["tool_choice: ", "use auto"]),
        ({"messages": HELLO, "tool_choice": {"type": "function", "function": {"name": "a"}}}, ["tool_choice: "]),
        ({"messages": HELLO, "prompt": [1]}, ["prompt: no such field"]),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, ["max_tokens 1", "length of 100"]),
        ({"messages": [{"role": "assistant", "generation_token_ids": [SIZE]}]}, [f"token id {SIZE}"]),
        ({"messages": HELLO, "n": 5}, ["5 replies", "max_requests 2 and max_waiting 2"]),
    ],
)
def test_a_malformed_chat_is_refused_with_the_field_and_the_cure(texts: str, body: Any, words: list[str]) -> None:
    refused(post(texts, body, CHAT), 400, *words)


def test_too_many_replies_are_refused_before_anything_is_made_for_each(
    plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(completions, "copies", lambda *given: made.append(given) or [])
    words = ["128000 replies in one body", "max_requests 32 and max_waiting 256"]
    refused(post(plain, {**ASK, "prompt": [[1]] * 1000, "n": 128}), 400, *words)
    assert made == []


@pytest.mark.parametrize(
    ("path", "body"),
    [(COMPLETIONS, {"prompt": "x" * 70_000}), (CHAT, {"messages": [{**HELLO[0], "content": "x" * 70_000}]})],
)
def test_while_a_long_text_is_encoded_others_are_answered(path: str, body: dict[str, Any]) -> None:
    encoding, others_are_answered = threading.Event(), threading.Event()

    def encode(text: str) -> list[int]:
        if len(text) > 1000:
            encoding.set()
            assert others_are_answered.wait(20)
        return BYTES.encode(text)

    with serving(scripted(), tokenizer=replace(BYTES, encode=encode)) as url, ThreadPoolExecutor() as pool:
        long = pool.submit(post, url, body, path)
        assert encoding.wait(20)
        assert get(url, HEALTH).status_code == 200
        others_are_answered.set()
        refused(long.result(), 400, "too long")


def test_chat_needs_a_tokenizer(plain: str) -> None:
    refused(post(plain, {"messages": HELLO}, CHAT), 400, "no tokenizer", "--tokenizer")


def test_unknown_routes_and_methods_are_told_so(plain: str) -> None:
    refused(get(plain, "/v1/embeddings"), 404)
    refused(post(plain, ASK, "/"), 404)
    wrong = get(plain, COMPLETIONS)
    refused(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    refused(post(plain, ASK, MODELS), 405)


def test_a_body_that_is_too_large_is_refused(plain: str) -> None:
    words = ("larger than max_body_mib 0.01", "send less")
    body = {**ASK, "user": "x" * 20_000}
    refused(post(plain, body), 413, *words)
    in_chunks = (b"x" * 1000 for _ in range(20))
    refused(httpx.post(plain + COMPLETIONS, content=in_chunks, trust_env=False), 413, *words)
    with connected(plain) as wire:  # nobody has to send it first
        wire.sendall(head(COMPLETIONS, length=10**12))
        assert wire.recv(99).startswith(b"HTTP/1.1 413 ")
    assert post(plain, {**ASK, "user": "x" * 9_000}).status_code == 200


def test_a_body_that_comes_too_slowly_is_refused_and_holds_up_nobody() -> None:
    with serving(scripted([5]), body_seconds=1.5) as url, connected(url) as wire:
        started = time.monotonic()
        wire.sendall(head(COMPLETIONS, length=99) + b'{"prompt": ')
        assert post(url, ASK).status_code == 200
        assert time.monotonic() - started < 1.5
        wire.sendall(b"[")
        answer = b"".join(iter(lambda: wire.recv(999), b""))  # up to its end: the connection is closed
        assert time.monotonic() - started >= 1.5
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_seconds 1.5" in answer


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ReplyError("3 sampled ids but 2 log-probabilities"), 502),
        (EngineStopped("the engine has ended: out of memory"), 503),
        (DeadlinePassed("deadline_seconds 1 passed"), 504),
        (RuntimeError("a fault"), 500),
    ],
)
@pytest.mark.parametrize("body", [ASK, {**ASK, "stream": True}, {**ASK, "n": 2}])
def test_the_engines_faults_have_a_status_of_their_own(
    obedient: tuple[Scripted, str], body: dict[str, Any], error: Exception, status: int
) -> None:
    engine, url = obedient
    engine.replies = [lambda request: error]
    refused(post(url, body), status, str(error))


def test_a_deadline_ends_a_reply_with_what_it_has() -> None:
    engine = scripted(lambda request: [5, 6, 7], held=True)
    with serving(engine) as url:
        refused(post(url, {**ASK, "deadline_seconds": 0.05}), 504, "deadline_seconds 0.05")
        engine.let(2)
        [choice] = post(url, {**ASK, "deadline_seconds": 0.2}).json()["choices"]
    assert (choice["generation_token_ids"], choice["finish_reason"]) == ([5, 6], "deadline")


def test_an_older_policy_is_told() -> None:
    with serving(scripted(lambda request: [5], policy_epoch=3)) as url:
        assert post(url, {**ASK, "policy_epoch_at_least": 3}).status_code == 200
        refused(post(url, {**ASK, "policy_epoch_at_least": 4}), 409, "policy_epoch_at_least 4", "policy 3")


@pytest.mark.parametrize("token", ["secret", "gehéim"])
def test_where_a_token_is_set_it_must_be_brought(token: str) -> None:
    wrong = ["", token, f"Bearer {token}x", f"Bearer {token[:-1]}", f"Basic {token}", "Bearer"]
    right = {"Authorization": f"Bearer {token}".encode()}
    with serving(scripted([5]), token=token) as url, httpx.Client(base_url=url, trust_env=False) as http:
        for path in (COMPLETIONS, CHAT, REFIT):
            refused(http.post(path, json=ASK), 401, "Authorization: Bearer")
        for path in (MODELS, METRICS):
            refused(http.get(path), 401)
            assert http.get(path, headers=right).status_code == 200  # type: ignore[arg-type]
        for given in wrong:
            answer = http.post(COMPLETIONS, json=ASK, headers={"Authorization": given.encode()})  # type: ignore[dict-item]
            refused(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get(HEALTH).status_code == http.get("/v1" + HEALTH).status_code == 200
        assert http.post(COMPLETIONS, json=ASK, headers=right).status_code == 200  # type: ignore[arg-type]


def test_a_reply_holds_what_was_sampled_under_megatrons_names_and_openais(texts: str) -> None:
    reply = post(texts, {**ASK, "logprobs": 1, "model": "any"}).json()
    ids = BYTES.encode("abc")
    [choice] = reply.pop("choices")
    assert choice == {
        "index": 0,
        "text": "abc",
        "finish_reason": "length",
        "logprobs": {
            "tokens": ["a", "b", "c"],
            "token_logprobs": [log_prob(0), log_prob(1), log_prob(2)],
            "top_logprobs": [{"a": -0.25}, {"b": -0.25}, {"c": -0.25}],
        },
        "prompt_token_ids": [1, 2],
        "generation_token_ids": ids,
        "generation_log_probs": [log_prob(0), log_prob(1), log_prob(2)],
        "policy_epoch": [[0, 0]],
        "kv_cache_epoch": [],
        "num_evictions": 0,
        "cached_tokens": 1,
    }
    assert reply.pop("id").startswith("cmpl-")
    assert abs(reply.pop("created") - time.time()) < 60
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert reply == {
        "object": "text_completion",
        "model": "policy",
        "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 1}},
    }


@pytest.mark.parametrize("stream", [False, True])
def test_of_several_replies_each_has_a_seed_and_a_place(stream: bool) -> None:
    engine = scripted(lambda request: [request.prompt_token_ids[0], (request.seed or 0) + 100])
    with serving(engine) as url:
        body = {"prompt": [[1], [2, 3]], "n": 2, "seed": 7, "stream": stream}
        answer = post(url, body)
        post(url, {"prompt": [5], "n": 2})
    choices = [choice for event in events(answer.text) for choice in event["choices"]] if stream else []
    whole = [choice for choice in choices if choice["finish_reason"]] if stream else answer.json()["choices"]
    assert {choice["index"]: choice["generation_token_ids"] for choice in whole} == {
        0: [1, 107],
        1: [1, 108],
        2: [2, 107],
        3: [2, 108],
    }
    assert [request.seed for request in engine.asked] == [7, 8, 7, 8, None, None]


TURN = "\n<think>hm €</think>\nTwo: é🙂 and so on. "
CALLS = call("bash", command="ls") + call("bash", command="ls 🙂")
ASKED = [
    (COMPLETIONS, {"prompt": [1], "max_tokens": 400}, "text"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 400, "logprobs": 2}, "text"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 400, "stop": ["🙂", "no"]}, "text"),
    (CHAT, {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 2}, "chat"),
    (CHAT, {"messages": HELLO, "max_tokens": 20}, "chat"),
    (CHAT, {"messages": HELLO, "stop": ["s 🙂"], "parallel_tool_calls": False}, "chat"),
]


def put_together(stream: list[dict[str, Any]], kind: str) -> dict[int, dict[str, Any]]:
    """The choices of a streamed reply as the whole would hold them."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for event in stream for choice in event["choices"]):
        made = found.setdefault(choice["index"], {"text": "", "reasoning": "", "roles": [], "logprobs": []})
        said = choice["delta"] if kind == "chat" else {"content": choice["text"]}
        made["text"] += said.get("content", "")
        made["reasoning"] += said.get("reasoning_content", "")
        made["roles"] += [said["role"]] if "role" in said else []
        made["calls"] = [one["function"] for one in said.get("tool_calls", [])]
        made["logprobs"] += log_probs(choice)
        made["reason"] = choice["finish_reason"]
    return found


def log_probs(choice: dict[str, Any]) -> list[Any]:
    given = choice.get("logprobs") or {}
    if "content" in given:
        return list(given["content"])
    names = ("tokens", "token_logprobs", "top_logprobs")
    return list(zip(*(given.get(name) or [] for name in names), strict=True))


def as_whole(choice: dict[str, Any], kind: str) -> dict[str, Any]:
    said = choice["message"] if kind == "chat" else {"content": choice["text"]}
    return {
        "text": said["content"],
        "reasoning": said.get("reasoning_content", ""),
        "roles": ["assistant"] if kind == "chat" else [],
        "calls": [one["function"] for one in said.get("tool_calls", [])],
        "logprobs": log_probs(choice),
        "reason": choice["finish_reason"],
    }


@pytest.mark.parametrize("turn", [TURN, TURN + CALLS], ids=["text", "calls"])
@pytest.mark.parametrize(("path", "body", "kind"), ASKED)
def test_a_streamed_reply_is_the_same_reply(
    obedient: tuple[Scripted, str], path: str, body: dict[str, Any], kind: str, turn: str
) -> None:
    engine, url = obedient
    engine.replies = [lambda request: [*written(BYTES, turn), USER, 1]]
    whole = post(url, body, path).json()
    streamed = post(url, {**body, "stream": True, "stream_options": {"include_usage": True}}, path)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(streamed.text)
    expected = {choice["index"]: as_whole(choice, kind) for choice in whole["choices"]}
    assert put_together(chunks, kind) == expected
    assert expected[0]["text"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {event["id"] for event in [*chunks, last]} == {last["id"]}
    assert not any("usage" in event for event in chunks)


def test_usage_is_streamed_only_where_it_is_asked_for(texts: str) -> None:
    stream = events(post(texts, {**ASK, "stream": True}).text)
    assert all(event["choices"] and "usage" not in event for event in stream)


def test_new_weights_are_handed_to_the_engine() -> None:
    engine = scripted(refit=RefitReply(policy_epoch=9, seconds=1.5))
    with serving(engine) as url:
        reply = post(url, {"weights": "/new", "policy_epoch": 9, "in_flight": "finish"}, REFIT)
        refused(post(url, {"policy_epoch": 9}, REFIT), 400, "weights")
        refused(post(url, {"weights": "/new", "in_flight": "drop"}, REFIT), 400, "in_flight")
        refused(post(url, {"weights": "/new", "layers": 3}, REFIT), 400, "layers")
        refused(get(url, REFIT), 405)
    assert reply.json() == {"policy_epoch": 9, "seconds": 1.5}
    [asked] = engine.refits
    assert (asked.weights, asked.policy_epoch, asked.in_flight) == ("/new", 9, "finish")


@pytest.mark.parametrize(("error", "status"), [(RefitRefused("no such folder"), 409), (EngineStopped("gone"), 503)])
def test_weights_that_are_not_taken_are_told_so(error: Exception, status: int) -> None:
    with serving(scripted(refit=error)) as url:
        refused(post(url, {"weights": "/new"}, REFIT), status, str(error))


def test_the_model_is_described() -> None:
    with serving(scripted(policy_epoch=4), name="mine", max_sequence_length=77) as url:
        [model] = get(url, MODELS).json()["data"]
    assert model == {
        "id": "mine",
        "object": "model",
        "created": 0,
        "owned_by": "megatron_klong",
        "max_model_len": 77,
        "vocab_size": SIZE,
        "policy_epoch": 4,
        "exact_tokens": True,
        "tokenizer": None,
    }


def test_a_server_whose_engine_has_ended_is_not_healthy() -> None:
    engine = scripted()
    with serving(engine) as url:
        assert get(url, HEALTH).json() == {"status": "ok", "in_flight": 0}
        engine.failure = RuntimeError("out of memory")
        refused(get(url, HEALTH), 503, "out of memory")
