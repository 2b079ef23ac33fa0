"""One layout's plan: what each pipeline stage holds when it holds most, and whether that fits.

Always (benchmarks/plan_memory.py, tests/integration/model/test_plan_memory.py): on a CPU the total of the process that
holds most is within 10 % of the measured peak of its train step; 0.98 to 1.05 of it on the twelve layouts tried.
"""

import math
from dataclasses import dataclass

from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.planner.activations import peak_activations
from megatron_klong.model.planner.holdings import holding, stage_layers
from megatron_klong.model.planner.shapes import ELEMENT_BYTES, Workload, shapes
from megatron_klong.model.planner.state import kv_cache_bytes, state


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """Bytes that any rank of the stage holds at its worst moment of a train step; and while it serves."""

    layers: int
    in_flight: int
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    experts_bytes: int
    logits_bytes: int
    step_bytes: int
    kv_cache_bytes: int

    @property
    def held_bytes(self) -> int:
        """All the time."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def moving_bytes(self) -> int:
        """At the worst moment of forward and backward."""
        return self.activations_bytes + self.experts_bytes + self.logits_bytes

    @property
    def training_bytes(self) -> int:
        return self.held_bytes + max(self.moving_bytes, self.step_bytes)

    @property
    def serving_bytes(self) -> int:
        """Weights and cache; a server has neither gradients nor optimizer."""
        return self.weights_bytes + self.kv_cache_bytes

    @property
    def total_bytes(self) -> int:
        """Training and serving take turns."""
        return max(self.training_bytes, self.serving_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """By pipeline stage. `gpus` are all processes, the data-parallel ones included."""

    model: ModelConfig
    layout: LayoutConfig
    work: Workload
    gpus: int
    stages: tuple[StagePlan, ...]

    @property
    def worst_stage(self) -> int:
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].total_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.stages[self.worst_stage].total_bytes

    @property
    def data_parallel(self) -> int:
        layout = self.layout
        return self.gpus // (layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel)


def _in_flight(layout: LayoutConfig, rank: int, micro_batches: int) -> int:
    """How many micro-batches' activations a process keeps at most (1F1B; interleaved, in parts of its layers)."""
    behind, virtual = layout.pipeline_parallel - rank, layout.virtual_pipeline_parallel
    if virtual == 1:
        return min(behind, micro_batches)
    chunks = 2 * (behind - 1) + (virtual - 1) * layout.pipeline_parallel + 1
    return min(math.ceil(chunks / virtual), micro_batches)


def make_plan(model: ModelConfig, layout: LayoutConfig, work: Workload, *, gpus: int, serve_tokens: int = 0) -> Plan:
    """Raises ConfigError, naming the fields, where the layout divides neither the model nor the GPUs nor a row."""
    layout.check_model(model)
    layout.check_world_size(gpus)
    layout.check_row(work.row_tokens)
    here = shapes(model, layout, work)
    plans = []
    for number, stage in enumerate(stage_layers(model, layout)):
        held = holding(model, layout, stage)
        bytes_held = state(held, layout, work, processes=gpus)
        in_flight = _in_flight(layout, number, work.micro_batches)
        moving = peak_activations(here, stage, work, in_flight=in_flight)
        cache = kv_cache_bytes(
            model,
            layout,
            layers=len(stage.experts),
            tokens=serve_tokens,
            element_bytes=ELEMENT_BYTES[work.precision],
        )
        plans.append(
            StagePlan(
                layers=len(stage.experts),
                in_flight=in_flight,
                parameters=held.parameters,
                weights_bytes=bytes_held.weights_bytes,
                gradients_bytes=bytes_held.gradients_bytes,
                optimizer_bytes=bytes_held.optimizer_bytes,
                activations_bytes=moving.get("activations", 0),
                experts_bytes=moving.get("experts", 0),
                logits_bytes=moving.get("logits", 0),
                step_bytes=bytes_held.step_bytes,
                kv_cache_bytes=cache,
            )
        )
    return Plan(model=model, layout=layout, work=work, gpus=gpus, stages=tuple(plans))
