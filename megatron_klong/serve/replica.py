"""One replica of the policy on this process: Megatron-Core's dynamic engine and what a policy server needs besides.

Every process of a replica makes the same calls in the same order (lockstep.py sees to that) and so comes to the same
tokens. Upstream (0.19) has no way to end a request and stops on one token only; both are done in the one callback it
asks for finished requests, in the very step: `_ended_now`.

Always (tests/integration/serve): a request that is ended holds no slot and no memory one step later; a refit either
replaces all weights on all processes or none; policy epochs say for every token by which weights it was sampled.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core.inference.config import InferenceConfig, PrefixCachingEvictionPolicy
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.inference_request import Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel

from megatron_klong.model.config import ModelConfig
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.interface import Load, Progress
from megatron_klong.serve.prefix_cache import PrefixCache
from megatron_klong.serve.protocol import CompletionRequest
from megatron_klong.serve.routes import Routes
from megatron_klong.serve.sampling import SeededSampling

_NO_TOKEN = -1


class Replica:
    """The part of a replica that this process holds."""

    def __init__(self, model: GPTModel, model_config: ModelConfig, config: ServeConfig) -> None:
        self.model = model
        self.model_config = model_config
        self._asked: dict[int, CompletionRequest] = {}
        self._told: dict[int, int] = {}  # tokens of each request that `step` has handed on
        self._seeds: dict[int, int] = {}
        self._ending: set[int] = set()
        self._engine = _engine(model, config)
        self._engine._generation_epoch = config.policy_epoch
        self._cache = PrefixCache(self._engine) if config.prefix_cache else None
        self._routes = Routes(self._engine)
        controller = self._engine.controller
        controller._sampling = SeededSampling(self._seeds)
        self._sampled: list[int] = []
        self._to_host = controller._transfer_samples_to_cpu
        controller._transfer_samples_to_cpu = self._note_samples
        controller.set_stop_word_finished_ids_callback(self._ended_now)

    def add(self, number: int, request: CompletionRequest, *, seed: int) -> None:
        """Take up a request; numbers rise and none comes twice."""
        self._asked[number] = request
        self._told[number] = 0
        self._seeds[number] = seed
        self._engine.add_request(number, list(request.prompt_token_ids), _sampling_parameters(request))

    def end(self, numbers: Iterable[int]) -> None:
        """Have requests forgotten, within one step; of a prompt that is just being read, no more than that is read.

        Called before each step: one that was put off for lack of room while it ended is not taken up again.
        """
        engine = self._engine
        for number in (*self._ending, *numbers):
            entry = engine.requests.get(number)
            if entry is None:
                continue
            if number in engine.waiting_request_ids and number != engine.context.chunked_prefill_request_id:
                engine.waiting_request_ids.remove(number)
                engine.requests.pop(number)
                self._forget(number)
                continue
            self._ending.add(number)
            if number == engine.context.chunked_prefill_request_id:
                request = entry.record[-1]
                # upstream cannot take back a prompt that is half in: let the next step be its last
                request.remaining_prompt_tokens = request.remaining_prompt_tokens[:2]

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything here."""
        return bool(self._engine.has_unfinished_requests())

    async def step(self) -> list[Progress]:
        """One forward pass: a token for each running request, and parts of prompts."""
        self._routes.begin_step()
        with InferenceMode.active():
            done = await self._engine.async_step()
        finished = {record.request_id: record for record in done["finished_request_records"]}
        moved = [*done["active_request_ids"], *finished]
        return [part for number in moved if (part := self._progress(number, finished.get(number))) is not None]

    def idle_step(self) -> None:
        """Take part in the exchange of experts while only other replicas have work."""
        with InferenceMode.active():
            self._engine.controller.dummy_forward()

    def load(self) -> Load:
        """Counted now."""
        engine, allocator = self._engine, self._engine.context.kv_block_allocator
        return Load(
            running=len(engine.requests) - len(engine.waiting_request_ids),
            waiting=len(engine.waiting_request_ids),
            blocks_used=int(allocator.get_active_used() + allocator.get_paused_used()),
            blocks=allocator.total_count - 1,
            prefill_computed=engine._prefill_tokens_computed,
            prefill_reused=engine._prefill_tokens_skipped,
            evictions=engine.evicted_request_count,
        )

    def weights_replaced(self, epoch: int) -> None:
        """New weights are in place: what comes now is theirs, and nothing that the old ones read is used again.

        Requests in flight go on from the tokens they have, which are read anew, so that no token is sampled from keys
        and values of other weights.
        """
        engine = self._engine
        unfinished = sorted(number for number in engine.requests if number not in self._ending)
        for number in sorted(self._ending & engine.requests.keys()):
            engine.requests.pop(number)
            self._forget(number)
        for number in unfinished:
            record = engine.requests[number].record
            if record[-1].generated_tokens:
                record.checkpoint()
            request = record[-1]
            request.remaining_prompt_tokens = request.prompt_tokens
            request.finished_chunk_token_count = 0
            request.kv_cache_epoch = None  # stamped when it is read
            request.policy_epoch = _from_now(request.policy_epoch, self._tokens(number), self._asked[number], epoch)
        engine.context.chunked_prefill_request_id = -1
        engine.context.reset()
        if self._cache is not None:
            self._cache.forget()
        engine.waiting_request_ids = deque(unfinished)
        engine._generation_epoch = epoch

    def _progress(self, number: int, record: Any) -> Progress | None:
        asked = self._asked[number]
        if number in self._ending and record is not None:
            self._forget(number)
            return None
        requests = (record or self._engine.requests[number].record).requests
        told = self._told[number]
        ids = _since(told, (request.generated_tokens for request in requests))
        if record is None and not ids:
            return None
        self._told[number] = told + len(ids)
        log_probs = _since(told, (request.generated_log_probs for request in requests))
        top = _since(told, map(_top, requests)) if asked.top_logprobs else []
        last = requests[-1]
        if record is not None:
            self._forget(number)
        return Progress(
            number=number,
            ids=tuple(ids),
            log_probs=tuple(log_probs),
            # where filters left fewer than were asked for, there are fewer
            top_log_probs=tuple(
                tuple((int(key), value) for key, value in one.items() if value > -math.inf) for one in top
            ),
            finished=record is not None,
            policy_epoch=tuple(last.policy_epoch or ()),
            kv_cache_epoch=tuple(last.kv_cache_epoch or ()),
            evictions=len(requests) - 1,
            cached_tokens=requests[0].num_cached_tokens,
            routes=self._routes.of(last) if asked.routes and record is not None else None,
            error=_error(requests) if last.status == Status.FAILED else None,
        )

    def _tokens(self, number: int) -> int:
        request = self._engine.get_request(number)
        return len(request.prompt_tokens) + len(request.generated_tokens)

    def _note_samples(self, active_requests: int) -> Any:
        samples = self._to_host(active_requests)
        self._sampled = samples[0].tolist()
        return samples

    def _ended_now(self, active: Sequence[int]) -> set[int]:
        """Which of the running requests this step is the last of: stopped by what they sampled, or ended."""
        reading = self._engine.context.chunked_prefill_request_id
        return {
            number
            for number, token in zip(active, self._sampled, strict=True)
            if number != reading and (number in self._ending or token in self._asked[number].stop_token_ids)
        }

    def _forget(self, number: int) -> None:
        self._ending.discard(number)
        for known in (self._asked, self._told, self._seeds):
            known.pop(number, None)


def _engine(model: GPTModel, config: ServeConfig) -> Any:
    """What Megatron's own front (`MegatronLLM`) puts together; that one refuses expert parallelism without sockets."""
    settings = InferenceConfig(
        block_size_tokens=config.block_tokens,
        buffer_size_gb=config.kv_cache_gib,
        max_sequence_length=config.max_sequence_length,
        max_requests=config.max_requests,
        max_tokens=config.step_tokens,
        enable_chunked_prefill=True,  # else a prompt longer than one step is refused
        enable_prefix_caching=config.prefix_cache,
        prefix_caching_eviction_policy=PrefixCachingEvictionPolicy.LRU,  # else forgotten when a request ends
        materialize_only_last_token_logits=True,
        logprobs_mode="processed_logprobs",
    )
    context = DynamicInferenceContext(model.config, settings)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), _Ids())
    engine = DynamicInferenceEngine(controller, context)
    InferenceMode.unset_active()  # of the whole process: a model that is trained beside must not take it for its own
    config.check_cache((context.kv_block_allocator.total_count - 1) * config.block_tokens)  # a block is set aside
    return engine


class _Ids:
    """The tokenizer that the engine asks: only ids go in and out here, so its text is the digits of an id."""

    eod = _NO_TOKEN
    bos = _NO_TOKEN

    def detokenize(self, ids: Any, **options: Any) -> str:
        return str(ids[0]) if len(ids) == 1 else ""


def _sampling_parameters(request: CompletionRequest) -> SamplingParams:
    greedy = request.temperature == 0
    return SamplingParams(
        temperature=1.0 if greedy else request.temperature,
        top_k=1 if greedy else request.top_k,
        top_p=0.0 if greedy or request.top_p == 1 else request.top_p,  # 0: off
        return_log_probs=True,
        skip_prompt_log_probs=True,
        num_tokens_to_generate=request.max_tokens,
        top_n_logprobs=request.top_logprobs,
        termination_id=_NO_TOKEN,  # see _ended_now
    )


def _since[Value](told: int, parts: Iterable[Sequence[Value] | None]) -> list[Value]:
    """What comes behind the first so many, over the parts of a request that was evicted or re-read in between."""
    found: list[Value] = []
    for part in parts:
        values = part or ()
        found += values[told:]
        told = max(0, told - len(values))
    return found


def _top(request: Any) -> Sequence[dict[str, float]]:
    """The likeliest of each sampled token; upstream adds one a part of the prompt that is read by itself."""
    sampled = len(request.generated_tokens)
    return request.generated_top_n_logprobs[-sampled:] if sampled else ()


def _from_now(
    epochs: list[tuple[int, int]] | None, tokens: int, asked: CompletionRequest, epoch: int
) -> list[tuple[int, int]]:
    """Epochs of a request that has so many tokens, if the next one is sampled in `epoch`."""
    if tokens == len(asked.prompt_token_ids):
        return [(0, epoch)]
    return [*(part for part in epochs or () if part[0] < tokens), (tokens, epoch)]


def _error(requests: Sequence[Any]) -> str:
    return "; ".join(str(event.payload) for event in requests[-1].events if event.payload is not None)
