"""All layouts of a model on so many GPUs: the best that fit, and for one that does not fit the nearest that does.

A layout fits if its plan does even with the planner's error on top. The best one costs least time (cost.py); of equal
ones that with less parallelism. The nearest one to a layout differs from it in the fewest settings, then by the fewest
doublings, then costs least.

Always (tests/unit/model/test_plan_search.py): what is proposed fits, and divides the model and the GPUs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from megatron_klong.config import ConfigError
from megatron_klong.model.config import LayoutConfig, ModelConfig, Recompute
from megatron_klong.model.planner.cost import cost
from megatron_klong.model.planner.memory import Memory
from megatron_klong.model.planner.plan import Plan, make_plan
from megatron_klong.model.planner.shapes import Workload

FIELDS = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "expert_tensor_parallel", "context_parallel")
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute.__value__)
_NODE_GPUS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is to be planned. recompute None: whichever is best. Micro-batches follow from `global_batch_rows`."""

    model: ModelConfig
    gpus: int
    memory: Memory
    work: Workload
    global_batch_rows: int
    recompute: Recompute | None = None
    serve_tokens: int = 0

    def plan(self, layout: LayoutConfig, recompute: Recompute) -> Plan:
        """Raises ConfigError where the layout cannot be."""
        replicas = layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel
        layout.check_world_size(self.gpus)
        data_parallel = self.gpus // replicas
        if self.global_batch_rows % data_parallel:
            raise ConfigError(
                f"global_batch_rows {self.global_batch_rows} cannot be shared by {data_parallel} data-parallel "
                f"processes; make it a multiple of {data_parallel}, or raise another parallelism"
            )
        work = replace(self.work, recompute=recompute, micro_batches=self.global_batch_rows // data_parallel)
        return make_plan(self.model, layout, work, gpus=self.gpus, serve_tokens=self.serve_tokens)


def best_plans(question: Question) -> list[Plan]:
    """Those that fit surely, the best first."""
    return sorted(filter(question.memory.fits_surely, all_plans(question)), key=_rank)


def nearest_plan(question: Question, plan: Plan) -> Plan | None:
    """The plan that fits and takes the fewest changes."""
    fitting = filter(question.memory.fits_surely, all_plans(replace(question, recompute=None)))
    return min(fitting, key=lambda other: (*_distance(plan, other), *_rank(other)), default=None)


def smallest_plan(question: Question) -> Plan:
    """The plan that needs least, fitting or not. Raises ConfigError where no layout is possible at all."""
    found = min(all_plans(question), key=lambda plan: plan.peak_bytes, default=None)
    if found is None:
        raise ConfigError(
            f"no layout of {question.gpus} GPUs divides this model and global_batch_rows "
            f"{question.global_batch_rows}; try a power of two for --gpus, and a multiple of it for --global-batch-rows"
        )
    return found


def cures(question: Question, *, doublings: int = 4) -> list[str]:
    """For a question that no layout answers: so many GPUs would do, or rows of so many tokens."""
    found = []
    for factor in (2**power for power in range(1, doublings + 1)):
        gpus = question.gpus * factor
        batch = math.lcm(question.global_batch_rows, gpus)
        if _answered(replace(question, gpus=gpus, recompute=None, global_batch_rows=batch)):
            found.append(f"use {gpus} GPUs")
            break
    for factor in (2**power for power in range(1, doublings + 1)):
        tokens = question.work.row_tokens // factor
        if _answered(replace(question, recompute=None, work=replace(question.work, row_tokens=tokens))):
            found.append(f"rows of {tokens:,} tokens")
            break
    return found


def _answered(question: Question) -> bool:
    return any(map(question.memory.fits_surely, all_plans(question)))


def all_plans(question: Question) -> Iterator[Plan]:
    """Every layout that divides model, GPUs and batch, with each way of recomputation."""
    for layout in _layouts(question):
        for recompute in [question.recompute] if question.recompute else RECOMPUTE:
            try:
                yield question.plan(layout, recompute)
            except ConfigError:  # does not divide
                break


def _layouts(question: Question) -> Iterator[LayoutConfig]:
    """Tensor parallelism stays in a node; experts are whole, since expert parallelism saves as much and costs less."""
    gpus, model = question.gpus, question.model
    for stages in _divisors(gpus, model.num_hidden_layers):
        for tensor in _divisors(gpus // stages, _NODE_GPUS):
            for context in _divisors(gpus // stages // tensor, gpus):
                for experts in _divisors(math.gcd(gpus // stages, model.n_routed_experts), model.n_routed_experts):
                    yield LayoutConfig(
                        tensor_parallel=tensor,
                        pipeline_parallel=stages,
                        expert_parallel=experts,
                        context_parallel=context,
                    )


def _divisors(number: int, most: int) -> Iterator[int]:
    return (divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)


def _rank(plan: Plan) -> tuple[float, ...]:
    layout = plan.layout
    parallel = (layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel, layout.expert_parallel)
    return (round(cost(plan).overhead, 3), *parallel)


def changes(before: Plan, after: Plan) -> list[tuple[str, object, object]]:
    """Field, its value before, its value after."""
    pairs = [(name, getattr(before.layout, name), getattr(after.layout, name)) for name in FIELDS]
    pairs.append(("recompute", before.work.recompute, after.work.recompute))
    pairs.append(("layers_per_stage", before.layout.layers_per_stage, after.layout.layers_per_stage))
    return [(name, old, new) for name, old, new in pairs if old != new]


def _distance(before: Plan, after: Plan) -> tuple[float, float]:
    changed = changes(before, after)
    numbers = [(old, new) for _, old, new in changed if isinstance(old, int) and isinstance(new, int)]
    return len(changed), round(sum(abs(math.log2(new / old)) for old, new in numbers), 3)
