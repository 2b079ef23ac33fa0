"""A plan for people, as an aligned table with a sentence of advice, and for programs, as JSON."""

from typing import Any

from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.planner.cost import cost
from megatron_klong.model.planner.memory import PLANNER_ERROR, Memory, shown, unit_of
from megatron_klong.model.planner.plan import Plan
from megatron_klong.model.planner.search import FIELDS, changes
from megatron_klong.tables import aligned

_SHORT = dict(zip(FIELDS, ("TP", "PP", "EP", "ETP", "CP"), strict=True))
_COLUMNS = (
    ("weights", "weights_bytes"),
    ("gradients", "gradients_bytes"),
    ("optimizer", "optimizer_bytes"),
    ("activations", "activations_bytes"),
    ("MoE buffers", "experts_bytes"),
    ("logits", "logits_bytes"),
    ("KV cache", "kv_cache_bytes"),
    ("total", "total_bytes"),
)
HONESTY = (
    "Error: on a CPU planned peaks were 0.98 to 1.05 of the measured ones on twelve layouts "
    f"(benchmarks/plan_memory.py); what fits has {PLANNER_ERROR:.0%} of what moves to spare. No GPU has been measured: "
    "its plans differ in what kernels keep and in the copies that gloo makes."
)


def short(layout: LayoutConfig) -> str:
    """TP2 PP4 EP8; what is 1 is left out."""
    parts = [f"{label}{getattr(layout, name)}" for name, label in _SHORT.items() if getattr(layout, name) > 1]
    return " ".join(parts) or "one process a model"


def table(plan: Plan, memory: Memory) -> list[str]:
    """A line a pipeline stage: what any of its GPUs holds at the worst moment of a step."""
    name, unit = unit_of(memory.total_bytes)
    rows = [[f"{name} by stage", "layers", "in flight", *(column for column, _ in _COLUMNS), "free"]]
    for number, stage in enumerate(plan.stages):
        sizes = [getattr(stage, attribute) for _, attribute in _COLUMNS]
        free = memory.usable_bytes - stage.total_bytes
        cells = [f"{size / unit:.1f}" for size in (*sizes, free)]
        rows.append([str(number), str(stage.layers), str(stage.in_flight), *cells])
    return aligned(rows)


def summary(plan: Plan, memory: Memory) -> list[str]:
    """What was planned, above the table."""
    work, layout = plan.work, plan.layout
    model = plan.model
    verdict = "fits" if memory.fits_surely(plan) else "is tight" if memory.fits(plan) else "does not fit"
    return [
        f"{short(layout)}, data parallel {plan.data_parallel}, recompute {work.recompute}, {work.precision}: {verdict}",
        f"{plan.gpus} GPUs of {shown(memory.total_bytes)}, of which {shown(memory.reserve_bytes)} are kept for the "
        "CUDA context, NCCL and fragmentation",
        f"rows of {work.row_tokens:,} tokens, {work.micro_batches} micro-batches a step; experts get up to "
        f"{work.expert_imbalance:g} of an even share; {model.num_hidden_layers} layers, "
        f"{model.n_routed_experts} experts",
    ]


def advice(plan: Plan, memory: Memory, nearest: Plan | None, cures: list[str]) -> str:
    """What fits; or the first thing that does not, and the nearest layout that does, or else what would help."""
    stage = plan.stages[plan.worst_stage]
    needed = f"stage {plan.worst_stage} needs {shown(stage.total_bytes)} of {shown(memory.usable_bytes)}"
    if memory.fits_surely(plan):
        return f"It fits: {needed}."
    first = memory.first_too_much(stage)
    trouble = f"{needed}, and the first thing that does not fit are its {first}"
    if memory.fits(plan):
        trouble = f"{needed}, which is less room than the planner's error of {PLANNER_ERROR:.0%}"
    verdict = "Tight" if memory.fits(plan) else "It does not fit"
    if nearest is None:
        cure = " or ".join(cures) or "use many more GPUs"
        return f"{verdict}: {trouble}. No layout of {plan.gpus} GPUs fits; {cure}."
    what = ", ".join(f"{name} {old or 'even'} -> {new or 'even'}" for name, old, new in changes(plan, nearest))
    return f"{verdict}: {trouble}. Nearest that fits: {what}."


def ranking(plans: list[Plan], memory: Memory) -> list[str]:
    """The best layouts, one a line."""
    names = ("tensor", "experts", "context", "data", "bubble", "recompute")
    rows = [["layout", "DP", "recompute", "peak", "estimated overhead", *names]]
    for plan in plans:
        priced = cost(plan)
        shares = [f"{getattr(priced, name):.0%}" for name in names]
        peak = shown(plan.peak_bytes)
        over = f"{priced.overhead:.0%}"
        rows.append([short(plan.layout), str(plan.data_parallel), plan.work.recompute, peak, over, *shares])
    return aligned(rows)


def as_json(plan: Plan, memory: Memory) -> dict[str, Any]:
    """Bytes everywhere."""
    return {
        "layout": {name: getattr(plan.layout, name) for name in FIELDS},
        "layers_per_stage": [stage.layers for stage in plan.stages],
        "gpus": plan.gpus,
        "data_parallel": plan.data_parallel,
        "recompute": plan.work.recompute,
        "precision": plan.work.precision,
        "row_tokens": plan.work.row_tokens,
        "micro_batches": plan.work.micro_batches,
        "expert_imbalance": plan.work.expert_imbalance,
        "memory_bytes": memory.total_bytes,
        "reserve_bytes": memory.reserve_bytes,
        "fits": memory.fits_surely(plan),
        "peak_bytes": plan.peak_bytes,
        "planner_error": PLANNER_ERROR,
        "estimated_overhead": round(cost(plan).overhead, 4),
        "stages": [
            {
                "parameters": stage.parameters,
                "in_flight": stage.in_flight,
                **{attribute: getattr(stage, attribute) for _, attribute in _COLUMNS},
            }
            for stage in plan.stages
        ],
    }
