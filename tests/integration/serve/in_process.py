"""The engine without its front and in this process, which costs a fraction of starting a server."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron_klong.model.config import ModelConfig
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.engine import MegatronEngine
from megatron_klong.serve.protocol import Completion, CompletionRequest
from tests.integration.serve.served import LIMIT

BLOCK = 16
_BLOCK_BYTES = 16384  # of the tiny model


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model as training builds it, of `other_weights`, and the process groups that engines beside it use."""

    model: GPTModel
    config: ModelConfig


@contextmanager
def sampling(weights: Path, trained: Trained | None = None, **settings: Any) -> Iterator[MegatronEngine]:
    """Until the context ends; in groups of its own, unless there is a model beside."""
    fields: dict[str, Any] = {"max_sequence_length": LIMIT, "block_tokens": BLOCK, "kv_cache_gib": 0.02, **settings}
    engine = MegatronEngine(
        ServeConfig(weights=str(weights), **fields), trained=None if trained is None else trained.model
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def room_for(blocks: int) -> float:
    """GiB of a cache of so many blocks; the engine sets one aside."""
    return (blocks + 1.5) * _BLOCK_BYTES / 2**30


def sample(engine: MegatronEngine, requests: Sequence[CompletionRequest]) -> list[Completion]:
    """All at once; the replies in the order of the requests."""

    async def run() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(run())
