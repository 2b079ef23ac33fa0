"""The policy as an asyncio object on rank 0: requests in, tokens out, in whatever event loop asks.

The rounds (lockstep.py) run in a thread of their own, on every rank; this rank's thread decides what the next one
holds. Everything of torch happens in it, process groups included.

    who waits        for whom           ended by
    stream           the rounds         the last token; its caller, who leaves; the engine's end: EngineStopped
    refit            the next round     the weights being in place, or RefitRefused
    stop             the thread         at most one step
"""

import asyncio
import contextlib
import itertools
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import distributed

from megatron_klong.config import ConfigError
from megatron_klong.model.build import build_model
from megatron_klong.model.parallel import check_initialized, destroy, initialize
from megatron_klong.serve import cpu, cpu_layers, refit, routes
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.flight import Flight, RefitAsked
from megatron_klong.serve.interface import Load, Progress
from megatron_klong.serve.lockstep import HEARTBEAT_SECONDS, Arrival, Lockstep, Outcome, Round
from megatron_klong.serve.protocol import (
    Completion,
    CompletionRequest,
    EngineStopped,
    InFlight,
    RefitRefused,
    RefitReply,
    RefitRequest,
)
from megatron_klong.serve.replica import Replica
from megatron_klong.serve.stop_strings import StopStrings
from megatron_klong.trajectory.tokenizer import Tokenizer

_MEASURE_SECONDS = 1.0


class MegatronEngine:
    """A policy that can be sampled from. `start` loads it, `stop` ends it for good."""

    def __init__(
        self, config: ServeConfig, tokenizer: Tokenizer | None = None, *, trained: GPTModel | None = None
    ) -> None:
        """trained: what this process holds of a model that is trained beside, in the same process groups.

        Groups that are there already are used, and stay. Trainer and engine take turns, as both use them: nothing is
        trained while something is sampled. On other ranks than 0, `follow` runs in a thread beside the trainer's.
        """
        self._trained = trained
        self._config = config
        self._tokenizer = tokenizer
        self.model_config = refit.model_config(Path(config.weights))
        self.vocabulary_size = self.model_config.vocab_size
        self.policy_epoch = config.policy_epoch
        self.exact_tokens = True
        self.loads: Sequence[Load] = []
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] | None = None
        self._lockstep: Lockstep | None = None
        self._groups_are_own = False
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._news = asyncio.Event()
        self._stopping = False
        self._arrived: deque[Flight] = deque()
        self._left: deque[Flight] = deque()
        self._refits: deque[RefitAsked] = deque()
        self._flights: dict[int, Flight] = {}
        self._unfinished = False
        self._measured = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the weights and begin to step. Raises what loading raises."""
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End the engine on all ranks; what is in flight raises EngineStopped. Idempotent."""

        def stop() -> None:
            self._stopping = True
            self._news.set()

        with contextlib.suppress(RuntimeError):  # it has ended by itself: its loop is closed, or never began
            self._loop.call_soon_threadsafe(stop)
        if self._thread.is_alive():
            self._thread.join()

    def follow(self) -> None:
        """On another rank than 0, in place of all else: take part until rank 0 stops."""

        async def follow() -> None:
            self._lockstep = self._load()
            await self._lockstep.follow()

        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(follow())
        finally:
            self._leave()

    async def generate(self, request: CompletionRequest) -> Completion:
        """Sample one reply. Raises EngineStopped, DeadlinePassed; ProtocolError for one that is too long."""
        async with contextlib.aclosing(self._parts(request, streamed=False)) as parts:
            async for part in parts:
                if isinstance(part, Completion):
                    return part
        raise AssertionError("unreachable")

    def stream(self, request: CompletionRequest) -> AsyncGenerator[Progress | Completion]:
        """Token by token, and at last the whole. Closed before that (`aclosing`), the request is ended."""
        return self._parts(request, streamed=True)

    async def refit(self, request: RefitRequest) -> RefitReply:
        """Replace the weights between two steps. Raises RefitRefused (the old ones are served on), EngineStopped."""
        return await self._refit(request.weights, request.policy_epoch, request.in_flight)

    async def refit_from_trained(
        self, *, policy_epoch: int | None = None, in_flight: InFlight = "continue"
    ) -> RefitReply:
        """`refit` with the weights that the model trained beside has now, on all ranks; none of them is on a disk."""
        if self._trained is None:
            raise RefitRefused(f"policy {self.policy_epoch} is served on: no model is trained beside this engine")
        return await self._refit(None, policy_epoch, in_flight)

    async def _refit(self, weights: str | None, policy_epoch: int | None, in_flight: InFlight) -> RefitReply:
        loop = asyncio.get_running_loop()
        asked = RefitAsked(
            weights=weights, policy_epoch=policy_epoch, in_flight=in_flight, done=loop.create_future(), loop=loop
        )
        self._tell(self._refits.append, asked)
        return await asked.done

    async def _parts(self, request: CompletionRequest, *, streamed: bool) -> AsyncGenerator[Progress | Completion]:
        request.check_length(self._config.max_sequence_length)  # upstream would tell of it at a step it never takes
        seconds = request.deadline_seconds
        flight = Flight(
            number=next(self._numbers),
            request=request,
            streamed=streamed,
            loop=asyncio.get_running_loop(),
            deadline=None if seconds is None else time.monotonic() + seconds,
            stop_strings=StopStrings(request.stop, self._tokenizer) if request.stop and self._tokenizer else None,
        )
        self._tell(self._arrived.append, flight)
        part: Progress | Completion | BaseException | None = None
        try:
            while not isinstance(part, Completion):
                part = await flight.parts.get()
                if isinstance(part, BaseException):
                    raise part
                yield part
        finally:
            if not isinstance(part, Completion | BaseException):
                with contextlib.suppress(EngineStopped):
                    self._tell(self._left.append, flight)

    def _tell[Told](self, take: Callable[[Told], None], told: Told) -> None:
        """Hand something to the engine's thread. Raises EngineStopped."""

        def taken() -> None:
            take(told)
            self._news.set()

        try:
            if self.failure is not None or not self._thread.is_alive():
                raise RuntimeError
            self._loop.call_soon_threadsafe(taken)
        except RuntimeError:
            raise self._stopped() from None

    def _stopped(self) -> EngineStopped:
        return EngineStopped(f"the engine has ended: {self.failure or 'it was stopped'}")

    # what follows runs in the engine's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._lead())
        except BaseException as error:  # kept, so that whoever asks next is told
            self.failure = error
        finally:
            self._loop.run_until_complete(asyncio.sleep(0))  # what was handed over just now
            self._loop.close()
            for flight in (*self._flights.values(), *self._arrived):
                flight.give(self._stopped())
            for asked in self._refits:
                asked.settle(self._stopped())
            self._leave()
            self._ready.set()
            if self.failure is not None and self.on_failure is not None:
                self.on_failure()

    def _load(self) -> Lockstep:
        """Process groups, model, weights, and Megatron's engine around them; on every rank."""
        config = self._config
        cpu.install()
        layout = config.layout
        if layout.context_parallel > 1 or layout.virtual_pipeline_parallel > 1:
            raise ConfigError("layout: context_parallel and virtual_pipeline_parallel are for training; leave them out")
        if config.routes and self._trained is not None and self._trained.config.moe_enable_routing_replay:
            raise ConfigError("routes: recorded of one model in a process; build the trained one without them")
        if parallel_state.model_parallel_is_initialized():
            check_initialized(layout)
        else:
            self._groups_are_own = True
            initialize(layout, seed=config.seed)
        model = build_model(
            self.model_config, layout, precision=config.precision, initialize_weights=False, routes=config.routes
        )
        if config.routes:
            routes.record(model)
        refit.load(model, self.model_config, Path(config.weights))
        # the other way for experts needs memory that several GPUs share
        model.config.inference_moe_token_dispatcher_type = "nccl"
        cpu_layers.lighten(model)
        return Lockstep(Replica(model.eval(), self.model_config, config), self._trained)

    def _leave(self) -> None:
        refit.forget()
        if self._config.routes:
            routes.forget()
        if self._groups_are_own:
            destroy()
        elif self._lockstep is not None:
            self._lockstep.leave()

    async def _lead(self) -> None:
        lockstep = self._lockstep = self._load()
        if distributed.get_rank() != 0:
            raise ConfigError("rank 0 leads; the others follow()")
        self._ready.set()
        idle = False
        while not self._stopping:
            round_ = self._next(lockstep.replicas)
            outcome = await lockstep.lead(round_)
            if round_.refits:
                self._refitted(round_, outcome)
            self._spread(outcome)
            self._unfinished = outcome.unfinished
            await asyncio.sleep(0)
            if self._flights or self._unfinished or self._arrived or self._refits:
                idle = False
            elif idle:  # one round without work, so that what is counted is up to date
                await self._wait()
            else:
                idle = True
        await lockstep.lead(Round(stop=True))

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), HEARTBEAT_SECONDS)
        self._news.clear()

    def _next(self, replicas: int) -> Round:
        """What everybody does next, from what callers asked since."""
        end = [flight.number for flight in self._ended()]
        self._refuse_older()
        refit_now = self._refits[0] if self._refits else None
        if refit_now is not None and refit_now.in_flight == "finish" and self._flights:
            refit_now = None  # until they have, nothing new is taken up
        arrivals = [] if self._refits else [self._taken_up(flight, replicas) for flight in self._arrived]
        if arrivals:
            self._arrived.clear()
        now = time.monotonic()
        # what has ended is counted at once, so that one sees how soon it gives up its place
        measure = now - self._measured >= _MEASURE_SECONDS or bool(end) or not self._flights
        self._measured = now if measure else self._measured
        return Round(
            weights=refit_now.weights if refit_now else None,
            trained=refit_now is not None and refit_now.weights is None,
            policy_epoch=self._epoch_of(refit_now) if refit_now else 0,
            end=end,
            add=arrivals,
            step=bool(self._flights or end or self._unfinished) and not refit_now,
            measure=measure,
        )

    def _refuse_older(self) -> None:
        while self._refits and (wanted := self._epoch_of(self._refits[0])) <= self.policy_epoch:
            fault = (
                f"policy_epoch {wanted} is not above {self.policy_epoch}, which is served; count on, or leave it out"
            )
            self._refits.popleft().settle(RefitRefused(fault))

    def _epoch_of(self, asked: RefitAsked) -> int:
        return self.policy_epoch + 1 if asked.policy_epoch is None else asked.policy_epoch

    def _ended(self) -> list[Flight]:
        """Flights whose callers left or whose time is over; they are no flights any more."""
        now = time.monotonic()
        for flight in (*self._flights.values(), *self._arrived):
            if flight.deadline is not None and now > flight.deadline:
                flight.give(flight.completion("deadline") if flight.held else flight.too_late())
                self._left.append(flight)
        ended = [flight for flight in self._left if self._flights.pop(flight.number, None)]
        for flight in self._left:
            with contextlib.suppress(ValueError):  # callers add to this very deque, so it is never another one
                self._arrived.remove(flight)
        self._left.clear()
        return ended

    def _taken_up(self, flight: Flight, replicas: int) -> Arrival:
        flight.replica = self._replica_for(flight.request, replicas)
        self._flights[flight.number] = flight
        seed = flight.request.seed
        if seed is None:  # another one for each, and the same in a run with the same requests in the same order
            seed = (self._config.seed << 32) + flight.number
        return Arrival(number=flight.number, replica=flight.replica, request=flight.request, seed=seed)

    def _replica_for(self, request: CompletionRequest, replicas: int) -> int:
        """Where an episode's cache is, if its requests say which is theirs; else where least is going on."""
        if replicas == 1:
            return 0
        if request.prompt_cache_key is not None:
            return zlib.crc32(request.prompt_cache_key.encode()) % replicas
        busy = [0] * replicas
        for flight in self._flights.values():
            busy[flight.replica] += 1
        return busy.index(min(busy))

    def _spread(self, outcome: Outcome) -> None:
        """Give callers what is theirs."""
        for part in outcome.progress:
            flight = self._flights.get(part.number)
            if flight is None:
                continue
            flight.held.append(part)
            if part.error is not None:
                self._finish(flight, RuntimeError(f"the engine refused a request: {part.error}"))
                continue
            stopped = flight.stopped_by(part)
            if flight.streamed and part.ids:
                flight.give(part)
            if part.finished:
                self._finish(flight, flight.completion("stop" if stopped else "length"))
            elif stopped:
                self._left.append(flight)
                flight.give(flight.completion("stop"))
        if outcome.loads:
            self.loads = outcome.loads

    def _refitted(self, round_: Round, outcome: Outcome) -> None:
        asked = self._refits.popleft()
        if outcome.fault is not None:
            asked.settle(RefitRefused(f"policy {self.policy_epoch} is served on: {outcome.fault}"))
            return
        self.policy_epoch = round_.policy_epoch
        asked.settle(RefitReply(policy_epoch=self.policy_epoch, seconds=outcome.seconds))

    def _finish(self, flight: Flight, *results: Progress | Completion | BaseException) -> None:
        del self._flights[flight.number]
        flight.give(*results)
