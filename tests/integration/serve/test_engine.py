"""What Megatron's engine lacks and a server of policies needs, on the real engine: ends, deadlines, seeds, routes."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch

from megatron_klong.serve.client import Client, ServerError
from megatron_klong.serve.protocol import CompletionRequest
from megatron_klong.trajectory.tokenizer import Tokenizer
from tests.conftest import REPOSITORY
from tests.integration.model.launch import launch
from tests.integration.serve.served import VOCABULARY, Server, assert_log_probabilities, complete, prompts, serving

SCRIPT = Path(__file__).with_name("trainer_log_probs.py")
LONGEST = 2048
SLOTS = 4


@pytest.fixture(scope="module")
def server(weights: Path, tokenizer_folder: Path) -> Iterator[Server]:
    options = ["--block_tokens", "16", "--kv_cache_gib", "0.05", "--step_tokens", "64", "--routes", "true"]
    options += ["--max_requests", str(SLOTS), "--tokenizer", str(tokenizer_folder)]
    with serving(weights, *options, limit=LONGEST) as running:
        yield running


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


def test_a_run_with_the_same_requests_gives_the_same_replies(weights: Path) -> None:
    """Without seeds of their own they are sampled from the server's."""
    runs = []
    for seed in (5, 5, 6):
        with serving(weights, "--seed", str(seed), "--kv_cache_gib", "0.02") as server:
            one_by_one = [
                complete(server, [CompletionRequest(prompt_token_ids=p, max_tokens=20)]) for p in prompts(3, 9)
            ]
            runs.append([completion.generation_token_ids for [completion] in one_by_one])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0][:5] != runs[0][1][:5]


def test_frequencies_are_those_of_the_model(weights: Path, reference: torch.nn.Module) -> None:
    """20,000 draws of one next token, after temperature, top_k and top_p together."""
    [prompt] = prompts(20, seed=8)
    body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "n": 100}
    counts = torch.zeros(VOCABULARY)
    options = ["--max_requests", "128", "--block_tokens", "16", "--kv_cache_gib", "0.02"]
    with serving(weights, *options) as server, httpx.Client(timeout=60) as http:
        for _ in range(200):
            for choice in http.post(f"{server.url}/v1/completions", json=body).json()["choices"]:
                counts[choice["generation_token_ids"][0]] += 1
    with torch.no_grad():
        logits = reference(torch.tensor([list(prompt)])).logits[0, -1].double() / 0.8
    kept = logits.topk(20).indices
    share = logits[kept].softmax(-1)
    kept = kept[share.cumsum(-1) - share < 0.9]
    expected = logits[kept].softmax(-1) * counts.sum()
    assert counts.sum() == 20_000
    assert counts[kept].sum() == 20_000
    chi_squared = float(((counts[kept] - expected) ** 2 / expected).sum())
    assert chi_squared < len(kept) - 1 + 4 * (2 * (len(kept) - 1)) ** 0.5


def test_the_trainer_finds_the_same_log_probabilities(server: Server, weights: Path, tmp_path: Path) -> None:
    """For 10,000 sampled tokens, with the model as training builds and calls it: the mismatch that RL logs."""
    lengths = [3, 30, 90, 140, 500] * 5
    requests = [CompletionRequest(prompt_token_ids=prompt, max_tokens=400) for prompt in prompts(*lengths, seed=12)]
    completions = complete(server, requests)
    sampled, found = tmp_path / "sampled.json", tmp_path / "found.json"
    sampled.write_text(json.dumps([(one.prompt_token_ids, one.generation_token_ids) for one in completions]))
    launch(SCRIPT, str(weights), str(sampled), str(found), processes=1)
    trainer = torch.tensor([value for values in json.loads(found.read_text()) for value in values]).double()
    engine = torch.tensor([value for one in completions for value in one.generation_log_probs]).double()
    assert len(engine) == 10_000
    assert float((trainer - engine).abs().max()) < 1e-5
    assert float((trainer - engine).exp().mean()) == pytest.approx(1, abs=1e-4)


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


def test_routes_are_those_the_model_takes(server: Server, weights: Path) -> None:
    """For every token that was read, of each layer with experts; also where the prompt was found in the cache."""
    [prompt] = prompts(60, seed=6)
    request = CompletionRequest(prompt_token_ids=prompt, max_tokens=10, seed=2, routes=True)
    first, again = (complete(server, [request])[0] for _ in range(2))
    assert again.cached_tokens > 0
    config = json.loads((weights / "config.json").read_text())
    for completion in (first, again):
        routes = completion.moe_topk_indices
        assert routes is not None
        layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
        assert len(routes) == len(prompt) + len(completion.generation_token_ids) - 1
        assert {len(token) for token in routes} == {layers}
        assert {len(layer) for token in routes for layer in token} == {config["num_experts_per_tok"]}
        assert all(0 <= expert < config["n_routed_experts"] for token in routes for layer in token for expert in layer)
    assert [sorted(map(sorted, token)) for token in first.moe_topk_indices or ()] == [
        sorted(map(sorted, token)) for token in again.moe_topk_indices or ()
    ]
    assert complete(server, [request.model_copy(update={"routes": False})])[0].moe_topk_indices is None


@pytest.mark.parametrize("killed", ["the server", "another rank"])
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


def test_a_minute_of_clients_that_behave_badly() -> None:
    """benchmarks/serve_soak.py in short; `make evidence` runs it for ten minutes."""
    made = subprocess.run(
        [sys.executable, "benchmarks/serve_soak.py", "--seconds", "60", "--refit-seconds", "10", "--checked", "300"],
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
