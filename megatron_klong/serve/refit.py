"""New weights into a model that is being served: all of them on every process, or none.

Always (tests/integration/serve/test_refit.py): what goes wrong on one process, before, while or after it reads, leaves
every process with the weights it had, bit for bit.
"""

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.resharding.refit import clear_all_caches, swap_model_weights
from torch import distributed

from megatron_klong.model.checkpoint_folder import MANIFEST, read_checkpoint
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.model.load_megatron import load_megatron

_SHAPE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("num_moe_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("add_qkv_bias", "qk_layernorm", "params_dtype"),
)


class RefitError(RuntimeError):
    """The weights were not replaced; the old ones are in place."""


def model_config(folder: Path) -> ModelConfig:
    """Of a folder in Hugging Face format, or of a checkpoint of ours. Raises ConfigError, CheckpointError."""
    return read_checkpoint(folder).model if _is_checkpoint(folder) else ModelConfig.from_hugging_face(folder)


def load(model: GPTModel, config: ModelConfig, folder: Path) -> None:
    """Fill the model from either format; all processes call this. Raises WeightsError, CheckpointError."""
    _reader(folder)([model], config, folder)


def replace_from_folder(model: GPTModel, config: ModelConfig, folder: Path, *, group: Any) -> None:
    """Read other weights of the same architecture; all processes call this. Raises RefitError on each of them."""
    read = _reader(folder)
    fault: str | None = None
    try:
        if difference := model_config(folder).difference(config):
            fault = f"{folder}: of another model than the one served ({difference})"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    _refuse(fault, group)  # or, if only some found that out, they would not take part in what all do to read
    _all_or_nothing(model, lambda: read([model], config, folder), group)


def replace_from_model(model: GPTModel, source: GPTModel | None, *, group: Any) -> None:
    """Take the weights of a model in the same process group, whatever its layout (Megatron's resharding).

    All processes call this; source: the part this process holds, if it holds one. Raises RefitError on each of them.
    """
    # found out before anything is sent, or one process would wait for what another one never sends
    differences = [] if source is None else [name for name in _SHAPE if _differ(source.config, model.config, name)]
    _refuse(f"weights of another model than the one served ({', '.join(differences)})" if differences else None, group)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        _all_or_nothing(model, lambda: swap_model_weights(source, model, backend), group)
    except RefitError:
        forget()
        raise


def forget() -> None:
    """What Megatron keeps from one exchange of weights to the next: half an exchange, or groups that are no more."""
    clear_all_caches()


def _differ(one: Any, other: Any, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


@torch.no_grad()
def _all_or_nothing(model: GPTModel, replace: Callable[[], None], group: Any) -> None:
    state = [*model.parameters(), *model.buffers()]
    held = [tensor.detach().to("cpu", copy=True) for tensor in state]
    fault: str | None = None
    try:
        replace()  # may put other buffers in the place of those of before
        state = [*model.parameters(), *model.buffers()]
        if not all(bool(tensor.isfinite().all()) for tensor in state if tensor.is_floating_point()):
            fault = "the weights hold numbers that are not finite"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    try:
        _refuse(fault, group)
    except RefitError:
        for tensor, before in zip((*model.parameters(), *model.buffers()), held, strict=True):
            tensor.copy_(before)
        raise


def _refuse(fault: str | None, group: Any) -> None:
    """Raises RefitError on every process if one of them has found a fault."""
    found: list[str | None] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, fault, group=group)
    if faults := [one for one in found if one is not None]:
        raise RefitError(faults[0])


def _reader(folder: Path) -> Callable[[Sequence[GPTModel], ModelConfig, Path], None]:
    return load_megatron if _is_checkpoint(folder) else load_hugging_face


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()
