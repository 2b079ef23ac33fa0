"""A replica under schedules nobody would write down: little room, shared beginnings, parts of prompts, ends, refits."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_klong.model.config import ModelConfig
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.flight import Flight
from megatron_klong.serve.protocol import Completion, CompletionRequest
from megatron_klong.serve.replica import Replica
from tests.integration.serve.in_process import BLOCK, room_for, sampling
from tests.integration.serve.served import VOCABULARY, assert_log_probabilities, assert_routes

STEPS = 100
MOST = 12


class Schedule:
    """What happens to one replica, all of it chosen by a seed."""

    def __init__(self, seed: int, model: GPTModel, config: ModelConfig, weights: Path) -> None:
        self.chosen = chosen = random.Random(seed)
        blocks = chosen.choice((4, 6, 8, 12, 20))
        self.longest = min(blocks, chosen.choice((4, 6, 8, 12, 20))) * BLOCK
        settings = ServeConfig(
            weights=str(weights),
            max_requests=chosen.choice((2, 4, 8)),
            block_tokens=BLOCK,
            step_tokens=chosen.choice((64, 64, 128, 512)),
            prefix_cache=chosen.random() < 0.85,
            max_sequence_length=self.longest,
            kv_cache_gib=room_for(blocks),
        )
        self.replica = Replica(model, config, settings)
        self.beginnings = [self.ids(chosen.choice((BLOCK, 2 * BLOCK))) for _ in range(chosen.choice((1, 3)))]
        self.often = {"add": chosen.choice((0.1, 0.5, 0.9)), "end": chosen.choice((0, 0.02, 0.2))}
        self.often["refit"] = chosen.choice((0, 0, 0, 0.05))
        self.burst = chosen.choice((1, 3, 8))
        self.asked = 0
        self.epoch = 0
        self.running: dict[int, Flight] = {}
        self.ending: dict[int, int] = {}  # steps begun since
        self.done: list[Completion] = []

    def ids(self, count: int) -> list[int]:
        return self.chosen.choices(range(VOCABULARY), k=count)

    def maybe(self, what: str) -> bool:
        return self.chosen.random() < self.often[what]

    def request(self) -> CompletionRequest:
        chosen = self.chosen
        beginning = chosen.choice(self.beginnings) if chosen.random() < 0.8 else []
        own = self.ids(chosen.choice((0, 0, 1, BLOCK - 1, BLOCK, BLOCK + 1, chosen.randint(1, 40))))
        prompt = tuple([*beginning, *own][: self.longest - 1]) or (1,)
        most = chosen.randint(1, self.longest - len(prompt))
        return CompletionRequest(prompt_token_ids=prompt, max_tokens=most, routes=True)

    async def play(self) -> None:
        for _ in range(STEPS):
            if self.maybe("refit"):
                self.epoch += 1
                self.replica.weights_replaced(self.epoch)  # by the same
            ended = [number for number in self.running if self.maybe("end")]
            self.replica.end(ended)
            for number in ended:
                del self.running[number]
                self.ending[number] = 0
            more = self.chosen.randint(1, self.burst) if self.maybe("add") else 0
            for _ in range(min(more, MOST - len(self.running))):
                self.add(self.request())
            await self.step()
        for _ in range(self.longest * self.asked):  # each reads or samples a token at least
            await self.step()
        assert not self.replica.has_work, "it steps and gets nowhere"
        assert not self.running

    def add(self, request: CompletionRequest) -> None:
        number, loop = self.asked, asyncio.get_running_loop()
        self.running[number] = Flight(
            number=number, request=request, streamed=False, loop=loop, deadline=None, stop_strings=None
        )
        self.replica.add(number, request, seed=number)
        self.asked += 1

    async def step(self) -> None:
        self.replica.end(())
        held = self.replica._engine.requests
        self.ending = {number: steps + 1 for number, steps in self.ending.items() if number in held}
        # one, unless room lacked for that very one
        assert max(self.ending.values(), default=0) <= 2
        for part in await self.replica.step() if self.replica.has_work else ():
            assert part.error is None
            if (flight := self.running.get(part.number)) is None:
                continue
            flight.held.append(part)
            if part.finished:
                reply = flight.completion("length")
                assert isinstance(reply, Completion)
                assert len(reply.generation_token_ids) == flight.request.max_tokens
                self.done.append(reply)
                del self.running[part.number]


@pytest.fixture(scope="module")
def replica(weights: Path) -> Iterator[Replica]:
    """Whose model is used; its engine is idle meanwhile."""
    with sampling(weights, routes=True) as engine:
        assert engine._lockstep is not None
        yield engine._lockstep._replica


@pytest.mark.long
@pytest.mark.parametrize("seed", [*range(10), 49, 73])  # in the last two, ended ones are put off
def test_every_request_ends_and_nothing_stays_held(
    replica: Replica, weights: Path, reference: torch.nn.Module, seed: int
) -> None:
    schedule = Schedule(seed, replica.model, replica.model_config, weights)
    asyncio.run(schedule.play())
    assert schedule.done
    allocator = schedule.replica._engine.context.kv_block_allocator
    kept = int(allocator.get_evictable_block_count()) if allocator.enable_prefix_caching else 0
    assert allocator.total_avail + kept == allocator.total_count - 1
    assert [reply.moe_topk_indices is None for reply in schedule.done] == [
        reply.num_evictions > 0 for reply in schedule.done
    ]
    for reply in schedule.done[:: len(schedule.done) // 8 + 1]:
        assert_log_probabilities(reference, reply)
        if not reply.num_evictions:
            assert_routes(reference, reply)
