"""A model made trainable: Megatron's data parallelism, distributed optimizer and learning-rate schedule around it.

Always: gradients are summed over tokens and divided once, by the trained tokens of the global batch
(`calculate_per_token_loss`); gradients and Adam's state are fp32 whatever the weights are, and what a bf16 model keeps
in fp32 stays so, bit for bit (tests/integration/train/test_precision.py); every data-parallel process starts from the
weights of the first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_klong.train import adam, padding
from megatron_klong.train.balance import ExpertBalance
from megatron_klong.train.config import OptimizerConfig
from megatron_klong.train.guard import UpdateGuard


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a train step changes. `chunks` are the bare model, `wrapped` the same weights with their gradients."""

    chunks: tuple[GPTModel, ...]
    wrapped: tuple[DistributedDataParallel, ...]
    optimizer: Any  # megatron's ChainedOptimizer, which has no types
    schedule: OptimizerParamScheduler
    balance: ExpertBalance
    guard: UpdateGuard

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.chunks[0].parameters()).device
        return device

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def prepare_gradients(self) -> float:
        """Hand the reduced gradients to the optimizer; their norm over the whole model."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    def update(self, grad_norm: float) -> None:
        """One update by the gradients prepared, which have this norm.

        With `prepare_gradients` it does what the optimizer's own `step` does, which lets nobody see the norm between.
        """
        for optimizer in self.optimizer.chained_optimizers:
            if parameters := optimizer.get_parameters():
                clip_grad_by_total_norm_fp32(parameters, max_norm=optimizer.config.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()


def make_trainable(chunks: Sequence[GPTModel], config: OptimizerConfig, *, steps: int) -> Training:
    """Wrap a model whose weights are final: the optimizer copies them. chunks: all that this process holds of it."""
    if not all(chunk.config.calculate_per_token_loss for chunk in chunks):
        raise ValueError("the model must be built with calculate_per_token_loss=True: the loss is a mean over tokens")
    wrapped = tuple(_with_gradients(chunk) for chunk in chunks)
    adam.use_where_missing()
    padding.mend_router()
    optimizer = megatron_optimizer.get_megatron_optimizer(_optimizer_config(chunks[0], config), list(wrapped))
    balance = ExpertBalance(chunks)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = balance.finalize
        chunk.config.grad_scale_func = optimizer.scale_loss
    return Training(
        chunks=tuple(chunks),
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=_schedule(optimizer, config, steps),
        balance=balance,
        guard=UpdateGuard(spike_factor=config.spike_factor, max_skipped=config.max_skipped_steps),
    )


def _with_gradients(chunk: GPTModel) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(
        chunk.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
        ),
        _in_bf16(chunk) if chunk.config.bf16 else chunk,
    )
    wrapped.broadcast_params()
    return wrapped


def _in_bf16(model: GPTModel) -> Float16Module:
    """Megatron's wrapper rounds all of a model to bf16; here what was fp32 gets its very values back.

    That is the bias which balances the experts, whose steps of 0.001 bf16 cannot hold, and the count of tokens that
    each expert got, which in bf16 is exact only up to 256.
    """
    fp32 = {name: tensor.data for name, tensor in _tensors(model) if tensor.dtype == torch.float32}
    wrapped = Float16Module(model.config, model)
    for name, tensor in _tensors(model):
        if name in fp32:
            tensor.data = fp32[name]
    return wrapped


def _tensors(model: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _optimizer_config(model: GPTModel, config: OptimizerConfig) -> megatron_optimizer.OptimizerConfig:
    return megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad_norm,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=True,
    )


def _schedule(optimizer: Any, config: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if config.schedule == "wsd" else config.schedule,
        wsd_decay_steps=config.decay_steps,
        lr_wsd_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # the configuration says how the rate falls, the checkpoint only how far it has come
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
