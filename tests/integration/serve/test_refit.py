"""New weights in a running server: requests in flight, requests that wait, and weights that cannot be taken."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_klong.model import load_megatron
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.conversion.import_checkpoint import import_checkpoint
from megatron_klong.serve.protocol import CompletionRequest, RefitRefused, RefitRequest
from tests.integration.serve.in_process import sample, sampling
from tests.integration.serve.served import (
    TOLERANCE,
    Server,
    complete,
    greedy,
    log_probabilities,
    prompts,
)


@pytest.fixture(autouse=True)
def restored(server: Server, weights: Path) -> Iterator[None]:
    """The server is that of other tests too: it has `weights` again afterwards."""
    before = epoch(server)
    yield
    if epoch(server) != before:
        assert refit(server, weights).status_code == 200


def refit(server: Server, weights: Path | str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/refit", json={"weights": str(weights), **fields}, timeout=60)


def epoch(server: Server) -> int:
    return int(httpx.get(f"{server.url}/v1/models").json()["data"][0]["policy_epoch"])


def test_requests_in_flight_go_on_under_the_new_weights(
    server: Server, weights: Path, other_weights: Path, reference: torch.nn.Module, other_reference: torch.nn.Module
) -> None:
    before = epoch(server)
    # more than can be sampled at once, and the first of them long enough to meet the refit
    requests = [
        CompletionRequest(prompt_token_ids=prompt, max_tokens=300, seed=number)
        for number, prompt in enumerate(prompts(5, 40, 90, 120, 33, 60))
    ]
    answers: list[httpx.Response] = []

    def change() -> None:
        time.sleep(0.4)
        answers.append(refit(server, other_weights))

    thread = threading.Thread(target=change)
    thread.start()
    completions = complete(server, requests)
    thread.join()
    [answer] = answers
    assert answer.status_code == 200, answer.text
    assert answer.json()["policy_epoch"] == epoch(server) == before + 1
    assert answer.json()["seconds"] < 5
    crossed = 0
    for request, completion in zip(requests, completions, strict=True):
        prompt, ids = len(request.prompt_token_ids), len(completion.generation_token_ids)
        assert ids == 300
        boundary = prompt + ids
        if len(completion.policy_epoch) == 2:
            (start, first), (boundary, second) = completion.policy_epoch
            assert (start, first, second) == (0, before, before + 1)
            assert prompt < boundary < prompt + ids
            crossed += 1
        elif completion.policy_epoch == ((0, before + 1),):
            boundary = prompt
        else:
            assert completion.policy_epoch == ((0, before),)
        # each token has the log-probability that the weights of its epoch give it, to the token
        own = torch.tensor(completion.generation_log_probs)
        sampled_before = boundary - prompt
        for model, part in ((reference, slice(0, sampled_before)), (other_reference, slice(sampled_before, ids))):
            torch.testing.assert_close(own[part], log_probabilities(model, completion)[part], atol=TOLERANCE, rtol=0)
    assert crossed >= 1


def test_or_are_waited_for(server: Server, weights: Path, other_weights: Path) -> None:
    before = epoch(server)
    found: list[Any] = []
    request = CompletionRequest(prompt_token_ids=(1, 2, 3), max_tokens=400)
    thread = threading.Thread(target=lambda: found.extend(complete(server, [request])))
    thread.start()
    time.sleep(0.5)
    assert refit(server, other_weights, in_flight="finish", policy_epoch=before + 10).status_code == 200
    thread.join()
    assert found[0].policy_epoch == ((0, before),)
    assert complete(server, [request])[0].policy_epoch == ((0, before + 10),)


def test_nothing_that_old_weights_read_is_found_again(
    server: Server, weights: Path, other_weights: Path, other_reference: torch.nn.Module
) -> None:
    [prompt] = prompts(150, seed=9)
    request = CompletionRequest(prompt_token_ids=prompt, max_tokens=20, temperature=0.0)
    complete(server, [request])
    assert complete(server, [request])[0].cached_tokens > 100
    assert refit(server, other_weights).status_code == 200
    [completion] = complete(server, [request])
    assert completion.cached_tokens == 0
    assert list(completion.generation_token_ids) == greedy(other_reference, prompt, 20)
    assert complete(server, [request])[0].cached_tokens > 100


def broken(weights: Path, folder: Path, how: str) -> Path:
    shutil.copytree(weights, folder)
    file = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    match how:
        case "missing":
            shutil.rmtree(folder)
        case "truncated":
            file.write_bytes(file.read_bytes()[:-1000])
        case "not finite":
            tensors = load_file(file)
            tensors["lm_head.weight"][3, 3] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
        case "a tensor short":
            tensors = load_file(file)
            del tensors["lm_head.weight"]
            save_file(tensors, file, metadata={"format": "pt"})
        case "no configuration":
            (folder / "config.json").write_text("[]")
        case "another model":
            (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    return folder


@pytest.mark.parametrize(
    "how", ["missing", "truncated", "not finite", "a tensor short", "another model", "no configuration"]
)
def test_weights_that_cannot_be_taken_change_nothing(
    server: Server, other_weights: Path, reference: torch.nn.Module, tmp_path: Path, how: str
) -> None:
    before = epoch(server)
    answer = refit(server, broken(other_weights, tmp_path / "broken", how))
    assert answer.status_code == 409
    assert f"policy {before} is served on" in answer.json()["error"]["message"]
    assert epoch(server) == before
    [prompt] = prompts(60, seed=4)
    [completion] = complete(server, [CompletionRequest(prompt_token_ids=prompt, max_tokens=12, temperature=0.0)])
    assert list(completion.generation_token_ids) == greedy(reference, prompt, 12)


@pytest.mark.parametrize(
    ("fields", "named", "status"),
    [
        ({"policy_epoch": 0}, "not above", 409),
        ({"in_flight": "drop"}, "in_flight", 400),
        ({"weight": "x"}, "weight", 400),
    ],
)
def test_a_refit_that_makes_no_sense_is_refused(
    server: Server, other_weights: Path, fields: dict[str, Any], named: str, status: int
) -> None:
    answer = refit(server, other_weights, **fields)
    assert answer.status_code == status
    assert named in answer.json()["error"]["message"]


def test_a_policy_that_is_too_old_is_refused(server: Server) -> None:
    now = epoch(server)
    body = {"prompt": [1], "max_tokens": 1, "policy_epoch_at_least": now + 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 409
    assert f"policy {now} is served" in answer.json()["error"]["message"]


def test_a_checkpoint_that_is_deleted_while_it_is_read_changes_nothing(
    weights: Path, other_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a trainer that keeps its newest few does it."""
    import_checkpoint(other_weights, tmp_path / "checkpoint", LayoutConfig(), processes=1)
    verify = load_megatron.verify_together

    def verified_then_deleted(*arguments: Any, **named: Any) -> None:
        verify(*arguments, **named)
        for file in (tmp_path / "checkpoint").glob("*.distcp"):
            file.unlink()

    monkeypatch.setattr(load_megatron, "verify_together", verified_then_deleted)
    request = CompletionRequest(prompt_token_ids=(1, 2, 3), max_tokens=8, temperature=0.0)
    with sampling(weights) as engine:
        before = sample(engine, [request])
        with pytest.raises(RefitRefused, match=r"policy 0 is served on: .*No such file"):
            asyncio.run(engine.refit(RefitRequest(weights=str(tmp_path / "checkpoint"))))
        assert [one.generation_token_ids for one in sample(engine, [request])] == [before[0].generation_token_ids]


def test_on_several_ranks_all_take_them_or_none(on_ranks: Mapping[str, Any]) -> None:
    """refit_on_ranks.py has checked it, in the same two processes that answered for the layouts."""
    assert on_ranks


def test_a_checkpoint_of_any_layout_is_served(
    weights: Path, other_weights: Path, other_reference: torch.nn.Module, tmp_path: Path
) -> None:
    import_checkpoint(other_weights, tmp_path / "checkpoint", LayoutConfig(expert_parallel=2), processes=1)
    [prompt] = prompts(40)
    request = CompletionRequest(prompt_token_ids=prompt, max_tokens=16, temperature=0.0)
    with sampling(weights) as engine:
        asyncio.run(engine.refit(RefitRequest(weights=str(tmp_path / "checkpoint"))))
        [refitted] = sample(engine, [request])
    assert list(refitted.generation_token_ids) == greedy(other_reference, prompt, 16)
    with sampling(tmp_path / "checkpoint") as engine:
        assert sample(engine, [request]) == [
            refitted.model_copy(update={"policy_epoch": ((0, 0),), "kv_cache_epoch": ((0, 0),)})
        ]
