"""How soon a request that nobody waits for any more gives up what it holds."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.serve.engine import MegatronEngine
from megatron_klong.serve.interface import Progress
from megatron_klong.serve.protocol import CompletionRequest
from megatron_klong.serve.replica import Replica
from tests.integration.serve.in_process import sample, sampling
from tests.integration.serve.served import prompts

SLOTS = 3


@pytest.fixture(scope="module")
def engine(weights: Path) -> Iterator[MegatronEngine]:
    with sampling(weights, max_sequence_length=1024, max_requests=SLOTS, step_tokens=64) as running:
        yield running


class Events:
    """What happens in the engine's thread, in order: who is told to end, and the steps that begin after that."""

    def __init__(self, engine: MegatronEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        """For each request that is told to end, how many steps began from then until it held nothing."""
        self.steps = 0
        told, steps, step = set[int](), Counter[int](), Replica.step

        async def counted(replica: Replica) -> list[Progress]:
            self.steps += 1
            steps.update(told)
            made = await step(replica)
            for number in told - replica._engine.requests.keys():
                told.remove(number)
                self.begun.append(steps.pop(number, 0))
            return made

        class Left(deque[Any]):
            def append(self, flight: Any) -> None:
                told.add(flight.number)
                super().append(flight)

        monkeypatch.setattr(Replica, "step", counted)
        monkeypatch.setattr(engine, "_left", Left())

    async def more(self, steps: int) -> None:
        """Wait until so many more have begun."""
        until = self.steps + steps
        while self.steps < until:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("state", ["sampled", "half read", "waiting"])
def test_who_is_cancelled_gives_up_the_place_within_one_step(
    engine: MegatronEngine, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """The step that is under way when the engine hears of it ends as it began, and the next is the last."""
    events = Events(engine, monkeypatch)
    endless = CompletionRequest(prompt_token_ids=(7,), max_tokens=1000)
    short = CompletionRequest(prompt_token_ids=(8,), max_tokens=1)

    async def play(steps: int) -> None:
        long = CompletionRequest(prompt_token_ids=prompts(950, seed=steps)[0], max_tokens=4)
        last = long if state == "half read" else endless
        running = [asyncio.ensure_future(engine.generate(one)) for one in [*[endless] * (SLOTS - 1), last]]
        await events.more(2 + steps)
        behind = asyncio.ensure_future(engine.generate(endless if state == "waiting" else short))
        await events.more(2)
        assert not behind.done()
        (behind if state == "waiting" else running[-1]).cancel()
        if state != "waiting":
            await behind  # it has got the place
        for one in running:
            one.cancel()
        await asyncio.gather(*running, behind, return_exceptions=True)

    for steps in range(5):
        asyncio.run(play(steps))
    sample(engine, [short])  # by now all have ended
    assert len(events.begun) == 5 * (SLOTS + (state == "waiting"))
    assert set(events.begun) == {1}
