"""The recipe for GLM-4.5-Air: each stage loads with each overlay, divides the model, and fits as it is planned."""

from dataclasses import dataclass

import pytest

from megatron_klong.config import load_config
from megatron_klong.model.planner.memory import Memory, parse_bytes
from megatron_klong.model.planner.report import table
from megatron_klong.model.planner.search import Question
from megatron_klong.model.planner.shapes import Workload
from megatron_klong.model.presets import preset
from megatron_klong.train.config import SftConfig
from tests.conftest import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "glm45_air_106b"
MODEL = preset("glm45-air")
STAGES = ("comprehensive", "sft")
EXPERT_IMBALANCE = 1.25  # what tools/plan_layout.py plans with


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    gpus: int
    gpu_memory: str
    overlays: tuple[str, ...] = ()


CLUSTERS = (
    Cluster(gpus=128, gpu_memory="141GB"),
    Cluster(gpus=64, gpu_memory="141GB"),
    Cluster(gpus=128, gpu_memory="80GB", overlays=("h100",)),
    Cluster(gpus=64, gpu_memory="80GB", overlays=("h100_64",)),
)


def loaded(stage: str, cluster: Cluster) -> SftConfig:
    return load_config(SftConfig, [EXAMPLE / f"{name}.toml" for name in (stage, *cluster.overlays)])


def question(config: SftConfig, cluster: Cluster) -> Question:
    work = Workload(
        row_tokens=config.row_tokens, precision=config.precision, expert_imbalance=EXPERT_IMBALANCE, device="gpu"
    )
    return Question(
        model=MODEL,
        gpus=cluster.gpus,
        memory=Memory.of(parse_bytes(cluster.gpu_memory)),
        work=work,
        global_batch_rows=config.global_batch_rows,
    )


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda cluster: f"{cluster.gpus}x{cluster.gpu_memory}")
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_divides_the_model_and_fits_its_gpus_with_the_figures_of_the_readme(
    stage: str, cluster: Cluster
) -> None:
    config = loaded(stage, cluster)
    config.layout.check_model(MODEL)
    config.layout.check_world_size(cluster.gpus)
    config.layout.check_row(config.row_tokens)
    asked = question(config, cluster)
    plan = asked.plan(config.layout, config.recompute)  # raises where the batch cannot be shared
    assert asked.memory.fits_surely(plan), f"{plan.peak_bytes / 2**30:.1f} GiB planned"
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    for line in table(plan, asked.memory)[1:]:
        assert line in readme


@pytest.mark.parametrize("stage", STAGES)
def test_without_an_overlay_an_h100_would_not_do(stage: str) -> None:
    cluster = Cluster(gpus=128, gpu_memory="80GB")
    config = loaded(stage, cluster)
    asked = question(config, cluster)
    assert not asked.memory.fits(asked.plan(config.layout, config.recompute))


def test_an_overlay_changes_the_layout_and_nothing_else() -> None:
    for stage in STAGES:
        base = loaded(stage, CLUSTERS[0])
        for cluster in CLUSTERS:
            assert loaded(stage, cluster).model_copy(update={"layout": base.layout}) == base


def test_the_second_stage_starts_from_the_checkpoints_of_the_first() -> None:
    first, second = (loaded(stage, CLUSTERS[0]) for stage in STAGES)
    assert second.megatron_init == str(first.checkpoints_folder)
    assert second.optimizer.learning_rate < first.optimizer.learning_rate


def test_the_shares_of_the_sources_sum_to_one() -> None:
    for stage in STAGES:
        sources = loaded(stage, CLUSTERS[0]).model_dump()["sources"].values()
        assert sum(source["weight"] for source in sources) == pytest.approx(1)
