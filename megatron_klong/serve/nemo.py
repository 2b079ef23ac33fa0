"""Rollouts from NeMo: Export-Deploy's `MegatronLLMDeployable` behind the `Engine` protocol. Imports no torch by itself.

    prompts of ids -> batches of equal sampling parameters -> deployable.generate -> ids, a log-probability each

It has never run on a GPU here. What is tested (tests/unit/serve/test_nemo.py) is this module on a stand-in with the
names and shapes of nemo-export-deploy 0.7.0, whose replies are Megatron-Core's own request objects.

Batch-synchronous: `generate` takes one set of sampling parameters and returns when all of its prompts are done. So
requests that wait while a batch is generated are gathered, the oldest first and with it those that sample alike; a
stream yields the whole reply at once; who leaves early frees nothing; new weights need a new server.

Upstream's own, whatever the configuration says: steps of 16384 tokens, cache blocks of 256, no prefix cache. What one
request may not ask for is a ProtocolError (`_refuse`); what the HTTP front checks is not checked again.
"""

import asyncio
import importlib
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.interface import Load, Progress
from megatron_klong.serve.nemo_deployable import check_config, end_coordinator, load
from megatron_klong.serve.protocol import (
    Completion,
    CompletionRequest,
    EngineStopped,
    ProtocolError,
    RefitRefused,
    RefitReply,
    RefitRequest,
    ReplyError,
    validated,
)

_NO_TOKEN = -1
_GATHER_SECONDS = 0.1  # upstream's own server waits as long
_WATCH_SECONDS = 0.5
_STOP_SECONDS = 30.0


@dataclass(kw_only=True, eq=False)
class _Asked:
    """A request that waits or is being generated; `reply` may be awaited in any event loop."""

    request: CompletionRequest
    reply: "Future[Completion]" = field(default_factory=Future)

    @property
    def sampling(self) -> tuple[float, int, float, tuple[int, ...]]:
        """What requests of one batch have in common. Not max_tokens: the longest counts, and others are cut."""
        asked = self.request
        return asked.temperature, asked.top_k, asked.top_p, asked.stop_token_ids


class NemoEngine:
    """A policy that NeMo samples from. `start` loads it, `stop` ends it for good."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises ConfigError for what Export-Deploy cannot do."""
        check_config(config)
        self._config = config
        self.vocabulary_size = 0  # known when the weights are read
        self.policy_epoch = config.policy_epoch
        self.exact_tokens = True
        self.loads: Sequence[Load] = [Load()]
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] | None = None
        self._numbers = itertools.count()
        self._deployable: Any = None
        self._stop_words = StopWords()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._news = threading.Condition()  # guards all below
        self._stopping = False
        self._waiting: deque[_Asked] = deque()
        self._running: list[_Asked] = []

    def start(self) -> None:
        """Load the weights. Raises ConfigError where NeMo is not installed, and what loading raises."""
        threading.Thread(target=self._run, name="nemo", daemon=True).start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure
        threading.Thread(target=self._watch, name="nemo-watch", daemon=True).start()

    def stop(self) -> None:
        """End the engine on all ranks; what is in flight raises EngineStopped. Idempotent."""
        with self._news:
            first, self._stopping = not self._stopping, True
        self._settle_all(self._stopped())
        self._ended.set()
        if not first or self._deployable is None:
            return
        if self.failure is None:  # else there is no loop any more that could be asked to stop
            shutdown = threading.Thread(target=self._deployable.mcore_engine.shutdown, daemon=True)
            shutdown.start()
            shutdown.join(_STOP_SECONDS)
        end_coordinator(self._deployable.mcore_engine)

    def follow(self) -> None:
        """On another rank than 0, in place of all else: take part until rank 0 stops. Raises EngineStopped."""
        engine = load(self._config).mcore_engine
        while not engine.engine.engine_loop_task.done():
            time.sleep(_WATCH_SECONDS)
        if (fault := _fault(engine.engine.engine_loop_task)) is not None:
            raise EngineStopped(fault)
        engine.shutdown()

    async def generate(self, request: CompletionRequest) -> Completion:
        """One reply. Cancelled while it waits, it is forgotten; later, its batch goes on without a reader.

        Raises EngineStopped; ProtocolError for what NeMo cannot do; ReplyError for a reply that is no sample.
        """
        _refuse(request, self.policy_epoch)
        asked = _Asked(request=request)
        with self._news:
            if self._over:
                raise self._stopped()
            self._waiting.append(asked)
            self._count()
            self._news.notify()
        return await asyncio.wrap_future(asked.reply)

    async def stream(self, request: CompletionRequest) -> AsyncGenerator[Progress | Completion]:
        """All of it as one part, and then the whole: nothing is known of a reply before its batch is done."""
        completion = await self.generate(request)
        yield Progress(
            number=next(self._numbers),
            ids=completion.generation_token_ids,
            log_probs=completion.generation_log_probs,
            finished=True,
            policy_epoch=completion.policy_epoch,
            kv_cache_epoch=completion.kv_cache_epoch,
            evictions=completion.num_evictions,
            cached_tokens=completion.cached_tokens,
        )
        yield completion

    async def refit(self, request: RefitRequest) -> RefitReply:
        """Always RefitRefused: Export-Deploy reads weights once."""
        raise RefitRefused(
            f"policy {self.policy_epoch} is served on: NeMo takes no new weights; start another server with "
            f"--weights {request.weights} and its policy_epoch, or serve with --engine megatron"
        )

    def _stopped(self) -> EngineStopped:
        return EngineStopped(f"the engine has ended: {self.failure or 'it was stopped'}")

    def _count(self) -> None:
        self.loads = [Load(running=len(self._running), waiting=len(self._waiting))]

    def _settle_all(self, error: Exception) -> None:
        with self._news:
            running, waiting = self._running, self._waiting
            self._running, self._waiting = [], deque()
            self._count()
            self._news.notify_all()
        for asked in running:
            asked.reply.set_exception(error)
        for asked in waiting:
            if asked.reply.set_running_or_notify_cancel():
                asked.reply.set_exception(error)

    def _fail(self, error: BaseException) -> None:
        """The engine has ended by itself, unless it is being stopped, which also breaks what it is at."""
        with self._news:
            if self._stopping or self.failure is not None:
                return
            self.failure = error
        self._settle_all(self._stopped())
        if self.on_failure is not None:
            self.on_failure()

    def _watch(self) -> None:
        """Megatron's loop ends its thread when a step raises, and nobody who waits for a reply is told."""
        task = self._deployable.mcore_engine.engine.engine_loop_task
        while not self._ended.wait(_WATCH_SECONDS):
            if task.done():
                self._fail(RuntimeError(_fault(task) or "Megatron's engine stopped"))
                return

    # what follows runs in the engine's thread, which is also the one that CUDA's current device was set for

    def _run(self) -> None:
        try:
            self._deployable = load(self._config)
            self.vocabulary_size = int(self._deployable.mcore_engine.controller.vocab_size)
            self._ready.set()
            while batch := self._next():
                self._answer(batch)
        except BaseException as error:  # kept, so that whoever asks next is told
            self._fail(error)
        finally:
            self._ready.set()

    def _next(self) -> list[_Asked]:
        """The oldest request and those that sample alike, as many as one batch takes; empty: it is over."""
        most = self._config.max_requests
        while True:
            with self._news:
                self._news.wait_for(lambda: self._over or self._waiting)
                # the others of a group come within moments; alone, the first would have them wait for all its tokens
                self._news.wait_for(lambda: self._over or len(self._waiting) >= most, _GATHER_SECONDS)
                if self._over:
                    return []
                alive = [asked for asked in self._waiting if not asked.reply.cancelled()]
                batch = [asked for asked in alive if asked.sampling == alive[0].sampling][:most]
                self._waiting = deque(asked for asked in alive if asked not in batch)
                self._running = [asked for asked in batch if asked.reply.set_running_or_notify_cancel()]
                self._count()
                if self._running:
                    return list(self._running)

    @property
    def _over(self) -> bool:
        return self._stopping or self.failure is not None

    def _answer(self, batch: Sequence[_Asked]) -> None:
        prompts = [list(asked.request.prompt_token_ids) for asked in batch]
        try:
            parameters = self._parameters(batch)
        except ProtocolError as error:  # of the one fault that needs the tokenizer to be found
            results: list[Any] = [error] * len(batch)
        else:
            results = self._deployable.generate(prompts, inference_params=parameters)
        if len(results) != len(batch):
            results = [ReplyError(f"NeMo gave {len(results)} replies to {len(batch)} prompts")] * len(batch)
        read = [self._read(asked, result) for asked, result in zip(batch, results, strict=True)]
        with self._news:
            unsettled, self._running = self._running, []
            self._count()
        if not unsettled:  # the engine has ended meanwhile, and they were told
            return
        for asked, outcome in zip(batch, read, strict=True):
            if isinstance(outcome, Completion):
                asked.reply.set_result(outcome)
            else:
                asked.reply.set_exception(outcome)

    def _read(self, asked: _Asked, result: Any) -> Completion | ProtocolError:
        if isinstance(result, ProtocolError):
            return result
        try:
            return read_reply(asked.request, result, policy_epoch=self.policy_epoch)
        except ReplyError as error:
            return error

    def _parameters(self, batch: Sequence[_Asked]) -> Any:
        """What Megatron calls SamplingParams. Raises ProtocolError for a stop token that it cannot be told of."""
        asked = batch[0].request
        termination, *others = asked.stop_token_ids or (_NO_TOKEN,)  # None would be the tokenizer's own
        words = self._stop_words.of(others, self._deployable.mcore_engine.controller)
        return importlib.import_module("megatron.core.inference.sampling_params").SamplingParams(
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=0.0 if asked.top_p == 1 else asked.top_p,  # 0: off
            # each is cut to its own; Megatron cuts to max_sequence_length
            num_tokens_to_generate=max(one.request.max_tokens for one in batch),
            termination_id=termination,
            stop_words=words or None,
            detokenize_stop_sequence=True,  # else a stop word is cut off the ids, too
            return_log_probs=True,
            skip_prompt_log_probs=True,
            return_prompt_tokens=True,  # so that a reply to another prompt is noticed
        )


class StopWords:
    """Stop tokens beyond the first: Megatron takes one as an id and others as text, which it encodes."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def of(self, ids: Iterable[int], controller: Any) -> list[str]:
        """Raises ProtocolError for an id whose text is not encoded as just that id."""
        return [self._known.get(identifier) or self._spelled(identifier, controller) for identifier in ids]

    def _spelled(self, identifier: int, controller: Any) -> str:
        text = controller.detokenize(controller.tokenizer, [identifier], remove_EOD=False, skip_special_tokens=False)
        if not text or list(controller.tokenize_prompt(controller.tokenizer, text)) != [identifier]:
            raise ProtocolError(
                f"stop_token_ids: NeMo can be told of {identifier} only by its text, and {text!r} is not encoded as "
                "it; put it first, give it alone, or serve with --engine megatron"
            )
        self._known[identifier] = str(text)
        return self._known[identifier]


def read_reply(asked: CompletionRequest, result: Any, *, policy_epoch: int) -> Completion:
    """A `DynamicInferenceRequest` of Megatron as a reply of ours. Raises ReplyError for one that is no sample.

    It is cut after the first stop token and to max_tokens. Both are exact, for no token depends on later ones; a stop
    token is passed where Megatron evicted the request, for it then forgets its stop words (0.19.0, `checkpoint`).
    """
    status = getattr(result.status, "name", None)
    if status != "COMPLETED":
        reasons = "; ".join(str(event.payload) for event in result.events if event.payload is not None)
        raise ReplyError(f"NeMo did not finish a request: {status}: {reasons or 'it does not say why'}")
    if tuple(_listed(result.prompt_tokens)) != asked.prompt_token_ids:
        raise ReplyError("NeMo's reply is to another prompt than was sent, or does not say to which")
    ids, log_probs = _listed(result.generated_tokens), _listed(result.generated_log_probs)
    if len(ids) != len(log_probs):
        raise ReplyError(f"NeMo's reply has {len(ids)} sampled ids but {len(log_probs)} log-probabilities")
    stops = asked.stop_token_ids
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
    end = min(end, asked.max_tokens)
    stopped = end > 0 and ids[end - 1] in stops
    if not stopped and end < asked.max_tokens:
        raise ReplyError(f"NeMo's reply ends after {end} of max_tokens {asked.max_tokens} without a stop token")
    fields = {
        "prompt_token_ids": asked.prompt_token_ids,
        "generation_token_ids": tuple(ids[:end]),
        "generation_log_probs": tuple(log_probs[:end]),
        "finish_reason": "stop" if stopped else "length",
        "policy_epoch": ((0, policy_epoch),),  # the weights are the same from start to stop
        "kv_cache_epoch": ((0, policy_epoch),),
        "num_evictions": sum(event.type.name == "EVICT" for event in result.events),
        "cached_tokens": result.num_cached_tokens,
    }
    try:
        return validated(Completion, fields)
    except ProtocolError as error:
        raise ReplyError(f"NeMo's reply: {error}") from None


def _refuse(asked: CompletionRequest, policy_epoch: int) -> None:
    """Raise ProtocolError, naming the field and the cure, for what cannot be done."""
    wanted = asked.policy_epoch_at_least
    faults = (
        (asked.temperature == 0 or asked.top_k == 1, "temperature 0 (or top_k 1)", "its log-probabilities are all 0"),
        (bool(asked.top_k) and asked.top_p < 1, "top_k with top_p", "Megatron takes one of them"),
        (asked.seed is not None, "seed", "all of a batch is drawn from one generator"),
        (bool(asked.stop), "stop", "a string is found only where it was sampled as it would be encoded"),
        (asked.top_logprobs > 0, "top_logprobs", "NeMo gives them by text, not by id"),
        (asked.deadline_seconds is not None, "deadline_seconds", "a batch is generated to its end"),
        (asked.routes, "routes", "NeMo does not record them"),
        (wanted is not None and wanted > policy_epoch, "policy_epoch_at_least", f"policy {policy_epoch} is served"),
    )
    for present, name, reason in faults:
        if present:
            raise ProtocolError(f"{name}: not with NeMo, {reason}; leave it out, or serve with --engine megatron")


def _listed(values: Any) -> list[Any]:
    """A list, a tensor or nothing."""
    if values is None:
        return []
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _fault(task: Any) -> str | None:
    """Why Megatron's loop ended, if it did so by itself."""
    error = None if task.cancelled() else task.exception()
    return None if error is None else f"Megatron's engine ended by {error!r}; what it printed says why"
