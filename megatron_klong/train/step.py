"""One train step, for SFT and RL alike: forward and backward by Megatron's schedule, then one update.

Each batch is one micro-batch of packed rows; processes of one data-parallel rank pass the same batches (under context
parallelism each its part of them, see `parts_of_this_process`), each rank its share of the global batch. The loss
function decides what the gradient is, nothing else differs.

Always (tests/integration/train/test_sft.py): the loss is the sum over the trained tokens of the global batch divided
by their number, and so is its gradient, however rows are packed and shared out.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_klong.data.batch import PackedBatch
from megatron_klong.model.context_parallel import held_positions
from megatron_klong.train.loss import LossFunction, LossInput
from megatron_klong.train.optimizer import Training

type Sums = dict[str, torch.Tensor]  # each [] float64

_TOKENS = "tokens"
_TRAINED = "trained_tokens"
_LOSS = "loss"


class TrainingDiverged(RuntimeError):
    """Losses or gradients that are no finite numbers, or too long, once too often; or a batch that trains nothing.

    Its figures are those of the global batch, so every process raises it, at the same step.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Of one global batch, the same on every process. tokens: without padding; metrics: means per trained token.

    skipped: no update was made; skipped_steps: so far. expert_load: `ExpertBalance.largest_load`.
    """

    loss: float
    trained_tokens: int
    tokens: int
    grad_norm: float
    learning_rate: float
    skipped: bool
    skipped_steps: int
    expert_load: float
    metrics: Mapping[str, float]


def train_step(training: Training, batches: Sequence[PackedBatch], loss_function: LossFunction) -> StepResult:
    """Update the weights once on the global batch that this process holds `batches` of. Raises TrainingDiverged.

    An update that the guard does not accept is skipped: weights, optimizer and balance of the experts stay as they
    were; the schedule goes on.
    """
    learning_rate = training.learning_rate
    for chunk in training.wrapped:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    totals = _global_totals(forward_backward(training, batches, loss_function), training.device)
    means = _means(totals)
    grad_norm = training.prepare_gradients()
    accepted = training.guard.accepts(means[_LOSS], grad_norm)
    if accepted:
        training.update(grad_norm)
    else:
        training.balance.undo()
    training.schedule.step(1)
    if training.guard.gives_up or not totals[_TRAINED]:
        raise TrainingDiverged(
            f"step {training.schedule.num_steps} diverged: loss {means[_LOSS]}, gradient norm {grad_norm}, "
            f"{totals[_TRAINED]:.0f} trained tokens, {training.guard.skipped} steps skipped so far; start again to go "
            "on from the last checkpoint; if this comes back, delete that one and lower the learning rate"
        )
    return StepResult(
        loss=means.pop(_LOSS),
        trained_tokens=int(totals[_TRAINED]),
        tokens=int(totals[_TOKENS]),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        skipped=not accepted,
        skipped_steps=training.guard.skipped,
        expert_load=training.balance.largest_load(),
        metrics=means,
    )


def evaluate(
    training: Training, portions: Iterable[Sequence[PackedBatch]], loss_function: LossFunction
) -> dict[str, float]:
    """Means per trained token over all portions, `loss` among them; nothing is changed."""
    totals: Counter[str] = Counter()
    for batches in portions:
        with torch.no_grad():
            sums = forward_backward(training, batches, loss_function, forward_only=True)
        totals.update(_global_totals(sums, training.device))
    return _means(totals)


def forward_backward(
    training: Training, batches: Sequence[PackedBatch], loss_function: LossFunction, *, forward_only: bool = False
) -> list[Sums]:
    """Run the schedule; gradients end up reduced and scaled. Sums a micro-batch on the last stage, else nothing."""
    if not batches:
        raise ValueError("a process got no rows; give every data-parallel process the same number")
    sums: list[Sums] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, loss_function),
        # each chunk of the model passes all batches
        data_iterator=[iter(batches) for _ in training.wrapped],
        model=list(training.wrapped),
        num_microbatches=len(batches),
        # packed rows are laid end to end: to the schedule, a batch of one
        seq_length=int(batches[0].cu_seqlens[-1]),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return sums


def parts_of_this_process(batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """Under context parallelism a process holds a part of each window of its rows, else all of it."""
    size: int = parallel_state.get_context_parallel_world_size()
    rank: int = parallel_state.get_context_parallel_rank()
    if size == 1:
        return list(batches)
    return [batch.part(held_positions(batch.cu_seqlens.diff().tolist(), rank=rank, size=size)) for batch in batches]


def _forward_step(loss_function: LossFunction, batches: Iterator[PackedBatch], model: Any) -> tuple[torch.Tensor, Any]:
    """One micro-batch through this stage, and what turns the last stage's output into a loss."""
    batch = next(batches).to(next(model.parameters()).device)
    flat = partial(torch.reshape, shape=(1, -1))
    output = model(
        flat(batch.ids),
        flat(batch.positions),
        None,
        labels=flat(batch.labels),
        loss_mask=flat(batch.loss_mask),  # for multi-token prediction; the loss itself is the loss function's
        packed_seq_params=_packed(batch),
        padding_mask=_padding_of_this_stage(flat(batch.padding_mask), model),
    )
    return output, partial(_loss, loss_function, batch)


def _packed(batch: PackedBatch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.longest_window_tokens,
        max_seqlen_kv=batch.longest_window_tokens,
    )


def _padding_of_this_stage(padding_mask: torch.Tensor, model: Any) -> torch.Tensor:
    """Routers leave padding out of their balance. The model scatters the mask on its first stage only."""
    tensor_parallel: int = parallel_state.get_tensor_model_parallel_world_size()
    if tensor_parallel == 1 or get_attr_wrapped_model(model, "pre_process"):
        return padding_mask
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return padding_mask.chunk(tensor_parallel, dim=1)[rank]


def _loss(
    loss_function: LossFunction, batch: PackedBatch, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Sums]:
    """Megatron's triple: the loss to differentiate, the tokens it is later divided by, what to report."""
    # the model's output for labels is their cross entropy [1, rows * tokens], which is minus their log-probability
    log_probs = -token_losses.float().reshape(batch.labels.shape)
    output = loss_function(LossInput(log_probs=log_probs, batch=batch))
    reported = {
        _LOSS: output.loss_sum,
        _TRAINED: output.trained_tokens,
        _TOKENS: (~batch.padding_mask).sum(),
        **output.metric_sums,
    }
    sums = {name: value.detach().double() for name, value in reported.items()}
    return output.loss_sum, output.trained_tokens.int(), sums


def _global_totals(sums: Sequence[Sums], device: torch.device) -> dict[str, float]:
    """Sums of this process -> sums of the global batch, on every process."""
    names: list[str] = []
    total = torch.empty(0)
    if parallel_state.is_pipeline_last_stage():
        names = list(sums[0])
        total = torch.stack([torch.stack([part[name] for name in names]) for part in sums]).sum(0).to(device)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
    values: list[Any] = [dict(zip(names, total.tolist(), strict=True))]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast_object_list(values, src=last, group=group, device=device)
    totals: dict[str, float] = values[0]
    return totals


def _means(totals: Mapping[str, float]) -> dict[str, float]:
    """Per trained token; without the counts."""
    trained = max(totals[_TRAINED], 1.0)
    return {name: value / trained for name, value in totals.items() if name not in (_TRAINED, _TOKENS)}
