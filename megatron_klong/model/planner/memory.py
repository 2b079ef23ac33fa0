"""The memory of a GPU, and what of it a plan may use."""

import re
from dataclasses import dataclass

from megatron_klong.config import ConfigError
from megatron_klong.model.planner.plan import Plan, StagePlan

PLANNER_ERROR = 0.10
"""How far planned and measured peaks may be apart, on a CPU (benchmarks/plan_memory.py); no GPU was measured."""

_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12}
_CONTEXT_BYTES = 4 * 2**30
_FRAGMENTED_SHARE = 0.05

PARTS = (
    ("weights", "weights_bytes"),
    ("gradients", "gradients_bytes"),
    ("optimizer states", "optimizer_bytes"),
    ("activations", "activations_bytes"),
    ("MoE buffers", "experts_bytes"),
    ("logits", "logits_bytes"),
)
"""What a train step consists of, in the order in which memory is spent."""


def parse_bytes(text: str) -> int:
    """141GB (10^9), 80GiB (2^30). Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is no amount of memory; write it like 141GB or 80GiB")
    return round(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Of one GPU. reserve_bytes: CUDA context and NCCL's buffers (4 GiB together) and fragmentation (5 %)."""

    total_bytes: int
    reserve_bytes: int

    @classmethod
    def of(cls, total_bytes: int, reserve_bytes: int | None = None) -> "Memory":
        if reserve_bytes is None:
            reserve_bytes = _CONTEXT_BYTES + round(_FRAGMENTED_SHARE * total_bytes)
        if reserve_bytes >= total_bytes:
            raise ConfigError(
                f"a reserve of {shown(reserve_bytes)} leaves nothing of {shown(total_bytes)}; lower --reserve, or "
                "raise --gpu-memory"
            )
        return cls(total_bytes=total_bytes, reserve_bytes=reserve_bytes)

    @property
    def usable_bytes(self) -> int:
        return self.total_bytes - self.reserve_bytes

    def fits(self, plan: Plan) -> bool:
        return plan.peak_bytes <= self.usable_bytes

    def fits_surely(self, plan: Plan) -> bool:
        """Also if what moves is larger than planned by the planner's error."""
        return all(
            max(stage.held_bytes + (1 + PLANNER_ERROR) * stage.moving_bytes, stage.total_bytes) <= self.usable_bytes
            for stage in plan.stages
        )

    def first_too_much(self, stage: StagePlan) -> str:
        """The first part with which the stage no longer fits; empty where it does."""
        spent = 0
        for name, attribute in PARTS:
            spent += getattr(stage, attribute)
            if spent > self.usable_bytes:
                return name
        return "KV cache" if stage.total_bytes > self.usable_bytes else ""


def unit_of(size: float) -> tuple[str, int]:
    """In which unit a size of that order is shown."""
    return ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)


def shown(size: float) -> str:
    """For people."""
    name, unit = unit_of(size)
    return f"{size / unit:.1f} {name}"
