"""A real server as child processes, and what its tests ask of it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import psutil
import torch

from megatron_klong.serve.client import Client
from megatron_klong.serve.protocol import Completion, CompletionRequest
from tests.conftest import REPOSITORY
from tests.ports import free_port

LIMIT = 192
VOCABULARY = 320
TOLERANCE = 1e-4


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    errors: Path

    def processes(self) -> list[psutil.Process]:
        """All of them, the launcher's among them."""
        started = psutil.Process(self.process.pid)
        return [started, *started.children(recursive=True)]


@contextmanager
def serving(weights: Path, *options: str, processes: int = 1, limit: int = LIMIT) -> Iterator[Server]:
    """Until the context ends; several processes under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "megatron_klong.serve"]
    command += ["--weights", str(weights), "--max_sequence_length", str(limit), *options]
    # one thread: the machine has other tests to run
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+") as errors:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        started: list[psutil.Process] = []
        try:
            line = process.stdout.readline()
            assert line, Path(errors.name).read_text()[-6000:]
            server = Server(url=json.loads(line)["url"], process=process, errors=Path(errors.name))
            started = server.processes()
            yield server
        finally:
            for one in started or [psutil.Process(process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait(timeout=30)
            process.stdout.close()


def prompts(*lengths: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]


def complete(server: Server, requests: Sequence[CompletionRequest]) -> list[Completion]:
    """All at once; the replies in the order of the requests."""
    found: dict[int, Completion] = {}

    async def run() -> None:
        async with Client(server.url) as client, anyio.create_task_group() as group:

            async def one(number: int) -> None:
                found[number] = await client.complete(requests[number])

            for number in range(len(requests)):
                group.start_soon(one, number)

    anyio.run(run)
    return [found[number] for number in range(len(requests))]


def greedy(reference: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """What transformers generates, without the prompt."""
    ids = torch.tensor([list(prompt)])
    made = reference.generate(
        ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=ids >= 0
    )
    return list(made[0, ids.shape[1] :].tolist())


def log_probabilities(reference: torch.nn.Module, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """What transformers gives for the sampled ids."""
    prompt = len(completion.prompt_token_ids)
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.generation_token_ids]])
    with torch.no_grad():
        logits = reference(ids).logits[0, prompt - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, ids[0, prompt:, None])[:, 0]


def assert_log_probabilities(reference: torch.nn.Module, completion: Completion, temperature: float = 1.0) -> None:
    """Those of the reply are those of transformers."""
    expected = log_probabilities(reference, completion, temperature)
    torch.testing.assert_close(torch.tensor(completion.generation_log_probs), expected, atol=TOLERANCE, rtol=0)


def assert_routes(reference: torch.nn.Module, completion: Completion) -> None:
    """For every token that was read, and of each layer with experts: transformers would send it there as well.

    That is, the experts' scores are the highest; of two that differ by rounding only, either will do.
    """
    scores: list[torch.Tensor] = []

    def note(gate: Any, given: Any, made: Any) -> None:
        scores.append(made[0].sigmoid() + gate.e_score_correction_bias)

    gates = [module for name, module in reference.named_modules() if name.endswith(".gate")]
    hooks = [gate.register_forward_hook(note) for gate in gates]
    with torch.no_grad():
        reference(torch.tensor([[*completion.prompt_token_ids, *completion.generation_token_ids[:-1]]]))
    for hook in hooks:
        hook.remove()
    by_layer = torch.stack(scores, 1)
    routes = torch.tensor(completion.moe_topk_indices)
    assert routes.shape == (*by_layer.shape[:2], gates[0].top_k)
    chosen = by_layer.gather(2, routes).sort(descending=True).values
    torch.testing.assert_close(chosen, by_layer.topk(routes.shape[2]).values, atol=1e-5, rtol=0)
    assert all(len({*experts}) == len(experts) for experts in routes.flatten(0, 1).tolist())
