"""See nemo_deploy. What it says is written by a test: `policy`, `damage`, `before`."""

import copy
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.inference_request import DynamicInferenceRequest, DynamicInferenceRequestRecord, Status
from megatron.core.inference.sampling_params import SamplingParams
from nemo_export_deploy_common.import_utils import UnavailableError

HAVE_TRITON = True

USER, OBSERVATION, LIGATURE = 300, 301, 302
_SPECIAL = {USER: "<|user|>", OBSERVATION: "<|observation|>"}
_VOCABULARY = 320
_BLOCK = 256

type Policy = Callable[[list[int]], Iterator[tuple[int, float]]]
"""Of a prompt, what is sampled and its log-probability, without end."""


class MegatronLLMDeployable:
    """The constructor takes the names that 0.7.0 lists. Others are dropped there without a word; here, an error."""

    made: ClassVar[list["MegatronLLMDeployable"]] = []
    policy: ClassVar[Policy]
    damage: ClassVar[Callable[[list[DynamicInferenceRequest]], list[DynamicInferenceRequest]]]
    before: ClassVar[Callable[[list[list[int]]], None]]
    evicted_after: ClassVar[int | None] = None

    def __init__(
        self,
        megatron_checkpoint_filepath: str,
        num_devices: int | None = None,
        num_nodes: int | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        context_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        expert_tensor_parallel_size: int = 1,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype = torch.bfloat16,
        inference_batch_times_seqlen_threshold: int = 32768,
        inference_max_seq_length: int = 4096,
        enable_flash_decode: bool = False,
        enable_cuda_graphs: bool = False,
        max_batch_size: int = 8,
        random_seed: int | None = None,
        legacy_ckpt: bool = False,
        model_type: str = "gpt",
        micro_batch_size: int | None = None,
        buffer_size_gb: float = 10.0,
        legacy_model_format: bool = False,
    ) -> None:
        if not HAVE_TRITON:
            raise UnavailableError("pytriton is not available")
        self.arguments = {name: value for name, value in locals().items() if name != "self"}
        self.mcore_engine = _Engine(inference_max_seq_length, int(buffer_size_gb), max_batch_size)
        self.calls: list[tuple[list[list[int]], SamplingParams]] = []
        self.made.append(self)

    def generate(
        self, prompts: list[list[int]], inference_params: SamplingParams | None = None
    ) -> list[DynamicInferenceRequest]:
        assert inference_params is not None
        self.calls.append((prompts, inference_params))
        type(self).before(prompts)
        results = [self.mcore_engine.reply(type(self), prompt, inference_params) for prompt in prompts]
        return type(self).damage(results)


class _Engine:
    """`MegatronLLM` in the wrapper that passes its attributes on."""

    def __init__(self, max_sequence_length: int, buffer_size_gb: int, max_requests: int) -> None:
        config = InferenceConfig(
            max_sequence_length=max_sequence_length,
            buffer_size_gb=buffer_size_gb,
            max_requests=max_requests,
            block_size_tokens=_BLOCK,
            materialize_only_last_token_logits=False,
        )
        context = SimpleNamespace(
            config=config,
            block_size_tokens=_BLOCK,
            enable_chunked_prefill=False,
            kv_block_allocator=SimpleNamespace(total_count=buffer_size_gb * 16 + 1),
        )
        self.engine = SimpleNamespace(
            context=context,
            materialize_only_last_token_logits=False,
            enable_chunked_prefill=False,
            engine_loop_task=Future(),  # an asyncio task there, with the same questions
            inference_coordinator_process=_Process(),
        )
        self.controller = _Controller()
        self.shutdowns = 0
        self.stopped = threading.Event()

    def shutdown(self) -> None:
        self.shutdowns += 1
        self.stopped.set()

    def reply(self, deployable: type[MegatronLLMDeployable], prompt: list[int], asked: SamplingParams) -> Any:
        """As the engine and then the client of its coordinator hand it on."""
        asked = copy.deepcopy(asked)
        room = self.engine.context.config.max_sequence_length - len(prompt)
        asked.num_tokens_to_generate = min(asked.num_tokens_to_generate, room)
        request = DynamicInferenceRequest(
            request_id=0, prompt_tokens=torch.tensor(prompt), sampling_params=asked, generated_log_probs=[]
        )
        request.add_event_add_engine()
        record = DynamicInferenceRequestRecord.from_request(request)
        words = [self.controller.tokenize_prompt(self.controller.tokenizer, word) for word in asked.stop_words or ()]
        for told, (token, log_prob) in enumerate(deployable.policy(prompt), start=1):
            request.generated_tokens.append(token)
            request.generated_log_probs.append(log_prob)
            hit = next((word for word in words if request.generated_tokens[-len(word) :] == word), None)
            if hit is not None and not asked.detokenize_stop_sequence:
                del request.generated_tokens[-len(hit) :], request.generated_log_probs[-len(hit) :]
            if hit is not None or token == asked.termination_id or told == asked.num_tokens_to_generate:
                break
            if told == deployable.evicted_after:
                record.checkpoint()
                request, words = record[-1], []  # the new part knows of no stop words
                request.generated_log_probs = []
                request.add_event_evict()
        request.status = Status.COMPLETED
        request.add_event_finish()
        wire = json.loads(json.dumps(record.merge().serialize()))  # msgpack, too, makes lists of tuples
        return DynamicInferenceRequest.deserialize(wire)


class _Process:
    killed = False

    def is_alive(self) -> bool:
        return not self.killed

    def kill(self) -> None:
        self.killed = True


class _Tokenizer:
    """One token a character, and the special ones; LIGATURE is decoded to what is encoded as two others."""

    bos = 1
    eod = 2

    def tokenize(self, text: str) -> list[int]:
        by_text = {text: token for token, text in _SPECIAL.items()}
        return [by_text[text]] if text in by_text else [ord(letter) for letter in text]

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = {LIGATURE: "ab", **({} if skip_special_tokens else _SPECIAL)}
        return "".join(known.get(token, "" if token in _SPECIAL else chr(token)) for token in ids)


class _Controller:
    """`TextGenerationController`."""

    def __init__(self) -> None:
        self.vocab_size = _VOCABULARY
        self.tokenizer = _Tokenizer()
        self.model_config = SimpleNamespace(inference_sampling_seed=42)
        self.sampling_rng = torch.Generator()
        self.sampling_rng.manual_seed(42 + 1)  # of the second replica

    @staticmethod
    def tokenize_prompt(tokenizer: _Tokenizer, prompt: str, add_BOS: bool = False) -> list[int]:
        return tokenizer.tokenize(prompt)

    @staticmethod
    def detokenize(
        tokenizer: _Tokenizer, tokens: list[int], remove_EOD: bool = True, skip_special_tokens: bool = True
    ) -> str:
        return tokenizer.detokenize(tokens, skip_special_tokens=skip_special_tokens)
