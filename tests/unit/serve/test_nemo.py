"""The NeMo engine on a stand-in with the names and shapes of nemo-export-deploy 0.7.0 (fake_nemo): what it asks for,
what it makes of replies, and what it refuses. Requests and replies are Megatron-Core's own objects."""

import asyncio
import importlib
import inspect
import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core.inference.apis import MegatronLLM
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.inference_request import DynamicInferenceEvent, DynamicInferenceEventType, Status
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

from megatron_klong.config import ConfigError
from megatron_klong.serve.client import Client
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.interface import Progress
from megatron_klong.serve.nemo import NemoEngine
from megatron_klong.serve.nemo_deployable import gpus_needed
from megatron_klong.serve.protocol import (
    Completion,
    CompletionRequest,
    EngineStopped,
    ProtocolError,
    RefitRefused,
    RefitRequest,
    ReplyError,
)
from tests.conftest import REPOSITORY
from tests.unit.serve.scripted import get, serving

FAKE = Path(__file__).parent / "fake_nemo"
USER, OBSERVATION, LIGATURE = 300, 301, 302


def letters(prompt: list[int]) -> Iterator[tuple[int, float]]:
    """What the stand-in samples: letters from the last of the prompt on, a fourth of them more unlikely each time."""
    return ((97 + (prompt[-1] + place) % 26, -0.25 * (place + 1)) for place in itertools.count())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in's class; what is set on it holds for the one test."""

    def forget() -> None:
        for name in [
            name for name in sys.modules if name.split(".")[0] in ("nemo_deploy", "nemo_export_deploy_common")
        ]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    deployable = importlib.import_module("nemo_deploy.llm.megatronllm_deployable").MegatronLLMDeployable
    deployable.policy = staticmethod(letters)
    deployable.damage = staticmethod(lambda replies: replies)
    deployable.before = staticmethod(lambda prompts: None)
    yield deployable
    forget()


@pytest.fixture
def weights(tmp_path: Path) -> str:
    (tmp_path / "run_config.yaml").write_text("model:\n  bf16: true\n  vocab_size: 320\n")
    return str(tmp_path)


def config(weights: str, **settings: Any) -> ServeConfig:
    return ServeConfig(
        **{"weights": weights, "precision": "bf16", "kv_cache_gib": 2, "max_requests": 4, "policy_epoch": 7} | settings
    )


@pytest.fixture
def engine(fake: Any, weights: str) -> Iterator[NemoEngine]:
    engine = NemoEngine(config(weights))
    engine.start()
    yield engine
    engine.stop()


def request(*prompt: int, max_tokens: int = 3, **fields: Any) -> CompletionRequest:
    return CompletionRequest(prompt_token_ids=prompt or (5,), max_tokens=max_tokens, **fields)


def ask(engine: NemoEngine, *requests: CompletionRequest) -> list[Completion | BaseException]:
    """All at once, in one event loop."""

    async def run() -> list[Completion | BaseException]:
        return await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)

    return asyncio.run(run())


def ask_one(engine: NemoEngine, asked: CompletionRequest) -> Completion:
    [reply] = ask(engine, asked)
    if isinstance(reply, BaseException):
        raise reply
    return reply


def test_ids_go_in_and_ids_with_a_log_probability_each_come_out(engine: NemoEngine, fake: Any) -> None:
    assert engine.exact_tokens
    assert (engine.policy_epoch, engine.vocabulary_size) == (7, 320)
    reply = ask_one(engine, request(5, 6, max_tokens=2, temperature=0.5, top_p=0.9))
    assert reply == Completion(
        prompt_token_ids=(5, 6),
        generation_token_ids=(103, 104),
        generation_log_probs=(-0.25, -0.5),
        finish_reason="length",
        policy_epoch=((0, 7),),
        kv_cache_epoch=((0, 7),),
    )
    [(prompts, parameters)] = fake.made[-1].calls
    assert prompts == [[5, 6]]
    assert (parameters.temperature, parameters.top_k, parameters.top_p) == (0.5, 0, 0.9)
    assert (parameters.return_log_probs, parameters.skip_prompt_log_probs) == (True, True)
    assert (parameters.termination_id, parameters.stop_words) == (-1, None)


def test_over_http_it_is_a_server_that_may_be_trained_on(engine: NemoEngine, weights: str) -> None:
    async def complete(url: str) -> Completion:
        async with Client(url) as client:
            return await client.complete(request(max_tokens=2))

    with serving(engine, **config(weights).model_dump(exclude_unset=True)) as url:
        reply, model = asyncio.run(complete(url)), get(url, "/v1/models").json()["data"][0]
    assert (reply.generation_token_ids, model["exact_tokens"]) == ((102, 103), True)


def test_the_model_is_made_as_configured_and_set_up_for_rollouts(fake: Any, weights: str) -> None:
    seeds = set()
    for seed in (1, 2):
        engine = NemoEngine(config(weights, seed=seed, max_sequence_length=2000))
        engine.start()
        made = fake.made[-1]
        seeds.add(made.mcore_engine.controller.sampling_rng.initial_seed())
        engine.stop()
    given = made.arguments
    assert (given["megatron_checkpoint_filepath"], given["inference_max_seq_length"]) == (weights, 2000)
    assert (given["max_batch_size"], given["buffer_size_gb"], given["sequence_parallel"]) == (4, 2, False)
    held = made.mcore_engine.engine
    assert held.context.config.logprobs_mode == "processed_logprobs"
    assert held.context.config.materialize_only_last_token_logits
    assert held.materialize_only_last_token_logits
    assert held.enable_chunked_prefill
    assert held.context.enable_chunked_prefill
    assert seeds == {4097, 8193}  # the seed, and which replica it is


def test_megatron_reads_what_is_set_and_has_what_is_called() -> None:
    """Of the stand-in's engine, against the Megatron-Core that is installed."""

    def source(function: Callable[..., Any]) -> str:
        return inspect.getsource(function)

    assert "self.config.logprobs_mode" in source(DynamicInferenceContext._processed_log_probs)
    assert "self.enable_chunked_prefill" in source(DynamicInferenceContext.is_chunked_prefill_enabled)
    assert "self.enable_chunked_prefill" in source(DynamicInferenceEngine.schedule_waiting_requests)
    assert "self.materialize_only_last_token_logits" in source(DynamicInferenceEngine._add_request)
    started = source(DynamicInferenceEngine.start_listening_to_data_parallel_coordinator)
    assert "self.engine_loop_task = " in started
    assert "self.inference_coordinator_process = " in started
    controller = source(TextGenerationController)
    assert "self.sampling_rng.manual_seed(seed)" in controller
    assert "seed = self.model_config.inference_sampling_seed" in controller
    assert {"engine", "controller", "shutdown", "generate"} <= set(dir(MegatronLLM))
    for name, parameters in (
        ("tokenize_prompt", ["tokenizer", "prompt", "add_BOS"]),
        ("detokenize", ["tokenizer", "tokens", "remove_EOD", "skip_special_tokens"]),
    ):
        assert list(inspect.signature(getattr(TextGenerationController, name)).parameters) == parameters


def test_those_that_sample_alike_are_one_batch_and_each_is_cut_to_its_own_length(engine: NemoEngine, fake: Any) -> None:
    asked = [request(n, max_tokens=n) for n in (1, 2, 3)]
    replies = ask(engine, asked[0], request(9, temperature=0.5), *asked[1:])
    assert [len(reply.generation_token_ids) for reply in replies if isinstance(reply, Completion)] == [1, 3, 2, 3]
    calls = fake.made[-1].calls
    assert [prompts for prompts, _ in calls] == [[[1], [2], [3]], [[9]]]
    assert [parameters.num_tokens_to_generate for _, parameters in calls] == [3, 3]


def test_a_batch_takes_max_requests_and_the_oldest_come_first(engine: NemoEngine, fake: Any) -> None:
    first, release = threading.Event(), threading.Event()

    def hold(prompts: list[list[int]]) -> None:
        first.set()
        assert release.wait(30)

    fake.before = staticmethod(hold)

    async def run() -> None:
        tasks = [asyncio.ensure_future(engine.generate(request(0)))]
        await asyncio.to_thread(first.wait)
        tasks += [asyncio.ensure_future(engine.generate(request(n))) for n in (1, 2, 3, 4, 5)]
        tasks += [asyncio.ensure_future(engine.generate(request(6, top_k=2)))]
        await asyncio.sleep(0)
        [load] = engine.loads
        assert (load.running, load.waiting) == (1, 6)
        release.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert [prompts for prompts, _ in fake.made[-1].calls] == [[[0]], [[1], [2], [3], [4]], [[5]], [[6]]]
    assert [(load.running, load.waiting) for load in engine.loads] == [(0, 0)]


@pytest.mark.parametrize("evicted_after", [None, 1])
@pytest.mark.parametrize("end", [USER, OBSERVATION, 2])
def test_the_first_stop_token_that_is_sampled_ends_the_reply(
    engine: NemoEngine, fake: Any, end: int, evicted_after: int | None
) -> None:
    fake.policy = staticmethod(lambda prompt: iter([(97, -1.0), (98, -2.0), (end, -3.0), (97, -4.0), (2, -5.0)]))
    fake.evicted_after = evicted_after
    reply = ask_one(engine, request(max_tokens=5, stop_token_ids=(2, USER, OBSERVATION)))
    assert (reply.generation_token_ids, reply.generation_log_probs) == ((97, 98, end), (-1.0, -2.0, -3.0))
    assert (reply.finish_reason, reply.num_evictions) == ("stop", int(evicted_after is not None))
    [(_, parameters)] = fake.made[-1].calls
    assert (parameters.termination_id, parameters.stop_words) == (2, ["<|user|>", "<|observation|>"])


def test_a_stop_token_that_has_no_text_of_its_own_is_refused_unless_it_is_first(engine: NemoEngine) -> None:
    with pytest.raises(ProtocolError, match=r"stop_token_ids: .*302.*'ab'.*put it first"):
        ask_one(engine, request(stop_token_ids=(2, LIGATURE)))
    assert ask_one(engine, request(stop_token_ids=(LIGATURE, USER))).finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": 1}, "top_k 1"),
        ({"top_k": 5, "top_p": 0.5}, "top_k with top_p"),
        ({"seed": 3}, "seed"),
        ({"stop": ("x",)}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"deadline_seconds": 9.0}, "deadline_seconds"),
        ({"routes": True}, "routes"),
        ({"policy_epoch_at_least": 8}, "policy_epoch_at_least"),
    ],
)
def test_what_nemo_cannot_do_is_refused_with_the_field_and_the_cure(
    engine: NemoEngine, fake: Any, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ProtocolError, match=f"{named}.*--engine megatron"):
        ask_one(engine, request(**fields))
    assert fake.made[-1].calls == []


def test_what_changes_nothing_is_taken(engine: NemoEngine) -> None:
    reply = ask_one(engine, request(policy_epoch_at_least=7, prompt_cache_key="episode", top_k=5))
    assert reply.policy_epoch == ((0, 7),)


def failed(reply: Any) -> None:
    reply.status, reply.generated_tokens, reply.generated_log_probs = Status.FAILED, [], None
    error = ValueError("the cache has too few blocks")
    reply.events.append(DynamicInferenceEvent(type=DynamicInferenceEventType.ERROR_NONTRANSIENT, payload=error))


def echoed(reply: Any) -> None:
    reply.generated_tokens = [*reply.prompt_tokens.tolist(), *reply.generated_tokens]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda reply: setattr(reply, "generated_log_probs", None), "3 sampled ids but 0"),
        (lambda reply: reply.generated_log_probs.pop(), "3 sampled ids but 2"),
        (lambda reply: reply.generated_log_probs.insert(0, -0.1), "3 sampled ids but 4"),
        (lambda reply: reply.generated_log_probs.__setitem__(1, None), "generation_log_probs"),
        (lambda reply: reply.generated_log_probs.__setitem__(1, math.nan), "generation_log_probs"),
        (lambda reply: reply.generated_log_probs.__setitem__(1, 0.5), "above 0"),
        (lambda reply: setattr(reply, "generated_tokens", []), "0 sampled ids but 3"),
        (lambda reply: (reply.generated_tokens.clear(), reply.generated_log_probs.clear()), "ends after 0"),
        (lambda reply: (reply.generated_tokens.pop(), reply.generated_log_probs.pop()), "ends after 2 of max_tokens 3"),
        (lambda reply: setattr(reply, "prompt_tokens", None), "another prompt"),
        (lambda reply: setattr(reply, "prompt_tokens", torch.tensor([4])), "another prompt"),
        (echoed, "4 sampled ids but 3"),
        (failed, "FAILED: the cache has too few blocks"),
        (lambda reply: setattr(reply, "status", None), "None: it does not say why"),
    ],
)
def test_a_reply_that_lacks_something_is_an_error_and_no_sample(
    engine: NemoEngine, fake: Any, damage: Callable[[Any], object], named: str
) -> None:
    def second_is_damaged(replies: list[Any]) -> list[Any]:
        damage(replies[1])
        return replies

    fake.damage = staticmethod(second_is_damaged)
    good, bad = ask(engine, request(4), request(5))
    assert isinstance(good, Completion)
    assert isinstance(bad, ReplyError)
    assert named in str(bad)
    assert engine.failure is None


def test_tensors_are_read_as_lists_are(engine: NemoEngine, fake: Any) -> None:
    def as_tensors(replies: list[Any]) -> list[Any]:
        for reply in replies:
            reply.generated_tokens = torch.tensor(reply.generated_tokens)
            reply.generated_log_probs = torch.tensor(reply.generated_log_probs)
        return replies

    fake.damage = staticmethod(as_tensors)
    assert ask_one(engine, request()).generation_token_ids == (102, 103, 104)


def test_too_few_replies_are_an_error_for_all_of_the_batch(engine: NemoEngine, fake: Any) -> None:
    fake.damage = staticmethod(lambda replies: replies[:1])
    replies = ask(engine, request(4), request(5))
    assert [type(reply) for reply in replies] == [ReplyError, ReplyError]
    assert "1 replies to 2 prompts" in str(replies[0])


def test_who_leaves_while_waiting_is_forgotten_and_who_leaves_later_holds_up_nobody(
    engine: NemoEngine, fake: Any
) -> None:
    first, release = threading.Event(), threading.Event()

    def hold(prompts: list[list[int]]) -> None:
        first.set()
        assert release.wait(30)

    fake.before = staticmethod(hold)

    async def run() -> Completion:
        running = asyncio.ensure_future(engine.generate(request(0)))
        await asyncio.to_thread(first.wait)
        waiting, other = (asyncio.ensure_future(engine.generate(request(n))) for n in (1, 2))
        await asyncio.sleep(0)
        running.cancel()
        waiting.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert running.cancelled()
        assert waiting.cancelled()
        release.set()
        return await other

    assert asyncio.run(run()).prompt_token_ids == (2,)
    assert [prompts for prompts, _ in fake.made[-1].calls] == [[[0]], [[2]]]


def test_a_stream_yields_the_whole_at_once(engine: NemoEngine) -> None:
    async def run() -> list[Progress | Completion]:
        return [part async for part in engine.stream(request())]

    part, whole = asyncio.run(run())
    assert isinstance(part, Progress)
    assert isinstance(whole, Completion)
    assert (part.ids, part.log_probs, part.finished) == (whole.generation_token_ids, whole.generation_log_probs, True)


def test_new_weights_are_refused_with_the_cure(engine: NemoEngine) -> None:
    with pytest.raises(RefitRefused, match=r"start another server with --weights /new .* --engine megatron"):
        asyncio.run(engine.refit(RefitRequest(weights="/new")))


def test_the_end_of_megatrons_loop_is_noticed(engine: NemoEngine, fake: Any) -> None:
    held, told = threading.Event(), threading.Event()
    fake.before = staticmethod(lambda prompts: held.wait(30))
    engine.on_failure = told.set
    inner = fake.made[-1].mcore_engine

    async def run() -> list[Completion | BaseException]:
        asked = [asyncio.ensure_future(engine.generate(request(n))) for n in (1, 2)]
        asked.append(asyncio.ensure_future(engine.generate(request(3, top_k=2))))
        await asyncio.sleep(0)
        inner.engine.engine_loop_task.set_exception(SystemExit(1))  # what its loop does with any exception
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(reply) for reply in asyncio.run(run())] == [EngineStopped] * 3
    assert told.wait(30)
    assert "SystemExit" in str(engine.failure)
    with pytest.raises(EngineStopped, match="SystemExit"):
        ask_one(engine, request())
    engine.stop()
    held.set()
    # asking it to stop would wait for ever; its coordinator's process would keep ours from exiting
    assert (inner.shutdowns, inner.engine.inference_coordinator_process.killed) == (0, True)


def test_an_exception_in_a_batch_ends_the_engine(engine: NemoEngine, fake: Any) -> None:
    def broken(prompts: list[list[int]]) -> None:
        raise RuntimeError("out of memory")

    fake.before = staticmethod(broken)
    told = threading.Event()
    engine.on_failure = told.set
    with pytest.raises(EngineStopped, match="out of memory"):
        ask_one(engine, request())
    assert told.wait(30)


def test_a_reply_of_another_shape_ends_the_engine_and_leaves_nobody_waiting(engine: NemoEngine, fake: Any) -> None:
    fake.damage = staticmethod(lambda replies: [object() for _ in replies])
    assert [type(reply) for reply in ask(engine, request(4), request(5))] == [EngineStopped] * 2
    assert "no attribute" in str(engine.failure)


def test_stopped_it_ends_what_is_in_flight_and_is_no_failure(engine: NemoEngine, fake: Any) -> None:
    held, inner = threading.Event(), fake.made[-1].mcore_engine
    fake.before = staticmethod(lambda prompts: held.set() or inner.stopped.wait(30))

    async def run() -> list[Completion | BaseException]:
        asked = [asyncio.ensure_future(engine.generate(one)) for one in (request(1), request(2, top_k=2))]
        await asyncio.to_thread(held.wait)
        await asyncio.to_thread(engine.stop)
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(reply) for reply in asyncio.run(run())] == [EngineStopped] * 2
    engine.stop()
    assert (inner.shutdowns, engine.failure) == (1, None)
    with pytest.raises(EngineStopped, match="it was stopped"):
        ask_one(engine, request())


def test_another_rank_takes_part_until_the_loop_ends(fake: Any, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_klong.serve.nemo._WATCH_SECONDS", 0.01)

    def follow_until(end: Callable[[Any], None]) -> BaseException | None:
        count, raised = len(fake.made), []

        def follow() -> None:
            try:
                NemoEngine(config(weights)).follow()
            except EngineStopped as error:
                raised.append(error)

        thread = threading.Thread(target=follow)
        thread.start()
        while len(fake.made) == count:
            thread.join(0.01)
        end(fake.made[-1].mcore_engine.engine.engine_loop_task)
        thread.join(30)
        assert not thread.is_alive()
        return raised[0] if raised else None

    assert follow_until(lambda task: task.set_result(None)) is None
    assert fake.made[-1].mcore_engine.shutdowns == 1
    assert "SystemExit" in str(follow_until(lambda task: task.set_exception(SystemExit(1))))


def broken_import(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = importlib.import_module

    def fails(name: str, package: str | None = None) -> Any:
        if name.startswith("nemo_deploy"):
            raise error
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", fails)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda patch: broken_import(patch, ModuleNotFoundError("No module named 'nemo_deploy'")), "nemo_deploy"),
        (lambda patch: broken_import(patch, RuntimeError("transformer-engine is a stub")), "stub"),
        (lambda patch: broken_import(patch, OSError("libcudart.so.13 not found")), "libcudart"),
        (lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False), "no CUDA device"),
        (lambda patch: patch.setattr("nemo_deploy.llm.megatronllm_deployable.HAVE_TRITON", False), "pytriton"),
    ],
)
def test_where_nemo_is_not_installed_the_cure_is_named(
    fake: Any, weights: str, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Any], None], reason: str
) -> None:
    prepare(monkeypatch)
    engine = NemoEngine(config(weights))
    with pytest.raises(ConfigError, match=rf"{reason}.*requirements-gpu.txt.*--engine megatron"):
        engine.start()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"precision": "fp32"}, "precision fp32: .*says bf16"),
        ({"kv_cache_gib": 0.5}, "kv_cache_gib 0.5: .*give 1"),
        ({"layout": {"context_parallel": 2}}, "layout: .*context_parallel"),
        ({"layout": {"pipeline_parallel": 2, "layers_per_stage": (1, 2)}}, "layout: .*layers_per_stage"),
        ({"layout": {"tensor_parallel": 8}, "max_requests": 4}, "max_requests 4: .*tensor_parallel 8"),
        ({"step_tokens": 8192}, "step_tokens 8192"),
        ({"block_tokens": 64}, "block_tokens 64"),
        ({"routes": True}, "routes"),
    ],
)
def test_a_configuration_that_nemo_cannot_serve_is_refused(weights: str, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        NemoEngine(config(weights, **settings))


def test_weights_that_nemo_cannot_read_are_refused_with_the_way_to_convert_them(weights: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"weights .*run_config.yaml.*AutoBridge.import_ckpt"):
        NemoEngine(config(str(tmp_path / "other")))
    (tmp_path / "other" / "iter_0000000").mkdir()
    (tmp_path / "other" / "iter_0000000" / "run_config.yaml").touch()
    with pytest.raises(ConfigError, match=r"give .*other/iter_0000000"):
        NemoEngine(config(str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="not readable"):
        NemoEngine(config(str(tmp_path / "other" / "iter_0000000")))


def test_a_cache_too_small_for_one_request_is_refused(fake: Any, weights: str) -> None:
    engine = NemoEngine(config(weights, kv_cache_gib=1, max_sequence_length=4097))  # 16 blocks of 256 in the stand-in
    with pytest.raises(ConfigError, match=r"kv_cache_gib .* holds 4096 tokens"):
        engine.start()
    assert fake.made[-1].mcore_engine.engine.inference_coordinator_process.killed


def test_a_megatron_without_what_is_set_is_refused(fake: Any, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[fake.__module__]
    real = module._Engine

    def older(*arguments: Any) -> Any:
        made = real(*arguments)
        del made.engine.enable_chunked_prefill
        return made

    monkeypatch.setattr(module, "_Engine", older)
    with pytest.raises(ConfigError, match=r"no SimpleNamespace.enable_chunked_prefill; install requirements-gpu.txt"):
        NemoEngine(config(weights)).start()


def test_a_layout_needs_its_processes(fake: Any, weights: str) -> None:
    layout = {"tensor_parallel": 2, "expert_parallel": 4, "pipeline_parallel": 2}
    engine = NemoEngine(config(weights, layout=layout))
    assert gpus_needed(config(weights, layout=layout).layout) == 8
    with pytest.raises(ConfigError, match=r"among 8 processes, but there are 1; .*torchrun"):
        engine.start()


def test_importing_it_imports_nothing_heavy() -> None:
    program = (
        "import sys; import megatron_klong.serve.nemo, megatron_klong.serve.nemo_http;"
        "print([m for m in ('torch', 'megatron', 'ray', 'nemo_deploy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
