"""Any process's part of a model, without its memory and without the other processes: on the meta device.

Planning and conversion look at every rank of a layout this way, one after the other, in a single process: shapes,
names and places in a checkpoint are those of the real model, since it is the real model that is built. Always on the
path without CUDA: a program that uses this hides the GPUs first, with `hide_gpus()`, before torch is imported.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_klong.config import ConfigError
from megatron_klong.model.config import LayoutConfig, ModelConfig, Precision, Recompute

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def hide_gpus() -> None:
    """Let torch find no GPU in this process. Raises ConfigError if torch has been imported already and found one."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        raise ConfigError(
            "torch has been imported and found a GPU; call hide_gpus() before that, or hide them yourself"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def fake_rank(layout: LayoutConfig, *, rank: int, processes: int) -> Iterator[None]:
    """Megatron's process groups as rank `rank` of `processes` sees them; whoever communicates gets nothing.

    Raises ConfigError if the number of processes does not fit the layout, or if groups are there already.
    """
    import megatron_klong.model.megatron_ready  # noqa: F401

    # isort: split
    import torch
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_klong.model.parallel import destroy, initialize_groups

    if torch.cuda.is_available():
        raise ConfigError("a model on the meta device is built where no GPU is seen; call hide_gpus() first")
    if distributed.is_initialized():
        raise ConfigError("process groups are there already; call destroy() first")
    layout.check_world_size(processes)
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        initialize_groups(layout, seed=0, gloo=False)
        yield
    finally:
        destroy()


def build_on_meta(
    config: ModelConfig, layout: LayoutConfig, *, precision: Precision = "bf16", recompute: Recompute = "none"
) -> "GPTModel":
    """What `build_model` builds on this (fake) rank, with every parameter on the meta device."""
    import megatron_klong.model.megatron_ready  # noqa: F401

    # isort: split
    import torch

    from megatron_klong.model import cpu
    from megatron_klong.model.build import build_model

    with cpu.current_device(torch.device("meta")), torch.device("meta"):
        return build_model(config, layout, precision=precision, recompute=recompute, initialize_weights=False)
