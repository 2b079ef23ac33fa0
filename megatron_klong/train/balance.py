"""The balance of the experts: how unevenly a step used them, and the way back for a step that is not made.

GLM-4.5 keeps its experts evenly used by a bias on the router, which Megatron moves a little at the end of every
backward pass, whether the update is then made or not.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads


class ExpertBalance:
    """The routers of this process's part of the model, as of the last backward pass."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._routers: list[Any] = [
            router for module in modules for router in module.modules() if hasattr(router, "local_tokens_per_expert")
        ]
        self._tokens = torch.empty(0)
        self._biases: list[torch.Tensor] = []

    def finalize(self, *arguments: Any, **named: Any) -> None:
        """Megatron's end of a backward pass; what it is about to change is remembered."""
        if self._routers:
            self._tokens = torch.stack([router.local_tokens_per_expert for router in self._routers])
            self._biases = [router.expert_bias.clone() for router in self._routers]
        finalize_model_grads(*arguments, **named)

    def undo(self) -> None:
        """Put the biases back to where they were before the last backward pass."""
        for router, bias in zip(self._routers, self._biases, strict=True):
            router.expert_bias.copy_(bias)

    def largest_load(self) -> float:
        """Tokens of the busiest expert over the mean of its layer, in the layer where that is largest: 1 is even.

        Of the whole model and global batch, the same on every process; 0 before the first backward pass.
        """
        largest = torch.zeros((), device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        if self._routers and self._tokens.numel():
            tokens = self._tokens.clone()
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(tokens, group=group)
            largest = (tokens.max(dim=-1).values / tokens.mean(dim=-1).clamp(min=1e-9)).max().to(largest)
        stages = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=stages)
        return float(largest)
