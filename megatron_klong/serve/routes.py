"""Which experts each token went to, for requests that ask: what Megatron's record (0.19) lacks.

It lists the routers of every model that was ever built in the process, also that of the layer for multi-token
prediction, which samples nothing here; keeps what it recorded by blocks of the cache, and looks there for a request
that has finished after its blocks were given to others in the very step; and each stage of a pipeline knows of its own
layers only.

Always (tests/integration/serve: test_engine.py, test_layouts.py): the routes of a reply are those the model takes, of
all its layers, whatever else is in flight; there are none where a reply was read anew in between, or was
ended from outside: by a stop string, a deadline.
"""

from typing import Any

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import numpy
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import distributed


def record(model: GPTModel) -> None:
    """Have the routers of these layers recorded, and no others; before the engine is made."""
    RouterReplay.global_router_replay_instances[:] = [
        layer.mlp.router.router_replay for layer in model.decoder.layers if isinstance(layer.mlp, MoELayer)
    ]


def forget() -> None:
    """Have none recorded."""
    RouterReplay.clear_global_router_replay_instances()


class Routes:
    """Those of one engine's requests."""

    def __init__(self, engine: Any) -> None:
        self._blocks = _Blocks()
        engine.context.kv_block_allocator.block_routing = self._blocks

    def begin_step(self) -> None:
        self._blocks.given_away.clear()

    def of(self, finished: Any) -> Any:
        """[tokens - 1, expert layers, experts a token], or None where not all of it was recorded.

        All processes of a replica call this, for the same requests in the same order.
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        parts: list[Any] = [(len(RouterReplay.global_router_replay_instances), finished.routing_indices)]
        if (stages := distributed.get_world_size(group)) > 1:
            [part] = parts
            parts = [None] * stages
            distributed.all_gather_object(parts, part, group=group)
        recorded = [routes for routers, routes in parts if routers]  # a stage may have no layer with experts
        if not recorded or any(routes is None for routes in recorded):
            return None
        return numpy.concatenate(recorded, axis=1).tolist()


class _Blocks(dict[int, Any]):
    """Block of the cache -> what was recorded of its tokens; what is given away is still found in that step."""

    def __init__(self) -> None:
        super().__init__()
        self.given_away: dict[int, Any] = {}

    def pop(self, block: int, default: Any = None) -> Any:
        """Upstream calls this when a block gets another owner."""
        if block in self:
            self.given_away[block] = super().pop(block)
        return default

    def get(self, block: int, default: Any = None) -> Any:
        return self[block] if block in self else self.given_away.get(block, default)
