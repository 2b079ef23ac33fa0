"""Let Megatron-Core's dynamic inference engine run without CUDA: what model/cpu.py does, for serving.

What the model computes, attention over the paged cache among it, is in cpu_layers.py; where tensors are placed and
pinned is model/cpu.py's affair. With CUDA, `install` does nothing.
"""

from collections import defaultdict

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import torch
from megatron.core.inference import communication_utils
from megatron.core.inference.contexts import dynamic_context

_installed = False


def install() -> None:
    """Redirect everything, once; a no-op where CUDA is available."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _memory_figures()
    _cache_writes()
    _stages()
    _rounding()


def _memory_figures() -> None:
    """The engine reports how much device memory it took."""
    torch.cuda.memory_stats = lambda device=None: defaultdict(int)


def _cache_writes() -> None:
    """triton can be imported next to a CUDA build of torch, and then a kernel of its would be taken."""
    dynamic_context.triton_append_key_value_cache = None


def _stages() -> None:
    """What stages of a pipeline exchange is checked to be on the device."""
    communication_utils._is_cuda = lambda tensor: None


def _rounding() -> None:
    """Steps are filled up to a multiple of 64 tokens, for CUDA graphs and kernels; here that is only work."""
    dynamic_context.DynamicInferenceContext.TOKEN_ROUNDER = 1
