"""The program behind tools/plan_layout.py: its options, and from them the lines it prints."""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from megatron_klong.config import ConfigError
from megatron_klong.model.config import LayoutConfig, ModelConfig, Precision
from megatron_klong.model.planner.holdings import built_holding, holding, stage_layers, stage_rank
from megatron_klong.model.planner.memory import Memory, parse_bytes
from megatron_klong.model.planner.plan import Plan
from megatron_klong.model.planner.report import HONESTY, advice, as_json, ranking, summary, table
from megatron_klong.model.planner.search import (
    FIELDS,
    RECOMPUTE,
    Question,
    best_plans,
    cures,
    nearest_plan,
    smallest_plan,
)
from megatron_klong.model.planner.shapes import Workload
from megatron_klong.model.presets import PresetName, preset

_PRESETS: tuple[PresetName, ...] = get_args(PresetName.__value__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    parser.add_argument("--model", required=True, help=f"{', '.join(_PRESETS)}, or a config.json or its folder")
    parser.add_argument("--gpus", type=_positive, required=True)
    parser.add_argument("--gpu-memory", default="141GB", help="of one GPU: 141GB is 141e9 bytes, 80GiB 80 * 2^30")
    parser.add_argument("--reserve", help="not to be planned with; default: 4 GiB and 5 %% of the memory")
    parser.add_argument("--max-tokens", type=_positive, default=131072, help="length of a packed row")
    parser.add_argument("--global-batch-rows", type=_positive, default=128, help="rows an update")
    layout = parser.add_argument_group("layout", "without any of these the best is looked for; what is left out is 1")
    for name in FIELDS:
        layout.add_argument(f"--{name.replace('_', '-')}", type=_positive, metavar="N")
    layout.add_argument("--layers-per-stage", type=_counts, help="11,12,12,11 for example; default: as even as can be")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="default: as little as fits")
    parser.add_argument("--precision", choices=get_args(Precision.__value__), default="bf16")
    parser.add_argument(
        "--expert-imbalance",
        type=float,
        default=1.25,
        help="rows that the experts of one GPU get over an even share; routers are balanced over whole batches only",
    )
    parser.add_argument(
        "--serve-tokens", type=_natural, default=0, help="room in the KV cache of a server, all requests"
    )
    parser.add_argument("--top", type=_positive, default=5, help="so many of the best layouts")
    parser.add_argument("--json", action="store_true", help="for programs; bytes")


def run(options: argparse.Namespace) -> list[str]:
    """The lines to print. Raises ConfigError."""
    question = _question(options)
    given: dict[str, Any] = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    if options.layers_per_stage:
        given["layers_per_stage"] = options.layers_per_stage
    if given:
        plans = [_given_plan(question, LayoutConfig(**given))]
    else:
        plans = best_plans(question)[: options.top] or [smallest_plan(question)]
    plan = plans[0]
    check_against_model(plan)
    nearest, helps = None, list[str]()
    if not question.memory.fits_surely(plan):
        nearest = nearest_plan(question, plan)
        helps = [] if nearest else cures(question)
    advised = advice(plan, question.memory, nearest, helps)
    if options.json:
        found: dict[str, Any] = {
            "plans": [as_json(one, question.memory) for one in plans],
            "nearest": nearest and as_json(nearest, question.memory),
            "advice": advised,
        }
        return [json.dumps(found, indent=1)]
    lines = [*summary(plan, question.memory), "", "A GPU of each stage at the worst moment of a step:"]
    lines += [*table(plan, question.memory), "", advised]
    if nearest:
        lines += ["", *summary(nearest, question.memory)[:1], *table(nearest, question.memory)]
    if len(plans) > 1:
        lines += ["", "Best layouts that fit, by a rough estimate of what they cost on top of computing once:"]
        lines += ranking(plans, question.memory)
    return [*lines, "", HONESTY]


def check_against_model(plan: Plan) -> None:
    """Build each stage of the real model on the meta device. Raises RuntimeError if it is not what was planned."""
    from megatron_klong.model.meta import hide_gpus

    hide_gpus()
    for number, stage in enumerate(stage_layers(plan.model, plan.layout)):
        rank = stage_rank(plan.layout, number, plan.gpus)
        built = built_holding(plan.model, plan.layout, rank=rank, processes=plan.gpus)
        planned = holding(plan.model, plan.layout, stage)
        if built != planned:
            raise RuntimeError(
                f"stage {number} has {built.parameters} parameters where {planned.parameters} were planned; "
                "model/planner/holdings.py does not describe this model"
            )


def _given_plan(question: Question, layout: LayoutConfig) -> Plan:
    """With as little recomputation as fits, unless that is given too."""
    plans = [question.plan(layout, way) for way in ([question.recompute] if question.recompute else RECOMPUTE)]
    return next(filter(question.memory.fits_surely, plans), plans[-1])


def _question(options: argparse.Namespace) -> Question:
    if not options.expert_imbalance >= 1:
        raise ConfigError(f"--expert-imbalance {options.expert_imbalance} is below 1; an even share is 1")
    reserve = parse_bytes(options.reserve) if options.reserve else None
    work = Workload(
        row_tokens=options.max_tokens,
        precision=options.precision,
        expert_imbalance=options.expert_imbalance,
    )
    return Question(
        model=_model(options.model),
        gpus=options.gpus,
        memory=Memory.of(parse_bytes(options.gpu_memory), reserve),
        work=work,
        global_batch_rows=options.global_batch_rows,
        recompute=options.recompute,
        serve_tokens=options.serve_tokens,
    )


def _model(name: str) -> ModelConfig:
    for known in _PRESETS:
        if name == known:
            return preset(known)
    if not Path(name).exists():
        raise ConfigError(f"--model {name} is neither {', '.join(_PRESETS)} nor a config.json; give one of these")
    return ModelConfig.from_hugging_face(name)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number
