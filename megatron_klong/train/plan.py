"""What an SFT run would do, for `--dry-run`: data, batch arithmetic, steps, memory; imports no torch."""

import os
from collections.abc import Iterator

from megatron_klong.data.blend import Blend
from megatron_klong.data.mixture import Mixture
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.planner.memory import PLANNER_ERROR, shown
from megatron_klong.model.planner.plan import make_plan
from megatron_klong.model.planner.shapes import Workload
from megatron_klong.tables import aligned
from megatron_klong.train.checkpoint import latest
from megatron_klong.train.config import SftConfig


def world_size() -> int:
    """As the launcher says; alone without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel_size(config: SftConfig) -> int:
    """Processes that share the rows of a batch."""
    layout = config.layout
    return world_size() // (layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel)


def plan(config: SftConfig, model: ModelConfig, data: Mixture) -> str:
    """Lines of comment below the resolved settings."""
    lines = [*_sources(config, data), *_batches(config, data.train), *_memory(config, model), *_start(config)]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _sources(config: SftConfig, data: Mixture) -> Iterator[str]:
    blend = data.train
    rounds = _rows(config, blend) / blend.positions_of(1)
    trained = sum(part.trained_tokens for part in blend.parts)
    rows = [("source", "windows", "tokens", "trained", "share", "epochs", "held out")]
    held = {part.name: len(part.windows) for part in data.validation.parts} if data.validation else {}
    for part, epochs in zip(blend.parts, blend.epochs_a_round, strict=True):
        rows.append(
            (
                part.name,
                f"{len(part.windows):,}",
                f"{int(part.source.lengths_tokens[part.windows].sum()):,}",
                f"{part.trained_tokens:,}",
                f"{part.trained_tokens * epochs / trained:.1%}",
                f"{rounds * epochs:.2f}",
                f"{held.pop(part.name, 0):,}",
            )
        )
    rows += [(name, "0", "0", "0", "0.0%", "0.00", f"{windows:,}") for name, windows in held.items()]
    yield from aligned(rows)


def _rows(config: SftConfig, blend: Blend) -> int:
    return config.steps_of(blend) * config.global_batch_rows


def _batches(config: SftConfig, blend: Blend) -> Iterator[str]:
    rows = blend.rows_of(0)
    tokens = sum(int(blend.lengths_tokens[list(row)].sum()) for row in rows)
    trained = sum(int(blend.trained_tokens[list(row)].sum()) for row in rows)
    parts, steps = data_parallel_size(config), config.steps_of(blend)
    batch = config.global_batch_rows
    each = tokens / len(rows)
    yield (
        f"rows: {len(rows):,} of {config.row_tokens:,} tokens in a round of the sources, "
        f"{tokens / (len(rows) * config.row_tokens):.2%} full; {trained / tokens:.1%} of their tokens are trained"
    )
    yield (
        f"batch: {batch} rows (about {batch * each:,.0f} tokens) = {parts} data-parallel shares of {batch // parts} "
        f"rows, on {world_size()} processes"
    )
    yield (
        f"steps: {steps:,}, about {steps * batch * each:,.0f} tokens, {_rows(config, blend) / len(rows):.2f} rounds "
        "of the sources"
    )


def _memory(config: SftConfig, model: ModelConfig) -> Iterator[str]:
    work = Workload(
        row_tokens=config.row_tokens,
        micro_batches=config.global_batch_rows // data_parallel_size(config),
        precision=config.precision,
        recompute=config.recompute,
    )
    made = make_plan(model, config.layout, work, gpus=world_size())
    stage = made.stages[made.worst_stage]
    yield (
        f"memory: {shown(stage.training_bytes)} a process on stage {made.worst_stage} of {len(made.stages)} "
        f"({shown(stage.held_bytes)} weights, gradients and optimizer), give or take {PLANNER_ERROR:.0%}; "
        "tools/plan_layout.py has the table"
    )


def _start(config: SftConfig) -> Iterator[str]:
    found, passed_over = latest(config.checkpoints_folder)
    random = f"random weights, {config.shape or config.preset}"
    yield f"start: {found.folder if found else config.hugging_face_init or config.megatron_init or random}"
    yield from (f"passed over: {reason}" for reason in passed_over)
