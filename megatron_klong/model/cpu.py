"""Let Megatron-Core 0.19 run on a machine without CUDA, by redirecting where it places things.

Device placement, streams and random states are redirected; sums, collectives and schedules stay Megatron's own (one
exception, `_uneven_collectives`, moves the same numbers by another call). Each function below is one entry with its
reason; entries for serving belong here too. With CUDA, `install` does nothing.

`install` runs before megatron is imported (see `megatron_ready`); after that, results are the same, but the small
functions that Megatron wraps at import are compiled at first use, which takes longer than a test.
"""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._device
from torch import distributed

_CPU = torch.device("cpu")
_FACTORIES = [
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
]

_installed = False
_device = _CPU  # what Megatron is told


def install() -> None:
    """Redirect everything, once; a no-op where CUDA is available."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    entries: tuple[Callable[[], None], ...] = (
        _no_compilation,
        _expected_warnings,
        _current_device,
        _factories,
        _moves,
        _streams,
        _synchronisation,
        _tensor_type_names,
        _uneven_collectives,
        # these two import parts of megatron, so they come last
        _random_states,
        _split_sizes_on_the_host,
    )
    for entry in entries:
        entry()


def _no_compilation() -> None:
    """Megatron wraps small functions in torch.compile, which costs a C++ compiler run each and gains nothing here."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _expected_warnings() -> None:
    """Megatron warns at import, many times over, that libraries for a GPU are not installed."""
    for message in ("Transformer Engine and Apex are not", "Apex is not", "absl.logging is not", "full scope is depr"):
        warnings.filterwarnings("ignore", message=message, module="megatron")


def _current_device() -> None:
    """Router, collectives and pipeline pass `device=torch.cuda.current_device()`."""
    _replace(torch.cuda, "current_device", lambda: _device)


@contextlib.contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """What Megatron takes for the current device meanwhile: `meta`, to build a model without its memory."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def _factories() -> None:
    """Schedules, optimizer and clipping make tensors with device="cuda"; rotary embedding pins an index in memory."""
    # `with torch.device("meta")` compares functions with a set that is built at first use. Built after this, it would
    # hold the wrappers, and the context manager would silently do nothing.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> torch.Tensor:
        device = options.get("device")
        if device is not None and str(device).startswith("cuda"):
            options["device"] = _CPU
        options.pop("pin_memory", None)
        return factory(*args, **options)

    return make


def _moves() -> None:
    """Optimizer, exchange of checkpoint shards and inference engine move or pin what is already in place."""
    _replace(torch.Tensor, "cuda", _itself)
    _replace(torch.Tensor, "pin_memory", _itself)
    _replace(torch.nn.Module, "cuda", _itself)


def _itself(moved: Any, *args: Any, **options: Any) -> Any:
    return moved


class _Stream:
    """A stream or an event where everything runs in order anyway."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def record(self, stream: "_Stream | None" = None) -> None: ...

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return self

    def wait(self, stream: "_Stream | None" = None) -> None: ...

    def wait_event(self, event: "_Stream") -> None: ...

    def wait_stream(self, stream: "_Stream") -> None: ...

    def synchronize(self) -> None: ...


def _streams() -> None:
    """Alltoall dispatcher, shared experts and data parallelism order their work on streams and events."""
    only = _Stream()
    _replace(torch.cuda, "Stream", _Stream)
    _replace(torch.cuda, "Event", _Stream)
    _replace(torch.cuda, "current_stream", lambda device=None: only)
    _replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def _synchronisation() -> None:
    """The pipeline's exchange, the optimizer and the writing of checkpoints wait for the device or free its cache."""
    _replace(torch.cuda, "synchronize", lambda device=None: None)
    _replace(torch.cuda, "empty_cache", lambda: None)


def _tensor_type_names() -> None:
    """The optimizer sorts parameters by names such as "torch.cuda.FloatTensor"; only Megatron is told those."""
    type_of = torch.Tensor.type

    def named(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        answer = type_of(tensor, *args, **options)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    _replace(torch.Tensor, "type", named)


def _uneven_collectives() -> None:
    """gloo gathers and scatters equal sizes only, but experts split by tensor and expert parallelism need others."""
    gather, scatter = distributed.all_gather, distributed.reduce_scatter

    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **options: Any) -> Any:
        if _same_shape(tensor_list):
            return gather(tensor_list, tensor, group=group, **options)
        sizes = [part.numel() for part in tensor_list]
        received = tensor.new_empty(sum(sizes))
        sent = tensor.reshape(-1).repeat(len(sizes))
        distributed.all_to_all_single(received, sent, sizes, [tensor.numel()] * len(sizes), group=group)
        for part, flat in zip(tensor_list, torch.split(received, sizes), strict=True):
            part.copy_(flat.view(part.shape))
        return None

    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = distributed.ReduceOp.SUM,
        group: Any = None,
        **options: Any,
    ) -> Any:
        if _same_shape(input_list):
            return scatter(output, input_list, op=op, group=group, **options)
        if op != distributed.ReduceOp.SUM:
            raise ValueError(f"reduce_scatter of unequal parts with {op} on a CPU; only the sum is there")
        count = len(input_list)
        received = output.new_empty(count * output.numel())
        sent = torch.cat([part.reshape(-1) for part in input_list])
        sizes = [part.numel() for part in input_list]
        distributed.all_to_all_single(received, sent, [output.numel()] * count, sizes, group=group)
        output.copy_(received.view(count, *output.shape).sum(0))
        return None

    _replace(distributed, "all_gather", all_gather)
    _replace(distributed, "reduce_scatter", reduce_scatter)


def _same_shape(tensors: Sequence[torch.Tensor]) -> bool:
    return all(tensor.shape == tensors[0].shape for tensor in tensors)


def _random_states() -> None:
    """Seeding, the random-state tracker and recomputation use the generator of the GPU: here, that of the CPU."""

    def state(*args: Any, **options: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **options: Any) -> None:
        torch.set_rng_state(new_state)

    for module in (torch.cuda, torch.cuda.random):
        _replace(module, "get_rng_state", state)
        _replace(module, "set_rng_state", set_state)
        _replace(module, "manual_seed", torch.manual_seed)

    from megatron.core.tensor_parallel import random

    _replace(random, "_get_cuda_rng_state", state)
    _replace(random, "_set_cuda_rng_state", set_state)
    # the tracker warns when the CPU's generator moves under it, which is the point here
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


def _split_sizes_on_the_host() -> None:
    """The alltoall dispatcher brings its split sizes to the host as numpy only from a GPU; gloo wants them so too."""
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", on_host)


def _replace(owner: Any, name: str, replacement: Any) -> None:
    """A name that is not there means another version of the library: fail here, not in the middle of a run."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner.__name__} has no {name}; this redirection is for megatron-core 0.19, torch 2.13")
    setattr(owner, name, replacement)
