"""What the checkpoint of a run holds, as Megatron's sharded state, and how a run takes it back.

Weights, Adam's two moments and the fp32 weights it works on are addressed by the name of the model's parameter they
belong to, in its shape, never by their place in an optimizer. So any layout reads what any other wrote, also where
Megatron keeps one optimizer on one side and two on the other (experts reduced over other processes than the rest).
The count of updates and the schedule's place are saved once. Rates, betas and decay are not saved: the configuration
says them.

Always (tests/integration/train/test_checkpoints.py): what is in the state to save shares no memory with the model and
its optimizer on a CPU, so training may go on while it is written; on a GPU the copy to the host is the writer's.
"""

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import distributed

from megatron_klong.model.load_megatron import sharded_metadata
from megatron_klong.train.optimizer import Training


def state_to_save(training: Training) -> dict[str, Any]:
    """The whole state, at this moment; called by all processes at once."""
    model = _model_state(training)
    state = {
        "model": model,
        "optimizer": _optimizer_to_save(training, model),
        "updates": _updates(training),
        "schedule": training.schedule.state_dict(),
        "guard": training.guard.state_dict(),
        "random": _random_state(),
    }
    _copy_on_cpu(model)  # the optimizer's state is made of copies
    return state


def state_to_load(training: Training, *, random: bool) -> dict[str, Any]:
    """Where this process wants what, for Megatron to fill; called by all processes at once."""
    for optimizer in _optimizers(training):
        optimizer.load_state_dict(optimizer.state_dict())  # makes room for the moments
    model = _model_state(training)
    state = {"model": model, "optimizer": _optimizer_to_load(training, model)}
    return state | ({"random": _random_state()} if random else {})


def take_back(training: Training, loaded: Mapping[str, Any], *, random: bool) -> None:
    """Put weights, optimizer, schedule and, if asked to, random states into the run."""
    for number, chunk in enumerate(_chunks(training)):
        chunk.load_state_dict(loaded["model"][number], strict=False)  # strict is checked by the sharded load
    for number, optimizer in enumerate(_optimizers(training)):
        optimizer.load_parameter_state_from_fully_reshardable(loaded["optimizer"][number])
    for group in training.optimizer.param_groups:
        group["step"] = loaded["updates"]
    training.schedule.num_steps = 0  # loading adds to it
    training.schedule.load_state_dict(loaded["schedule"])
    training.guard.load_state_dict(loaded["guard"])
    if random:
        _set_random_state(loaded["random"])


def _chunks(training: Training) -> list[GPTModel]:
    """The parts of the model that this process holds."""
    return list(training.chunks)


def _optimizers(training: Training) -> list[Any]:
    """Megatron's distributed optimizers, which divide the parameters among them."""
    optimizers: list[Any] = training.optimizer.chained_optimizers
    return optimizers


def _model_state(training: Training) -> dict[int, Any]:
    chunks = enumerate(_chunks(training))
    return {number: chunk.sharded_state_dict(metadata=sharded_metadata()) for number, chunk in chunks}


def _optimizer_to_load(training: Training, model: Mapping[int, Any]) -> dict[int, Any]:
    """Numbered by optimizer in this process only; on disk a tensor is known by its parameter's name alone."""
    return {
        number: optimizer.sharded_param_state_fully_reshardable(model, True, sharded_metadata())
        for number, optimizer in enumerate(_optimizers(training))
    }


def _optimizer_to_save(training: Training, model: Mapping[int, Any]) -> list[Any]:
    """The tensors of Megatron's own `fully_reshardable` state, but copied three times on the way, not eight.

    Training stands still meanwhile; and only the process that will write a tensor holds it whole.
    """
    entries = {entry.data: entry for entry in _tensors(model)}
    state = []
    for optimizer in _optimizers(training):
        for key, parameter, value in _gathered(optimizer, lambda one: is_main_replica(entries[one].replica_id)):
            entry = entries[parameter]
            name = f"optimizer.state.{key}.{entry.key}"  # parts of one tensor, as experts may be, share it
            typed = {"dtype": value.dtype} if isinstance(entry, ShardedTensor) else {}
            state.append(replace(entry, key=name, data=value.reshape(entry.data.shape), **typed))
    return state


def _gathered(
    optimizer: Any, wanted: Callable[[torch.Tensor], bool]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """("param", the fp32 weight, or a moment's name; parameter; all of that tensor in host memory) of those wanted.

    Its pieces lie on the data-parallel processes, which call this together, buffer by buffer.
    """
    group = optimizer.data_parallel_group
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        (by_bucket,) = ranges.values()  # of one dtype
        for bucket, held in zip(buffer.buckets, by_bucket, strict=True):
            pieces = {one: optimizer._get_main_param_and_optimizer_states(one) for one in held["param_map"]}
            for key in ("param", *optimizer.optimizer_state_keys):
                part = bucket.grad_data.new_zeros(bucket.grad_data.numel() // group.size(), dtype=torch.float32)
                for parameter, places in held["param_map"].items():
                    place = places["gbuf_local"]
                    part[place.start : place.end] = pieces[parameter][key].detach()
                whole = part.new_empty(bucket.grad_data.numel())
                distributed.all_gather_into_tensor(whole, part, group=group)
                for parameter in filter(wanted, bucket.params_list):
                    start, end = bucket.param_to_index[parameter]
                    yield key, parameter, whole[start:end].to("cpu", copy=True)


def _updates(training: Training) -> int:
    """How often Adam has changed the weights; a process that holds none of a group's parameters has not counted."""
    counted = max((int(group.get("step", 0)) for group in training.optimizer.param_groups), default=0)
    most = torch.tensor(counted, device=training.device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)


def _tensors(model: Mapping[int, Any]) -> list[ShardedTensor | ShardedTensorFactory]:
    entries = nested_values(model)
    return [entry for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory)]


def _copy_on_cpu(model: Mapping[int, Any]) -> None:
    """What this process is the one to write."""
    for entry in _tensors(model):
        if entry.data.device.type == "cpu" and is_main_replica(entry.replica_id):
            entry.data = entry.data.detach().clone()


def _random_state() -> ShardedObject:
    """Of this rank: the generators of the CPU, of the device, and Megatron's named ones."""
    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "named": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", states, (distributed.get_world_size(),), (distributed.get_rank(),), replica_id=0)


def _set_random_state(states: Mapping[str, Any]) -> None:
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(states["named"])
