"""What Megatron's engine lacks and a server of policies needs, on the real engine: ends, deadlines, seeds, routes."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.hugging_face import save_hugging_face
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.model.presets import tiny
from megatron_klong.serve.client import Client, ServerError
from megatron_klong.serve.protocol import CompletionRequest, ProtocolError
from megatron_klong.trajectory.tokenizer import Tokenizer
from tests.conftest import REPOSITORY
from tests.integration.serve.conftest import LONGEST, SLOTS
from tests.integration.serve.in_process import sample, sampling
from tests.integration.serve.served import (
    LIMIT,
    VOCABULARY,
    Server,
    assert_log_probabilities,
    assert_routes,
    complete,
    prompts,
    serving,
)


def running(server: Server) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    names = ("klong_engine_running", "klong_engine_waiting", "klong_engine_blocks_used")
    return sum(float(line.split()[1]) for line in lines if line.startswith(names) and "blocks{" not in line)


def wait_until_nothing_runs(server: Server, seconds: float = 5.0) -> None:
    """The engine counts once a second while it works."""
    ends = time.monotonic() + seconds
    while running(server) and time.monotonic() < ends:
        time.sleep(0.05)
    assert running(server) == 0


def test_who_leaves_frees_the_place(server: Server) -> None:
    """Waited for, streamed, in the middle of a long prompt, and still waiting: all places are free at once."""

    async def leave() -> None:
        async with Client(server.url) as client, anyio.create_task_group() as group:
            for prompt in prompts(3, 1000, 1500, 40, 50, 60, 70, 80):
                group.start_soon(client.complete, CompletionRequest(prompt_token_ids=prompt, max_tokens=500))
            await anyio.sleep(0.7)
            group.cancel_scope.cancel()

    anyio.run(leave)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={"prompt": [1], "max_tokens": 1500, "stream": True}
    ) as response:
        assert response.status_code == 200
        next(response.iter_lines())
    wait_until_nothing_runs(server)
    started = time.monotonic()
    complete(server, [CompletionRequest(prompt_token_ids=(5,), max_tokens=2)] * SLOTS)
    assert time.monotonic() - started < 5


def test_a_deadline_ends_a_reply_with_what_it_has(server: Server, reference: torch.nn.Module) -> None:
    request = CompletionRequest(prompt_token_ids=(1, 2, 3), max_tokens=1900, deadline_seconds=1.0)
    [completion] = complete(server, [request])
    assert completion.finish_reason == "deadline"
    assert 1 <= len(completion.generation_token_ids) < 1900
    assert_log_probabilities(reference, completion)
    with pytest.raises(ExceptionGroup) as caught:
        complete(server, [request.model_copy(update={"deadline_seconds": 1e-9})])
    [error] = caught.value.exceptions
    assert isinstance(error, ServerError)
    assert error.status == 504
    wait_until_nothing_runs(server)


def test_a_seed_gives_the_same_reply_whatever_else_is_going_on(server: Server) -> None:
    [prompt] = prompts(40, seed=3)
    seeded = CompletionRequest(prompt_token_ids=prompt, max_tokens=40, temperature=0.9, top_k=50, top_p=0.9, seed=17)
    [alone] = complete(server, [seeded])
    others = [CompletionRequest(prompt_token_ids=other, max_tokens=60) for other in prompts(5, 90, 300, 17, 33)]
    crowded = complete(server, [*others, seeded, *others])[len(others)]
    assert crowded.generation_token_ids == alone.generation_token_ids
    assert crowded.generation_log_probs == pytest.approx(alone.generation_log_probs, abs=1e-4)
    [another] = complete(server, [seeded.model_copy(update={"seed": 18})])
    assert another.generation_token_ids != alone.generation_token_ids


def test_strings_end_a_reply_at_the_token_that_completes_them(
    server: Server, tokenizer: Tokenizer, reference: torch.nn.Module
) -> None:
    request = CompletionRequest(prompt_token_ids=(40, 41, 42), max_tokens=200, seed=1)
    [free] = complete(server, [request])
    printable = [
        place
        for place, token in enumerate(free.generation_token_ids)
        if token < tokenizer.vocabulary_size and tokenizer.decode([token]).isascii()
    ]
    text = tokenizer.decode([free.generation_token_ids[printable[3]]])
    first = next(place for place in printable if text in tokenizer.decode([free.generation_token_ids[place]]))
    [stopped] = complete(server, [request.model_copy(update={"stop": (text,)})])
    assert stopped.finish_reason == "stop"
    assert stopped.generation_token_ids == free.generation_token_ids[: first + 1]
    assert_log_probabilities(reference, stopped)
    body = {**request.model_copy(update={"stop": (text,)}).to_wire()}
    shown = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
    assert text not in shown
    wait_until_nothing_runs(server)


def test_the_likeliest_are_told_with_each_token(server: Server, reference: torch.nn.Module) -> None:
    [prompt] = prompts(150, seed=2)  # read in several parts
    body = {"prompt": list(prompt), "max_tokens": 5, "logprobs": 3, "temperature": 1.0, "seed": 4}
    choice = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]
    ids = torch.tensor([[*prompt, *choice["generation_token_ids"]]])
    with torch.no_grad():
        expected = torch.log_softmax(reference(ids).logits[0, len(prompt) - 1 : -1], -1).topk(3).values
    found = torch.tensor([sorted(one.values(), reverse=True) for one in choice["logprobs"]["top_logprobs"]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_routes_are_those_the_model_takes(server: Server, reference: torch.nn.Module) -> None:
    """Also where the prompt was found in the cache."""
    [prompt] = prompts(60, seed=6)
    request = CompletionRequest(prompt_token_ids=prompt, max_tokens=10, seed=2, routes=True)
    first, again = (complete(server, [request])[0] for _ in range(2))
    assert again.cached_tokens > 0
    assert_routes(reference, first)
    assert_routes(reference, again)
    assert complete(server, [request.model_copy(update={"routes": False})])[0].moe_topk_indices is None


def test_a_layer_for_multi_token_prediction_takes_none(tmp_path: Path) -> None:
    """As the published weights have one. One engine after the other in a process: each records its own."""
    config = tiny(VOCABULARY).model_copy(update={"num_nextn_predict_layers": 1})
    initialize(LayoutConfig(), seed=0)
    save_hugging_face([build_model(config, LayoutConfig())], config, tmp_path)
    destroy()
    request = CompletionRequest(prompt_token_ids=(1, 2, 3), max_tokens=4, routes=True, temperature=0.0)
    found = []
    for _ in range(2):
        with sampling(tmp_path, routes=True) as engine:
            found += sample(engine, [request])
    assert found[0] == found[1]
    shape = {(len(token), *map(len, token)) for token in found[0].moe_topk_indices or ()}
    layers = config.num_hidden_layers - config.first_k_dense_replace
    assert shape == {(layers, *[config.num_experts_per_tok] * layers)}


def test_what_is_too_long_is_refused_without_a_front_too(weights: Path) -> None:
    request = CompletionRequest(prompt_token_ids=(1,) * LIMIT, max_tokens=1)
    with (
        sampling(weights) as engine,
        pytest.raises(ProtocolError, match=f"above the maximum context length of {LIMIT}"),
    ):
        sample(engine, [request])


@pytest.mark.parametrize("killed", ["the server", pytest.param("another rank", marks=pytest.mark.long)])
def test_when_a_process_is_killed_callers_are_told_and_nothing_is_left(weights: Path, killed: str) -> None:
    with serving(weights, "--layout.tensor_parallel", "2", processes=2, limit=LONGEST) as server:
        ranks = [
            one
            for one in server.processes()
            if "megatron_klong.serve" in one.cmdline() and one.pid != server.process.pid
        ]
        leads = next(
            one
            for one in ranks
            if any(c.status == "LISTEN" and c.laddr.port == port(server) for c in one.net_connections())
        )
        victim = leads if killed == "the server" else next(one for one in ranks if one.pid != leads.pid)
        errors: list[Exception] = []

        async def ask() -> None:
            async with Client(server.url) as client, anyio.create_task_group() as group:

                async def one() -> None:
                    try:
                        await client.complete(CompletionRequest(prompt_token_ids=(1,), max_tokens=2000))
                    except ServerError as error:
                        errors.append(error)

                for _ in range(3):
                    group.start_soon(one)
                await anyio.sleep(1)
                victim.kill()

        anyio.run(ask)
        assert len(errors) == 3
        assert server.process.wait(timeout=60) != 0
        for one in ranks:
            one.wait(timeout=30)


def port(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


@pytest.mark.long
def test_clients_that_behave_badly() -> None:
    """A minute of benchmarks/serve_soak.py; `make evidence` runs it for ten."""
    options = ["--seconds", "60", "--refit-seconds", "10", "--checked", "240"]
    made = subprocess.run(
        [sys.executable, "benchmarks/serve_soak.py", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    assert found["counts"]["refits"] >= 2  # fewer on a busy machine, where every third waits for what is in flight
    assert found["counts"]["replies"] > 50
