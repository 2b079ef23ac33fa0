"""All processes of a server do the same at the same time: rank 0 says what comes next, and everybody does it.

Megatron's own way is a coordinator process and sockets, on which nothing can be taken back, seeded or refitted with an
answer. Here a round is one broadcast: requests to take up and to end, new weights, a step. Expert parallelism needs
every replica in every step anyway; where replicas share nothing, start a server for each instead.

Always: what one process fails at ends all of them, the others when they next wait for it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import distributed

from megatron_klong.serve import refit
from megatron_klong.serve.interface import Load, Progress
from megatron_klong.serve.protocol import CompletionRequest
from megatron_klong.serve.replica import Replica

HEARTBEAT_SECONDS = 10.0
"""Rank 0 says something at least so often."""
_SILENCE = timedelta(minutes=30)  # also what reading the weights may take


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request that replica `replica` takes up."""

    number: int
    replica: int
    request: CompletionRequest
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What is done next: first new weights, then requests are ended and taken up, then a step.

    weights: the folder of new ones.  trained: they are those of the model trained beside.
    """

    weights: str | None = None
    trained: bool = False
    policy_epoch: int = 0
    end: Sequence[int] = ()
    add: Sequence[Arrival] = ()
    step: bool = False
    measure: bool = False
    stop: bool = False

    @property
    def refits(self) -> bool:
        return self.trained or self.weights is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a round on all replicas; on rank 0. fault: why weights were not replaced.

    unfinished: some replica still has work, be it requests that were ended and hold their places until a step.
    """

    unfinished: bool = False
    progress: Sequence[Progress] = ()
    loads: Sequence[Load] = ()
    fault: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Of one replica."""

    progress: Sequence[Progress]
    load: Load | None
    unfinished: bool


class Lockstep:
    """This process's place in the rounds; made on all processes at once."""

    def __init__(self, replica: Replica, trained: GPTModel | None = None) -> None:
        """trained: what this process holds of the model trained beside, if there is one."""
        self._replica = replica
        self._trained = trained
        self._alone = distributed.get_world_size() == 1
        self.replicas = parallel_state.get_data_parallel_world_size()
        self._number = parallel_state.get_data_parallel_rank()
        self._experts_shared = parallel_state.get_expert_model_parallel_world_size() > 1
        # commands are small and for the host, whatever the device's own groups are
        self._everybody = distributed.new_group(backend="gloo", timeout=_SILENCE)
        self._is_head = not (
            parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_pipeline_model_parallel_rank()
        )
        told: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(told, self._is_head, group=self._everybody)
        heads = [rank for rank, is_head in enumerate(told) if is_head]
        self._heads = distributed.new_group(heads, backend="gloo", timeout=_SILENCE)

    async def follow(self) -> None:
        """On every rank but 0: do what is said until that is to stop."""
        while not (said := self._said(None)).stop:
            await self._do(said)

    async def lead(self, round_: Round) -> Outcome:
        """On rank 0."""
        self._said(round_)
        return Outcome() if round_.stop else await self._do(round_)

    def _said(self, round_: Round | None) -> Round:
        if self._alone:
            assert round_ is not None
            return round_
        box = [round_]
        distributed.broadcast_object_list(box, src=0, group=self._everybody)
        assert box[0] is not None
        return box[0]

    def leave(self) -> None:
        """Give up the groups made here, where those of the model stay."""
        for group in (self._heads, self._everybody):
            distributed.destroy_process_group(group)

    async def _do(self, said: Round) -> Outcome:
        replica = self._replica
        started = time.monotonic()
        fault = self._refit(said) if said.refits else None
        seconds = time.monotonic() - started
        replica.end(said.end)
        for arrival in said.add:
            if arrival.replica == self._number:
                replica.add(arrival.number, arrival.request, seed=arrival.seed)
        progress: list[Progress] = []
        if said.step and replica.has_work:
            progress = await replica.step()
        elif said.step and self._experts_shared:
            replica.idle_step()
        load = replica.load() if said.measure else None
        everything = self._gathered(_Part(progress=progress, load=load, unfinished=replica.has_work))
        return Outcome(
            unfinished=any(part.unfinished for part in everything),
            progress=[one for part in everything for one in part.progress],
            loads=[part.load for part in everything if part.load is not None],
            fault=fault,
            seconds=seconds,
        )

    def _refit(self, said: Round) -> str | None:
        """Why the weights were not replaced."""
        replica = self._replica
        try:
            if said.weights is None:
                refit.replace_from_model(replica.model, self._trained, group=self._everybody)
            else:
                refit.replace_from_folder(
                    replica.model, replica.model_config, Path(said.weights), group=self._everybody
                )
        except refit.RefitError as error:
            return str(error)
        replica.weights_replaced(said.policy_epoch)
        return None

    def _gathered(self, own: "_Part") -> "list[_Part]":
        """Of all replicas on rank 0; elsewhere nothing."""
        if self.replicas == 1:
            return [own]
        if not self._is_head:
            return []
        leads = distributed.get_rank() == 0
        found: list[Any] = [None] * self.replicas
        distributed.gather_object(own, found if leads else None, dst=0, group=self._heads)
        return found if leads else []
