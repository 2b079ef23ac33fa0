"""Weights in Hugging Face format -> Megatron-Core's dynamic inference engine, asked one prompt at a time.

The engine is Megatron's (paged cache, continuous batching); here it gets a thread, in which it steps as long as there
is work, and requests from any event loop are handed over to it. Log-probabilities are those of the distribution that
was sampled from (after temperature, top_k, top_p). One process; the model is not divided.

    who waits        for whom        ended by
    generate         the engine      its completion; the engine's failure or `stop`: EngineStopped
    stop             the thread      at most one step of the engine
"""

import asyncio
import concurrent.futures
import contextlib
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core.inference.apis import MegatronLLM, SamplingParams
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.inference_request import Status

from megatron_klong.config import ConfigError
from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.serve import cpu
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.protocol import Completion, CompletionRequest, EngineStopped

_NO_TOKEN = -1


class MegatronEngine:
    """A policy that can be sampled from. `start` loads it, `stop` ends it for good."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.model_config = ModelConfig.from_hugging_face(config.weights)
        self.vocabulary_size = self.model_config.vocab_size
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] | None = None
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stopping = asyncio.Event()
        self._work = asyncio.Event()
        self._engine: Any = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the weights and begin to step. Raises what loading raises."""
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """End the engine; what is in flight raises EngineStopped. Idempotent."""
        with contextlib.suppress(RuntimeError):  # it has ended by itself: its loop is closed, or never began
            self._loop.call_soon_threadsafe(self._stopping.set)
        if self._thread.is_alive():
            self._thread.join()

    async def generate(self, request: CompletionRequest) -> Completion:
        """Sample one reply; callable from any event loop. Raises EngineStopped."""
        if not self._thread.is_alive() or self.failure is not None:
            raise EngineStopped(f"the engine has ended: {self.failure or 'it was stopped'}")
        coroutine = self._generate(request)
        try:
            handed_over = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:  # its loop was closed just now
            coroutine.close()
            raise EngineStopped("the engine has ended") from error
        try:
            return await asyncio.wrap_future(handed_over)
        except (asyncio.CancelledError, concurrent.futures.CancelledError):
            if handed_over.cancelled() and not self._caller_cancelled():
                raise EngineStopped(f"the engine ended meanwhile: {self.failure or 'it was stopped'}") from None
            raise

    @staticmethod
    def _caller_cancelled() -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    async def _generate(self, request: CompletionRequest) -> Completion:
        future = self._engine.add_request(
            next(self._numbers), list(request.prompt_token_ids), _sampling_parameters(request)
        )
        self._work.set()
        # shielded: the engine sets a result even if nobody waits any more, which a cancelled future refuses
        record = (await asyncio.shield(future)).merge()
        if record.status == Status.FAILED:
            raise RuntimeError(f"the engine refused a request: {[event.payload for event in record.events]}")
        generated = tuple(int(identifier) for identifier in record.generated_tokens)
        stopped = bool(generated) and generated[-1] in request.stop_token_ids
        return Completion(
            prompt_token_ids=request.prompt_token_ids,
            generation_token_ids=generated,
            generation_log_probs=tuple(float(value) for value in record.generated_log_probs or ()),
            finish_reason="stop" if stopped else "length",
            policy_epoch=tuple((int(index), int(epoch)) for index, epoch in record.policy_epoch or ()),
        )

    def _run(self) -> None:
        """The thread: everything of torch happens here, process groups included."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # kept, so that whoever asks next is told
            self.failure = error
            if self.on_failure is not None:
                self.on_failure()
        finally:
            self._ready.set()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()
            destroy()

    async def _serve(self) -> None:
        self._engine = load(self._config, self.model_config)
        stepping = asyncio.ensure_future(self._step())
        stopping = asyncio.ensure_future(self._stopping.wait())
        self._ready.set()
        await asyncio.wait({stepping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stepping.done():
            stepping.result()  # raises what ended it

    async def _step(self) -> None:
        """Megatron's `run_engine` without its handling of faults, which is to exit."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._engine.has_unfinished_requests():
                await self._engine.async_step()
                await asyncio.sleep(0)  # requests that came meanwhile are taken up between steps


def load(config: ServeConfig, model_config: ModelConfig) -> Any:
    """Process groups, model, weights, and Megatron's engine around them."""
    cpu.install()
    layout = LayoutConfig()
    initialize(layout, seed=config.seed)
    model = build_model(model_config, layout, precision=config.precision)
    load_hugging_face([model], model_config, Path(config.weights))
    model.config.inference_sampling_seed = config.seed
    context = InferenceConfig(
        block_size_tokens=config.block_tokens,
        buffer_size_gb=config.kv_cache_gib,
        max_sequence_length=config.max_sequence_length,
        max_requests=config.max_requests,
        max_tokens=config.step_tokens,
        enable_chunked_prefill=True,  # else a prompt longer than one step is refused
        materialize_only_last_token_logits=True,
        logprobs_mode="processed_logprobs",
    )
    engine = MegatronLLM(
        model=model.eval(), tokenizer=_NoText(), inference_config=context, use_coordinator=False
    ).engine
    engine._generation_epoch = config.policy_epoch
    places = (engine.context.kv_block_allocator.total_count - 1) * config.block_tokens  # a block is set aside
    if places < config.max_sequence_length:
        raise ConfigError(
            f"kv_cache_gib {config.kv_cache_gib} holds {places} tokens, less than one request of max_sequence_length "
            f"{config.max_sequence_length}; raise the one or lower the other"
        )
    return engine


class _NoText:
    """The tokenizer that the engine asks: here only ids go in and out, and its text is not looked at.

    It takes stop sequences as text, so stop tokens are handed to it as the digits of their ids.
    """

    eod = _NO_TOKEN
    bos = _NO_TOKEN

    def tokenize(self, text: str) -> list[int]:
        return [int(text)]

    def detokenize(self, ids: Any, **options: Any) -> str:
        return ""


def _sampling_parameters(request: CompletionRequest) -> SamplingParams:
    greedy = request.temperature == 0
    first, *others = (*request.stop_token_ids, _NO_TOKEN)
    return SamplingParams(
        temperature=1.0 if greedy else request.temperature,
        top_k=1 if greedy else request.top_k,
        top_p=0.0 if greedy or request.top_p == 1 else request.top_p,  # 0: off
        return_log_probs=True,
        skip_prompt_log_probs=True,
        num_tokens_to_generate=request.max_tokens,
        # a stop sequence costs one more step than the termination token, but of that there is one
        termination_id=first,
        stop_words=[str(identifier) for identifier in others if identifier != _NO_TOKEN] or None,
        detokenize_stop_sequence=True,  # keeps the stop token among the ids
    )
