"""A real server with a tiny random model: what it samples, and with which log-probability, transformers agrees with."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import psutil
import pytest
import torch
from inspect_ai.model import ChatMessage, ChatMessageUser, GenerateConfig, get_model
from pydantic_core import from_json

from megatron_klong.serve import launch
from megatron_klong.serve.client import Client, ServerError
from megatron_klong.serve.config import EngineConfig
from megatron_klong.serve.protocol import CompletionRequest, sha256_of_ids
from megatron_klong.serve.provider import KlongAPI
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Message, Role
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.conftest import REPOSITORY
from tests.integration.serve.served import (
    LIMIT,
    VOCABULARY,
    Server,
    assert_log_probabilities,
    complete,
    greedy,
    log_probabilities,
    prompts,
    serving,
)

ASSISTANT = Message(role=Role.ASSISTANT)


@pytest.fixture(scope="module")
def server(weights: Path) -> Iterator[Server]:
    # prompts are read in several steps, and the cache is too small for all the requests of a test at once
    options = ["--step_tokens", "64", "--kv_cache_gib", "0.0015", "--policy_epoch", "5", "--max_requests", "16"]
    with serving(weights, *options) as running:
        yield running


def test_greedy_ids_are_those_of_transformers(server: Server, reference: torch.nn.Module) -> None:
    requests = [
        CompletionRequest(prompt_token_ids=prompt, max_tokens=24, temperature=0.0) for prompt in prompts(1, 9, 70, 150)
    ]
    for request, completion in zip(requests, complete(server, requests), strict=True):
        assert list(completion.generation_token_ids) == greedy(reference, request.prompt_token_ids, 24)
        assert completion.finish_reason == "length"
        assert completion.policy_epoch == ((0, 5),)
        # nothing was drawn: those of the model as it is
        assert_log_probabilities(reference, completion)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_many_requests_at_once_have_exact_log_probabilities(
    server: Server, reference: torch.nn.Module, temperature: float
) -> None:
    stop = (3, 5, 8, 13)
    requests = [
        CompletionRequest(prompt_token_ids=prompt, max_tokens=most, temperature=temperature, stop_token_ids=stop)
        for prompt, most in zip(prompts(*range(2, 122, 5)), [1, 8, 40, 60] * 6, strict=True)
    ]
    completions = complete(server, requests)
    for request, completion in zip(requests, completions, strict=True):
        assert_log_probabilities(reference, completion, temperature)
        ids = completion.generation_token_ids
        assert not set(ids[:-1]) & set(stop)
        if completion.finish_reason == "stop":
            assert ids[-1] in stop
        else:
            assert len(ids) == request.max_tokens
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_log_probabilities_are_of_what_the_filters_leave(server: Server, reference: torch.nn.Module) -> None:
    [prompt] = prompts(12)
    requests = [
        CompletionRequest(prompt_token_ids=prompt, max_tokens=20, top_k=3),
        CompletionRequest(prompt_token_ids=prompt, max_tokens=20, top_p=0.1),
    ]
    for completion in complete(server, requests):
        unfiltered = log_probabilities(reference, completion, 1.0)
        filtered = torch.tensor(completion.generation_log_probs)
        assert (filtered > unfiltered).all()
        assert (filtered <= 0).all()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('{"prompt": [1, 320], "max_tokens": 1}', "token id 320 at place 1"),
        ('{"prompt": [-1], "max_tokens": 1}', "token id -1"),
        ('{"prompt": [1, 2], "max_tokens": 500}', "2 tokens of prompt and max_tokens 500 are 502, above .* 192"),
        ('{"prompt": "text", "max_tokens": 1}', "prompt"),
        ('{"prompt": [1]', "delimiter"),
    ],
)
def test_what_cannot_be_done_is_refused_in_json(server: Server, body: str, named: str) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", content=body)
    assert reply.status_code == 400
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(reply.json()["error"]["message"])


def test_through_inspect_no_sampled_token_is_encoded_again(server: Server, tmp_path: Path) -> None:
    train_tokenizer(["some text to merge"] * 4, vocabulary_size=290, folder=tmp_path)
    settings = GenerateConfig(max_tokens=12, max_retries=2)
    model = get_model("klong/policy", base_url=server.url, tokenizer=str(tmp_path), memoize=False, config=settings)
    assert isinstance(model.api, KlongAPI)
    api = model.api
    renderer = GlmRenderer(load_tokenizer(tmp_path))
    answer = [s.ids for s in renderer.message(Message(role=Role.USER, content="go on"), ASSISTANT).segments]
    between = [*(identifier for ids in answer for identifier in ids), *renderer.header.ids]

    async def play() -> None:
        messages: list[ChatMessage] = [ChatMessageUser(content="begin")]
        prompt = from_json(api.prompt(messages, []).json)
        for _ in range(4):
            output = await model.generate(messages)
            turn = api.turns[output.message.id or ""]
            assert (turn.prompt_sha256, turn.prompt_tokens) == (sha256_of_ids(prompt), len(prompt))
            prompt += [*turn.body, *between]
            messages += [output.message, ChatMessageUser(content="go on")]
        await api.aclose()

    anyio.run(play)
    assert len(api.turns) == 4


def test_models_and_health(server: Server) -> None:
    [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["max_model_len"], model["vocab_size"], model["policy_epoch"]) == (LIMIT, VOCABULARY, 5)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "in_flight": 0}
    assert httpx.get(f"{server.url}/nothing").json()["error"]["code"] == 404


def test_stopped_in_the_middle_of_a_request_it_leaves_nothing(weights: Path) -> None:
    with serving(weights, "--drain_seconds", "0") as running:
        started = psutil.Process(running.process.pid)
        failed: list[Exception] = []

        async def interrupted() -> None:
            async with Client(running.url) as client, anyio.create_task_group() as group:

                async def ask() -> None:
                    request = CompletionRequest(prompt_token_ids=(1,), max_tokens=LIMIT - 1)
                    try:
                        for _ in range(100):
                            await client.complete(request)
                    except ServerError as error:
                        failed.append(error)

                group.start_soon(ask)
                await anyio.sleep(1)
                running.process.send_signal(signal.SIGTERM)

        children = started.children(recursive=True)
        anyio.run(interrupted)
        assert running.process.wait(timeout=30) == 0
        assert failed
        assert running.process.stdout is not None
        assert running.process.stdout.read() == ""
        assert not [child for child in children if child.is_running()]


def test_started_beside_its_clients_it_takes_one_core(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with launch.serving(weights, EngineConfig(max_sequence_length=LIMIT), tmp_path / "server.txt") as server:
        assert psutil.Process(server.process.pid).environ()["OMP_NUM_THREADS"] == "1"


def test_a_port_in_use_and_missing_weights_are_said_in_one_line(weights: Path, server: Server, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    for options, named in (
        (["--weights", str(weights), "--port", port], "in use"),
        (["--weights", str(tmp_path)], "config.json"),
    ):
        made = subprocess.run(
            [sys.executable, "-m", "megatron_klong.serve", *options],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert made.returncode == 2
        assert named in made.stderr.strip().splitlines()[-1]
        assert made.stdout == ""
