"""A script for two processes: new weights on both, then what engines of several layouts answer. In and out: JSON.

One start for all of it, which takes longer than what is done then.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tests.integration.serve.without_wandb  # noqa: F401

# isort: split
import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
from torch import distributed

from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.parallel import destroy, initialize, initialize_groups
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.engine import MegatronEngine
from megatron_klong.serve.protocol import Completion, CompletionRequest
from tests.integration.serve import refit_on_ranks


def main(weights: str, other: str, checkpoint: str, asked: str, found: str) -> None:
    """checkpoint: of other.  asked: layouts by name, and groups of requests that are sent at once."""
    layouts, groups = json.loads(Path(asked).read_text())
    layout = LayoutConfig(tensor_parallel=2)
    initialize(layout, seed=0)
    refit_on_ranks.check(weights, other, checkpoint, layout)
    replies = {name: answers(weights, LayoutConfig(**fields), groups) for name, fields in layouts.items()}
    if distributed.get_rank() == 0:
        Path(found).write_text(json.dumps(replies))
    destroy()


def answers(weights: str, layout: LayoutConfig, groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Any]]:
    """On rank 0; nothing elsewhere."""
    parallel_state.destroy_model_parallel()
    initialize_groups(layout, seed=0)
    engine = MegatronEngine(
        ServeConfig(
            weights=weights,
            layout=layout,
            max_sequence_length=192,
            step_tokens=64,
            block_tokens=16,
            kv_cache_gib=0.005,
            routes=True,
        )
    )
    if distributed.get_rank():
        engine.follow()
        return []
    engine.start()
    made = [
        [completion.model_dump(mode="json") for completion in asyncio.run(sample(engine, group))] for group in groups
    ]
    engine.stop()
    return made


async def sample(engine: MegatronEngine, group: Sequence[Mapping[str, Any]]) -> list[Completion]:
    requests = [CompletionRequest.model_validate_json(json.dumps(fields)) for fields in group]
    return await asyncio.gather(*(engine.generate(request) for request in requests))


if __name__ == "__main__":
    main(*sys.argv[1:])
