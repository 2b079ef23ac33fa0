"""A server under clients that behave badly, for minutes, with new weights all the while: what must never happen.

Sixty-four clients send what comes to mind: requests that are waited for, streamed, given up in the middle, cut off in
the middle of their body, too long, not JSON, with ids the model does not have; and every so often the weights are
replaced by others and back. Counted is what may not be:

    wrong_replies      ids or log-probabilities short, epochs that do not rise or lie outside the reply, another prompt,
                       or a log-probability that the weights of the token's epoch do not give it (transformers is asked)
    lost_requests      neither a reply nor the refusal that was due
    memory_growth      the server's memory at the end / after a fifth of the time
    handles_growth     its open files at the end - after a fifth of the time, when nobody is connected

Exit status 1 if anything was wrong or lost, or if memory grew by more than a tenth or handles at all. The last line is
JSON.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import httpx  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from megatron_klong.model.conversion.random_weights import write_random_weights  # noqa: E402
from megatron_klong.model.presets import tiny  # noqa: E402
from megatron_klong.serve.client import Client, ServerError  # noqa: E402
from megatron_klong.serve.config import EngineConfig  # noqa: E402
from megatron_klong.serve.launch import Server, serving  # noqa: E402
from megatron_klong.serve.protocol import COMPLETIONS, Completion, CompletionRequest, ProtocolError, RefitRequest  # noqa: E402

NAME = "serve_soak"
CLIENTS = 64
LONGEST = 256
VOCABULARY = 320
TOLERANCE = 1e-3


@dataclass(kw_only=True)
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    replies: list[tuple[CompletionRequest, Completion]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)

    def fault(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {what}")


def main() -> int:
    options = parser().parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        weights = [Path(folder) / name for name in ("even", "odd")]
        for seed, place in enumerate(weights):
            write_random_weights(place, tiny(VOCABULARY), seed=seed)
        engine = EngineConfig(
            max_sequence_length=LONGEST, max_requests=16, max_waiting=40, kv_cache_gib=0.004, block_tokens=16
        )
        log = Path(folder) / "server.txt"
        with serving(weights[0], engine, log) as server:
            whole = False
            try:
                asyncio.run(soak(server, weights, options, tally))
                whole = not tally.faults
            finally:
                if not whole:
                    print(log.read_text()[-4000:], file=sys.stderr)
            server.check()
        checked = check_replies(tally, weights, options.checked)
    return report(tally, checked, options)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, default=600)
    made.add_argument("--refit-seconds", type=float, default=60, help="between two refits")
    made.add_argument("--checked", type=int, default=2000, help="replies that are compared with transformers, at most")
    return made


async def soak(server: Server, weights: list[Path], options: argparse.Namespace, tally: Tally) -> None:
    ends = time.monotonic() + options.seconds
    async with Client(server.url) as client:
        await client.complete(CompletionRequest(prompt_token_ids=(1,), max_tokens=1))
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(one_client(server, client, random.Random(number), ends, tally))
            group.create_task(refits(client, weights, options.refit_seconds, ends, tally))
            group.create_task(watch(server, options.seconds, ends, tally))
    await asyncio.sleep(1)
    measure(server, tally)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    if any(line.startswith("klong_in_flight ") and float(line.split()[1]) for line in lines):
        tally.fault("lost_requests", "the server says that there are still some in flight")


async def one_client(server: Server, client: Client, chosen: random.Random, ends: float, tally: Tally) -> None:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=120) as http:
        behaviours = (plain, plain, plain, plain, streamed, given_up, cut_off, too_long, nonsense)
        while time.monotonic() < ends:
            behaviour = chosen.choice(behaviours)
            tally.counts["requests"] += 1
            try:
                await behaviour(server, client, http, chosen, tally)
            except (ServerError, ProtocolError, httpx.HTTPError) as error:
                tally.fault("lost_requests", f"{behaviour.__name__}: {type(error).__name__}: {error}")


def request(chosen: random.Random) -> CompletionRequest:
    # beginnings that others have too, so that the cache is used
    beginning = random.Random(chosen.randrange(8)).choices(range(VOCABULARY), k=chosen.randint(1, 120))
    own = chosen.choices(range(VOCABULARY), k=chosen.randint(1, 20))
    return CompletionRequest(
        prompt_token_ids=(*beginning, *own),
        max_tokens=chosen.randint(1, 80),
        temperature=chosen.choice((0.0, 0.7, 1.0)),
        stop_token_ids=(7, 9),
        seed=chosen.choice((None, chosen.randrange(1000))),
    )


async def plain(server: Server, client: Client, http: httpx.AsyncClient, chosen: random.Random, tally: Tally) -> None:
    asked = request(chosen)
    while True:
        try:
            tally.replies.append((asked, await client.complete(asked)))
        except ServerError as error:
            if error.status != 429:
                raise
            tally.counts["429"] += 1
            await asyncio.sleep(error.retry_after or 1)
            continue
        tally.counts["replies"] += 1
        return


async def streamed(
    server: Server, client: Client, http: httpx.AsyncClient, chosen: random.Random, tally: Tally
) -> None:
    asked = request(chosen)
    chunks: list[dict[str, Any]] = []
    async with http.stream("POST", COMPLETIONS, json={**asked.to_wire(), "stream": True}) as response:
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            tally.counts["429"] += 1
            return
        if response.status_code != httpx.codes.OK:
            said = (await response.aread())[:200]
            tally.fault("lost_requests", f"streamed: answered with {response.status_code}: {said!r}")
            return
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
    if not chunks:
        tally.fault("lost_requests", "streamed: answered without a piece")
        return
    completion = Completion.from_wire(chunks[-1])
    pieces = [token for chunk in chunks[:-1] for token in chunk["choices"][0]["generation_token_ids"]]
    if tuple(pieces) != completion.generation_token_ids:
        tally.fault("wrong_replies", "the pieces of a stream are not the whole")
    tally.replies.append((asked, completion))
    tally.counts["streams"] += 1


async def given_up(
    server: Server, client: Client, http: httpx.AsyncClient, chosen: random.Random, tally: Tally
) -> None:
    try:
        async with asyncio.timeout(chosen.uniform(0.0, 0.5)):
            await client.complete(request(chosen))
    except (TimeoutError, ServerError):
        tally.counts["given up"] += 1


async def cut_off(server: Server, client: Client, http: httpx.AsyncClient, chosen: random.Random, tally: Tally) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(request(chosen).to_wire()).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    writer.write(head + body[: chosen.randint(0, len(body))])
    await writer.drain()
    await asyncio.sleep(chosen.uniform(0, 0.2))
    writer.close()
    tally.counts["cut off"] += 1


async def too_long(
    server: Server, client: Client, http: httpx.AsyncClient, chosen: random.Random, tally: Tally
) -> None:
    await refused(http, {"prompt": [1] * chosen.randint(LONGEST, 4 * LONGEST), "max_tokens": 5}, str(LONGEST), tally)


async def nonsense(
    server: Server, client: Client, http: httpx.AsyncClient, chosen: random.Random, tally: Tally
) -> None:
    body, named = chosen.choice(
        [
            ({"prompt": [1, VOCABULARY], "max_tokens": 1}, f"token id {VOCABULARY}"),
            ({"prompt": [1], "max_tokens": 0}, "max_tokens"),
            ({"prompt": "text"}, "prompt"),
            ({"prompt": [1], "temperatur": 1}, "temperatur"),
        ]
    )
    await refused(http, body, named, tally)


async def refused(http: httpx.AsyncClient, body: dict[str, Any], named: str, tally: Tally) -> None:
    response = await http.post(COMPLETIONS, json=body)
    if response.status_code != httpx.codes.BAD_REQUEST or named not in response.json()["error"]["message"]:
        tally.fault("wrong_replies", f"{body} was answered with {response.status_code}: {response.text[:200]}")
    tally.counts["refused"] += 1


async def refits(client: Client, weights: list[Path], seconds: float, ends: float, tally: Tally) -> None:
    epoch = 0
    while (left := ends - time.monotonic()) > seconds / 2:
        await asyncio.sleep(min(seconds, left))
        epoch += 1
        how = "continue" if epoch % 3 else "finish"
        try:
            reply = await client.refit(RefitRequest(weights=str(weights[epoch % 2]), in_flight=how))
        except ServerError as error:
            tally.fault("lost_requests", f"refit: {error}")
            return
        if reply.policy_epoch != epoch:
            tally.fault("wrong_replies", f"refit {epoch} is policy {reply.policy_epoch}")
        tally.counts["refits"] += 1


async def watch(server: Server, seconds: float, ends: float, tally: Tally) -> None:
    await asyncio.sleep(seconds / 5)
    while time.monotonic() < ends:
        measure(server, tally)
        await asyncio.sleep(seconds / 50)


def measure(server: Server, tally: Tally) -> None:
    process = psutil.Process(server.process.pid)
    tally.memory.append(process.memory_info().rss)
    # connections come and go with the clients; what is left are files, pipes and events
    tally.handles.append(process.num_fds() - len(process.net_connections()))


def check_replies(tally: Tally, weights: list[Path], most: int) -> int:
    """Against transformers, token by token, each under the weights of its epoch. How many were looked at."""
    from transformers import Glm4MoeForCausalLM

    models = [Glm4MoeForCausalLM.from_pretrained(folder).eval() for folder in weights]
    chosen = random.Random(0).sample(tally.replies, min(most, len(tally.replies)))
    for asked, completion in tally.replies:
        if fault := wrong_epochs(asked, completion):
            tally.fault("wrong_replies", fault)
    for asked, completion in chosen:
        worst = largest_difference(models, asked, completion)
        if largest_difference(models[::-1], asked, completion) < 10 * TOLERANCE:
            tally.counts["alike under both"] += 1
        if not worst < TOLERANCE:
            tally.fault("wrong_replies", f"log-probabilities differ by {worst}; epochs {completion.policy_epoch}")
    return len(chosen)


def wrong_epochs(asked: CompletionRequest, completion: Completion) -> str | None:
    starts = [start for start, _ in completion.policy_epoch]
    epochs = [epoch for _, epoch in completion.policy_epoch]
    total = len(asked.prompt_token_ids) + len(completion.generation_token_ids)
    inside = all(len(asked.prompt_token_ids) < start < total for start in starts[1:])
    if not epochs or starts[0] != 0 or sorted(set(epochs)) != epochs or sorted(set(starts)) != starts or not inside:
        return f"epochs {completion.policy_epoch} of {len(asked.prompt_token_ids)} + {total} tokens"
    if completion.finish_reason == "length" and len(completion.generation_token_ids) != asked.max_tokens:
        return "shorter than asked for, and not stopped"
    return None


@torch.no_grad()
def largest_difference(models: list[Any], asked: CompletionRequest, completion: Completion) -> float:
    prompt = len(asked.prompt_token_ids)
    ids = torch.tensor([[*asked.prompt_token_ids, *completion.generation_token_ids]])
    found = torch.tensor(completion.generation_log_probs)
    ends = [start - prompt for start, _ in completion.policy_epoch[1:]] + [len(found)]
    worst, begin = 0.0, 0
    for (_, epoch), end in zip(completion.policy_epoch, ends, strict=True):
        logits = models[epoch % 2](ids).logits[0, prompt - 1 : -1] / (asked.temperature or 1.0)
        expected = torch.log_softmax(logits, -1).gather(-1, ids[0, prompt:, None])[:, 0]
        worst = max(worst, float((found - expected)[begin:end].abs().max()))
        begin = end
    return worst


def report(tally: Tally, checked: int, options: argparse.Namespace) -> int:
    ratios = {
        "wrong_replies": tally.counts["wrong_replies"],
        "lost_requests": tally.counts["lost_requests"],
        "memory_growth": round(tally.memory[-1] / statistics.median(tally.memory[: max(1, len(tally.memory) // 8)]), 4),
        "handles_growth": tally.handles[-1] - tally.handles[0],
    }
    print("\n".join(tally.faults[:20]))
    counts = dict(tally.counts)
    print(f"{options.seconds:.0f} s, {CLIENTS} clients, {checked} replies compared with transformers: {counts}")
    versions = {name: version(name) for name in ("megatron-core", "torch", "transformers")}
    print(
        json.dumps(
            {
                "benchmark": NAME,
                "ratios": ratios,
                "counts": counts,
                "compared": checked,
                "versions": versions | {"python": platform.python_version()},
            }
        )
    )
    # the check must be able to fail: nearly all replies tell one policy from the other
    telling = tally.counts["alike under both"] < checked / 10
    fine = telling and not tally.faults and ratios["memory_growth"] <= 1.1 and ratios["handles_growth"] <= 0
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
