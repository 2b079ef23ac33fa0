"""Planned against measured peak memory of a train step, on layouts that the planner was not calibrated on.

For each case real processes build the model, wrap it for training and make two steps; the peak of the second one is
measured by counting the allocations of torch (megatron_klong/model/planner/measured.py), and compared with what the
planner says for that layout. The planner has no fitted constants: its programs of blocks (planner/*_program.py) were
written against the allocations of one small model of two layers. Experts are chosen by an untrained router, so each
process reports how many rows its experts got, and the planner is told that.

    planned_over_measured    by case: planned bytes of the process that held most / its measured bytes

The last line is JSON. `--only NAME` runs one case. On a machine with a GPU the same cases run there (not tried).
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_klong.model.config import LayoutConfig, ModelConfig, Precision, Recompute  # noqa: E402
from megatron_klong.model.planner.plan import StagePlan, make_plan  # noqa: E402
from megatron_klong.model.planner.shapes import Workload  # noqa: E402
from megatron_klong.model.presets import tiny  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
}
LARGE: dict[str, Any] = {
    **SMALL,
    "hidden_size": 512,
    "intermediate_size": 1280,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "use_qk_norm": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One train step. model: fields that differ from the tiny preset's."""

    model: dict[str, Any]
    layout: dict[str, int] = field(default_factory=dict)
    processes: int = 1
    row_tokens: int = 4096
    windows: int = 1
    micro_batches: int = 1
    precision: Precision = "fp32"
    recompute: Recompute = "none"
    vocabulary: int = 2048

    @property
    def config(self) -> ModelConfig:
        return tiny(self.vocabulary).model_copy(update=self.model)

    def plan(self, stage: int, imbalance: float, device: str) -> StagePlan:
        work = Workload(
            row_tokens=self.row_tokens,
            windows_per_row=self.windows,
            micro_batches=self.micro_batches,
            precision=self.precision,
            recompute=self.recompute,
            expert_imbalance=imbalance,
            device="gpu" if device == "cuda" else "cpu",
        )
        return make_plan(self.config, LayoutConfig(**self.layout), work, gpus=self.processes).stages[stage]


_PP2 = {"pipeline_parallel": 2}
_ALL = {"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 2}
CASES = {
    "small": Case(model=SMALL),
    "small packed recompute mlp": Case(model=SMALL, windows=5, row_tokens=5120, recompute="mlp"),
    "large packed recompute full": Case(model=LARGE, windows=3, row_tokens=6144, recompute="full"),
    "small bf16": Case(model=SMALL, row_tokens=2048, precision="bf16"),
    "small cp2": Case(model=SMALL, layout={"context_parallel": 2}, processes=2),
    "large cp2 packed recompute mlp": Case(
        model=LARGE, layout={"context_parallel": 2}, processes=2, windows=4, recompute="mlp"
    ),
    "small cp2 packed bf16 recompute full": Case(
        model=SMALL,
        layout={"context_parallel": 2},
        processes=2,
        windows=2,
        row_tokens=4096,
        precision="bf16",
        recompute="full",
    ),
    "small tp2 etp2 packed": Case(
        model=SMALL, layout={"tensor_parallel": 2, "expert_tensor_parallel": 2}, processes=2, windows=2
    ),
    "large ep2 packed": Case(model=LARGE, layout={"expert_parallel": 2}, processes=2, windows=2),
    "large pp2 recompute mlp": Case(model=LARGE, layout=_PP2, processes=2, micro_batches=3, recompute="mlp"),
    "small tp2 pp2 ep2 packed": Case(
        model=SMALL, layout=_ALL, processes=4, windows=3, row_tokens=3072, micro_batches=3
    ),
    "small mtp": Case(model={**SMALL, "num_nextn_predict_layers": 1}, windows=2),
}


def worker(case: Case, out: Path) -> None:
    """One process of a case: writes its stage, its peak and the share of rows that its experts got."""
    import megatron_klong.model.megatron_ready  # noqa: F401

    # isort: split
    import torch

    from megatron_klong.model.planner.measured import measure

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shares: list[float] = []
    peak = measure(lambda: prepare(case, shares), lambda step: step())
    from megatron.core import parallel_state

    from megatron_klong.model.parallel import destroy

    rank = torch.distributed.get_rank()
    found = {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "peak_bytes": peak.peak_bytes,
        "before_bytes": peak.before_bytes,
        "unseen_bytes": peak.unseen_bytes,
        "imbalance": sum(shares) / len(shares) if shares else 1.0,
        "device": device,
    }
    (out / f"{rank}.json").write_text(json.dumps(found))
    destroy()


def prepare(case: Case, shares: list[float]) -> Any:
    """Everything up to the first step, and that; returns what makes the second one."""
    import gc

    from megatron_klong.model.build import build_model
    from megatron_klong.model.parallel import initialize
    from megatron_klong.train.config import OptimizerConfig
    from megatron_klong.train.loss import cross_entropy
    from megatron_klong.train.optimizer import make_trainable
    from megatron_klong.train.step import parts_of_this_process, train_step

    layout = LayoutConfig(**case.layout)
    initialize(layout, seed=0)
    model = build_model(case.config, layout, precision=case.precision, recompute=case.recompute)
    training = make_trainable([model], OptimizerConfig(), steps=10)
    parts = parts_of_this_process(random_batches(case))
    train_step(training, parts, cross_entropy)
    gc.collect()  # the first step leaves cycles behind, and when Python sees to them is a matter of chance
    for layer in model.modules():
        if hasattr(layer, "linear_fc1") and hasattr(layer, "num_local_experts"):
            even = _even_rows(case, layout)
            layer.register_forward_pre_hook(lambda _, given, even=even: shares.append(len(given[0]) / even))
    return lambda: train_step(training, parts, cross_entropy)


def random_batches(case: Case) -> list[Any]:
    """A packed row for each micro-batch."""
    from megatron_klong.data.batch import pack

    row, multiple = tuple(range(case.windows)), LayoutConfig(**case.layout).window_multiple
    return [
        pack(_Windows(case, number), row, row_tokens=case.row_tokens, window_multiple=multiple)
        for number in range(case.micro_batches)
    ]


def _even_rows(case: Case, layout: LayoutConfig) -> float:
    """Rows that the experts of a process would get if all were chosen equally often."""
    tokens = case.row_tokens / layout.context_parallel / layout.tensor_parallel
    return tokens * case.config.num_experts_per_tok * layout.expert_tensor_parallel


class _Windows:
    """Random ids, in windows of one length."""

    def __init__(self, case: Case, seed: int) -> None:
        self._case, self._seed = case, seed

    def window(self, number: int) -> Any:
        import numpy as np

        from megatron_klong.data.shard import WindowTokens

        length = self._case.row_tokens // self._case.windows
        ids = np.random.default_rng([self._seed, number]).integers(0, self._case.vocabulary, length)
        return WindowTokens(ids=ids, loss_mask=np.arange(length) > 0, new_start=0)


def run(name: str, folder: Path) -> list[dict[str, Any]]:
    """Start a case's processes; what they found, by rank, with the plan beside it."""
    case = CASES[name]
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(case.processes)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, *(launcher if case.processes > 1 else []), str(Path(__file__))]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    made = subprocess.run(
        [*command, "--worker", name, "--out", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    if made.returncode:
        raise RuntimeError(f"case {name} failed:\n{made.stdout[-4000:]}")
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(case.processes)]
    for one in found:
        planned = case.plan(one["stage"], one["imbalance"], one["device"])
        one["planned_bytes"] = planned.training_bytes
        one["planned_held_bytes"] = planned.held_bytes
        one["ratio"] = planned.training_bytes / one["peak_bytes"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CASES), action="append", help="this case; may be given several times")
    parser.add_argument("--worker", choices=sorted(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(CASES[options.worker], options.out)
        return 0
    table = [["case", "rank", "stage", "imbalance", "weights and state", "planned peak", "measured peak", "ratio"]]
    ratios = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(options.only or CASES):
            found = run(name, Path(scratch) / str(number))
            for rank, one in enumerate(found):
                sizes = [one[key] / 2**20 for key in ("planned_held_bytes", "planned_bytes", "peak_bytes")]
                shown = [f"{size:.1f} MiB" for size in sizes]
                table.append(
                    [name, str(rank), str(one["stage"]), f"{one['imbalance']:.2f}", *shown, f"{one['ratio']:.3f}"]
                )
            ratios[name] = round(max(found, key=lambda one: one["peak_bytes"])["ratio"], 4)
    print("\n".join(aligned(table)))
    versions = {name: version(name) for name in ("torch", "megatron-core")} | {"python": platform.python_version()}
    print(json.dumps({"benchmark": "plan_memory", "ratios": ratios, "versions": versions}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
