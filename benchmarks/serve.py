"""The server against transformers' `generate` with its cache, on the same weights and requests.

Sixteen clients with prompts and replies of mixed lengths, each asking again when it has its reply; greedy, and the
replies are compared, so that both sides do the same work. The sides take turns; a ratio is the median over the rounds.
On a CPU each side has the number of threads with which it is fastest, tried out before.

    over_transformers_as_they_come   tokens a second over HTTP / of `generate` request by request, as they come in
    over_transformers_static         / of `generate` on static batches of sixteen, padded to the longest of each
    turn50_prefill_over_bound        tokens that turn 50 of an episode reads / the previous reply, what is new, and a
                                     block of the cache, at the default block size
    after_refit_reused               share of a prompt, just read, that is found in the cache after new weights: none
    refit_seconds                    how long nothing is sampled while the weights are replaced

The last line is JSON. With a GPU also `tokens_per_second` at 1, 16, 64 and 256 requests at once.
"""

import argparse
import asyncio
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch  # noqa: E402

from megatron_klong.model.config import ModelConfig  # noqa: E402
from megatron_klong.model.conversion.random_weights import write_random_weights  # noqa: E402
from megatron_klong.model.presets import tiny  # noqa: E402
from megatron_klong.serve.client import Client  # noqa: E402
from megatron_klong.serve.config import EngineConfig  # noqa: E402
from megatron_klong.serve.launch import Server, serving  # noqa: E402
from megatron_klong.serve.protocol import Completion, CompletionRequest, RefitRequest  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402

NAME = "serve"
SIDES = ("ours", "as_they_come", "static")
CLIENTS = 16
TURNS = 50
VOCABULARY = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What each client asks, one request after the other."""

    clients: Sequence[Sequence[CompletionRequest]]

    @property
    def tokens(self) -> int:
        return sum(request.max_tokens for client in self.clients for request in client)


def main() -> int:
    options = parser().parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        write_random_weights(weights, shape(options.scale), seed=1, precision="bf16" if on_gpu() else "fp32")
        engine = EngineConfig(
            precision="bf16" if on_gpu() else "fp32",
            max_sequence_length=8192,
            max_requests=256 if on_gpu() else 64,
            kv_cache_gib=20 if on_gpu() else 0.5,
        )
        theirs = load(weights)
        threads = dict.fromkeys(SIDES, 0) if on_gpu() else best_threads(theirs, weights, engine)
        with server_of(weights, engine, threads["ours"]) as server:
            figures = asyncio.run(measured(server.url, weights, theirs, threads, options, engine))
    ratios = {name: round(value, 4) for name, value in figures.items()}
    versions = {name: version(name) for name in ("megatron-core", "torch", "transformers")}
    print("\n".join(aligned([["figure", "value"], *([name, f"{value:.3f}"] for name, value in ratios.items())])))
    print(
        json.dumps(
            {
                "benchmark": NAME,
                "ratios": ratios,
                "threads": threads,
                "versions": versions | {"python": platform.python_version()},
            }
        )
    )
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--requests", type=int, default=3, help="of each client in a round")
    made.add_argument("--scale", type=int, default=2, help="of the tiny model's width and number of experts")
    return made


def best_threads(theirs: Any, weights: Path, engine: EngineConfig) -> dict[str, int]:
    """Of each side, by the seconds it takes for the same few requests; the first of them are for warming up."""
    seconds: dict[str, dict[int, float]] = {side: defaultdict(float) for side in SIDES}
    for threads in {1, os.cpu_count() or 1}:
        with server_of(weights, engine, threads) as server:
            for number in range(3):
                work = make_work(1000 + number, 1)
                use(threads)
                tried = {
                    "ours": asyncio.run(asked_once(server.url, work)),
                    "as_they_come": timed(partial(in_turn, theirs, work))[1],
                    "static": timed(partial(in_batches, theirs, work))[1],
                }
                for side, value in tried.items():
                    seconds[side][threads] += value if number else 0
    print("seconds by threads:", {side: {n: round(s, 2) for n, s in tried.items()} for side, tried in seconds.items()})
    return {side: min(tried, key=tried.__getitem__) for side, tried in seconds.items()}


async def asked_once(url: str, work: Work) -> float:
    async with Client(url) as client:
        started = time.perf_counter()
        await asyncio.gather(*(ask(client, requests) for requests in work.clients))
        return time.perf_counter() - started


@contextmanager
def server_of(weights: Path, engine: EngineConfig, threads: int) -> Iterator[Server]:
    """threads: 0: as `serving` decides."""
    before = os.environ.get("OMP_NUM_THREADS")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with serving(weights, engine, weights.parent / "server.txt") as server:
            yield server
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


async def measured(
    url: str,
    weights: Path,
    theirs: Any,
    threads: Mapping[str, int],
    options: argparse.Namespace,
    engine: EngineConfig,
) -> dict[str, float]:
    async with Client(url) as client:
        figures = await compared(client, theirs, threads, options)
        figures |= await cached(client, weights, engine)
        if on_gpu():
            figures |= {f"tokens_per_second_{n}": await throughput(client, n) for n in (1, 16, 64, 256)}
    return figures


async def compared(
    client: Client, theirs: Any, threads: Mapping[str, int], options: argparse.Namespace
) -> dict[str, float]:
    """Tokens a second of the three, by rounds."""
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(options.rounds + 1):
        work = make_work(number, options.requests)
        started = time.perf_counter()
        ours = await asyncio.gather(*(ask(client, requests) for requests in work.clients))
        seconds = {"ours": time.perf_counter() - started}
        use(threads["as_they_come"])
        one_by_one, seconds["as_they_come"] = timed(partial(in_turn, theirs, work))
        use(threads["static"])
        batched, seconds["static"] = timed(partial(in_batches, theirs, work))
        for found, wanted, padded in zip(ours, one_by_one, batched, strict=True):
            replies = [list(reply.generation_token_ids) for reply in found]
            if not replies == wanted == padded:
                raise AssertionError("the sides do not sample the same ids")
        if number:  # the first is for warming up
            for side, value in seconds.items():
                speeds[side].append(work.tokens / value)
    print("tokens a second:", {side: round(statistics.median(values), 1) for side, values in speeds.items()})
    return {
        f"over_transformers_{side}": statistics.median(
            [a / b for a, b in zip(speeds["ours"], speeds[side], strict=True)]
        )
        for side in ("as_they_come", "static")
    }


async def cached(client: Client, weights: Path, engine: EngineConfig) -> dict[str, float]:
    """What an episode's fiftieth turn reads, and what a refit leaves of the cache."""
    chosen = random.Random(0)
    prompt = ids(chosen, 1000)
    read = bound = 0
    reply: Completion | None = None
    for _ in range(TURNS):
        new = ids(chosen, chosen.randint(20, 150))
        previous = reply.generation_token_ids if reply else ()
        prompt = (*prompt, *previous, *new)
        reply = await client.complete(CompletionRequest(prompt_token_ids=prompt, max_tokens=chosen.randint(10, 60)))
        read, bound = len(prompt) - reply.cached_tokens, len(previous) + len(new) + engine.block_tokens
    seconds = [(await client.refit(RefitRequest(weights=str(weights)))).seconds for _ in range(3)]
    again = await client.complete(CompletionRequest(prompt_token_ids=prompt, max_tokens=1))
    return {
        "turn50_prefill_over_bound": read / bound,
        "after_refit_reused": again.cached_tokens / len(prompt),
        "refit_seconds": statistics.median(seconds),
    }


async def throughput(client: Client, at_once: int) -> float:
    chosen = random.Random(at_once)
    requests = [CompletionRequest(prompt_token_ids=ids(chosen, 512), max_tokens=256) for _ in range(at_once)]
    started = time.perf_counter()
    await asyncio.gather(*(client.complete(request) for request in requests))
    return sum(request.max_tokens for request in requests) / (time.perf_counter() - started)


async def ask(client: Client, requests: Sequence[CompletionRequest]) -> list[Completion]:
    return [await client.complete(request) for request in requests]


def make_work(number: int, requests: int) -> Work:
    """Other prompts in each round, so that nothing is found in the cache."""
    chosen = random.Random(number)

    def request() -> CompletionRequest:
        prompt = ids(chosen, round(16 * 2 ** chosen.uniform(0, 4.5)))
        return CompletionRequest(
            prompt_token_ids=prompt, max_tokens=round(8 * 2 ** chosen.uniform(0, 3.5)), temperature=0.0
        )

    return Work(clients=[[request() for _ in range(requests)] for _ in range(CLIENTS)])


def ids(chosen: random.Random, count: int) -> tuple[int, ...]:
    return tuple(chosen.randrange(VOCABULARY) for _ in range(count))


def in_turn(model: Any, work: Work) -> list[list[list[int]]]:
    return [[generate(model, [request])[0] for request in requests] for requests in work.clients]


def in_batches(model: Any, work: Work) -> list[list[list[int]]]:
    """Batch n holds every client's n-th request."""
    batches = [generate(model, batch) for batch in zip(*work.clients, strict=True)]
    return [list(client) for client in zip(*batches, strict=True)]


@torch.inference_mode()
def generate(model: Any, requests: Sequence[CompletionRequest]) -> list[list[int]]:
    """Padded on the left to the longest prompt; as many tokens for all as the longest reply has."""
    longest = max(len(request.prompt_token_ids) for request in requests)
    rows = [[0] * (longest - len(request.prompt_token_ids)) + list(request.prompt_token_ids) for request in requests]
    mask = [
        [0] * (longest - len(request.prompt_token_ids)) + [1] * len(request.prompt_token_ids) for request in requests
    ]
    tokens = torch.tensor(rows, device=model.device)
    made = model.generate(
        tokens,
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(request.max_tokens for request in requests),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [row[longest : longest + request.max_tokens].tolist() for row, request in zip(made, requests, strict=True)]


def use(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)


def timed[Result](work: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def shape(scale: int) -> ModelConfig:
    return tiny(VOCABULARY, scale=scale)


def load(weights: Path) -> Any:
    from transformers import Glm4MoeForCausalLM

    model = Glm4MoeForCausalLM.from_pretrained(weights).eval()
    return model.cuda() if on_gpu() else model


def on_gpu() -> bool:
    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
