"""SFT with real processes: it learns, its loss is the textbook's, and kills change nothing."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from megatron_klong.data.indexed import IndexedWriter
from megatron_klong.data.mixture import open_mixture
from megatron_klong.data.sources import SourceConfig
from megatron_klong.model.presets import tiny
from megatron_klong.train.checkpoint import latest
from megatron_klong.train.config import OptimizerConfig, SftConfig
from megatron_klong.train.metrics import FILE, read_metrics
from tests.conftest import REPOSITORY
from tests.integration.train.launcher import finish, kill, start, start_alone
from tests.unit.train.builders import ROW_TOKENS, mixture_of, small_shard

if TYPE_CHECKING:
    from transformers import Glm4MoeForCausalLM

HEAVY = {"torch", "megatron", "transformers"}
STEPS = 20
LAYOUT_FLAGS = {
    "data": ["--layout.tensor_parallel", "1"],
    "interleaved": ["--layout.pipeline_parallel", "2", "--layout.virtual_pipeline_parallel", "2"],
}
FLAGS = ("--steps", str(STEPS), "--save_every_steps", "5", "--optimizer.warmup_steps", "2")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shard(tmp_path_factory.mktemp("shard") / "sft")


@pytest.fixture(scope="module")
def undisturbed(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(shard, folder, *FLAGS))
    return folder


def losses(folder: Path) -> dict[int, float]:
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {int(line["step"]): line["loss"] for line in lines}


def test_two_processes_learn_and_leave_a_whole_run_folder(undisturbed: Path) -> None:
    course = losses(undisturbed)
    assert len(course) == STEPS
    assert course[1] == pytest.approx(5.8, abs=0.3)  # random weights on 320 ids: ln 320 = 5.77
    assert course[STEPS] < course[1] - 1.0
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == ["step_00000015", "step_00000020"]
    assert (undisturbed / "hugging_face" / "config.json").exists()
    assert (undisturbed / "config.toml").exists()


def in_step_8_or_later_of_a_run_with_a_checkpoint(folder: Path) -> bool:
    return len(read_metrics(folder)) >= 7 and (folder / "checkpoints" / "step_00000005").exists()


def while_the_second_checkpoint_is_written(folder: Path) -> bool:
    return (folder / "checkpoints" / ".step_00000010.tmp").exists()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(in_step_8_or_later_of_a_run_with_a_checkpoint, marks=pytest.mark.long),
        while_the_second_checkpoint_is_written,
    ],
)
def test_killed_and_resumed_the_losses_are_bit_for_bit_the_same(
    moment: Callable[[Path], bool], shard: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(shard, folder, *FLAGS)
    deadline = time.monotonic() + 120
    while not moment(folder) and time.monotonic() < deadline:
        time.sleep(0.001)
    kill(process)
    whole = sorted((folder / "checkpoints").glob("step_*"))
    assert whole
    assert losses(folder).keys() < losses(undisturbed).keys()
    with (folder / FILE).open("a") as file:
        file.write('{"step": 99, "lo')  # as a kill in the middle of a line leaves it
    output = finish(start(shard, folder, *FLAGS))
    assert f"resumed from {whole[-1]}" in output
    assert losses(folder) == losses(undisturbed)
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.long
def test_killed_while_saves_are_in_flight_the_newest_whole_one_is_gone_on_from(
    shard: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder, moments, cut_short = tmp_path / "run", random.Random(0), 0
    checkpoints = folder / "checkpoints"
    for _ in range(2):
        process = start(shard, folder, *FLAGS, "--save_every_steps", "1")
        before = sorted(path.name for path in checkpoints.glob("step_*"))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (
            sorted(path.name for path in checkpoints.glob("step_*")) == before or not list(checkpoints.glob(".*"))
        ):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))  # in the writing, between files and manifest, or in the step behind it
        kill(process)
        cut_short += len(list(checkpoints.glob(".*")))
        found, passed_over = latest(checkpoints)
        assert found is not None
        assert not passed_over
    assert cut_short
    output = finish(start(shard, folder, *FLAGS, "--save_every_steps", "1"))
    assert f"resumed from {found.folder}" in output
    assert losses(folder) == losses(undisturbed)
    assert not list(checkpoints.glob(".*"))


@pytest.mark.long
@pytest.mark.parametrize("layout", ["alone", "pipeline"])
def test_a_run_goes_on_in_another_layout(layout: str, shard: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000020")
    flags = ["--layout.pipeline_parallel", "2"] if layout == "pipeline" else []
    finish(start(shard, folder, *FLAGS, *flags, processes=1 if layout == "alone" else 2))
    assert losses(folder)[STEPS] == pytest.approx(losses(undisturbed)[STEPS], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--seed", "5"],
            "its run had other rows (sources, weights, validation_share, row_tokens, seed or what windows",
        ),
        (["--mtp_loss_weight", "0.3"], "of another model (mtp_loss_weight)"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    flags: list[str], message: str, shard: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    output = finish(start_alone(shard, folder, *FLAGS, *flags, environment={}), status=2)
    assert message in output
    assert losses(folder) == losses(undisturbed)


@pytest.mark.long
def test_a_partial_checkpoint_is_passed_over(shard: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    newest = folder / "checkpoints" / "step_00000020"
    largest = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    output = finish(start(shard, folder, *FLAGS))
    assert f"passed over a checkpoint: {largest}" in output
    assert "resumed from" in output
    assert "step_00000015" in output
    assert losses(folder) == losses(undisturbed)


@pytest.mark.parametrize(
    "layout",
    [
        *("data", "expert", "context"),
        pytest.param("interleaved", marks=pytest.mark.long),
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("tensor", "pipeline")),
    ],
)
def test_loss_and_gradient_of_a_global_batch_are_the_handwritten_ones(
    layout: str, shard: Path, reference: "tuple[Path, Glm4MoeForCausalLM]", tmp_path: Path
) -> None:
    weights, model = reference
    sources = blended(shard, tmp_path / "plain")
    expected = handwritten(model, sources, window_multiple=4 if layout == "context" else 1)
    flags = LAYOUT_FLAGS.get(layout) or [f"--layout.{layout}_parallel", "2"]
    for name, source in sources.items():
        flags += [f"--sources.{name}.shards", json.dumps(source.shards), f"--sources.{name}.kind", source.kind]
        flags += [f"--sources.{name}.weight", str(source.weight)]
    folder = tmp_path / "run"
    finish(start(shard, folder, "--shards", "[]", "--steps", "1", "--hugging_face_init", str(weights), *flags))
    (line,) = read_metrics(folder)
    assert line["trained_tokens"] == expected.trained_tokens
    assert line["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-4)
    by_source = {name: line[f"loss/{name}"] for name in sources}
    assert by_source == pytest.approx(expected.by_source, rel=1e-5)


@pytest.fixture(scope="module")
def reference(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, Glm4MoeForCausalLM]":
    """Weights, and the model that transformers makes of them."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.json").write_text(json.dumps(tiny(mixture_of(shard).vocabulary_size).to_hugging_face()))
    torch.manual_seed(1)
    model = Glm4MoeForCausalLM(Glm4MoeConfig.from_pretrained(folder, attn_implementation="eager"))
    for parameter in model.parameters():  # far from zero, so that a wrong gradient cannot hide
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder, model


def blended(shard: Path, plain: Path) -> dict[str, SourceConfig]:
    """Sub-trajectories, and plain documents that are mostly longer than a row."""
    with plain.with_name("plain.bin").open("wb") as file:
        writer = IndexedWriter(file, vocabulary_size=256, with_modes=False)
        for number in range(6):
            writer.add_sequences(np.arange(100 + 90 * number) * (number + 3) % 251, [100 + 90 * number], ())
    with plain.with_name("plain.idx").open("wb") as file:
        writer.write_index(file)
    return {
        "trajectories": SourceConfig(shards=(str(shard),), weight=0.3),
        "texts": SourceConfig(shards=(str(plain),), weight=0.7, kind="documents"),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    loss: float
    grad_norm: float
    trained_tokens: int
    by_source: dict[str, float]


def handwritten(model: "Glm4MoeForCausalLM", sources: dict[str, SourceConfig], *, window_multiple: int) -> Expected:
    """Of the first global batch: the sum over its trained tokens, window by window, by their number; its gradient."""
    rows = open_mixture(sources, row_tokens=ROW_TOKENS, seed=0, window_multiple=window_multiple).train
    totals, trained = torch.zeros(2), [0, 0]
    for position in range(4):
        for number in rows.row_at(position):
            window = rows.window(number)
            ids, mask = torch.from_numpy(window.ids).long(), torch.from_numpy(window.loss_mask)
            log_probs = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
            source = int(number >= len(rows.parts[0].windows))
            for place in mask.nonzero().flatten().tolist():
                totals[source] = totals[source] - log_probs[place - 1, ids[place]]
                trained[source] += 1
    assert min(trained) > 0
    loss = totals.sum() / sum(trained)
    model.zero_grad()
    loss.backward()
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return Expected(
        loss=loss.item(),
        grad_norm=float(torch.stack(squares).sum().sqrt()),
        trained_tokens=sum(trained),
        by_source={name: totals[n].item() / trained[n] for n, name in enumerate(sources)},
    )


def run_alone(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megatron_klong.train.sft", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def imported(made: "subprocess.CompletedProcess[str]") -> set[str]:
    return {line.rsplit("|", 1)[-1].strip() for line in made.stderr.splitlines() if line.startswith("import time:")}


def test_help_imports_no_torch() -> None:
    made = run_alone("--help")
    assert made.returncode == 0
    assert "--optimizer.warmup_steps" in made.stdout
    assert not imported(made) & HEAVY


def test_a_dry_run_prints_the_plan_imports_no_torch_and_writes_nothing(shard: Path, tmp_path: Path) -> None:
    config = tmp_path / "sft.toml"
    config.write_text(f'shards = ["{shard}"]\nrow_tokens = 256\nsteps = 10\nrun_folder = "{tmp_path / "run"}"\n')
    made = run_alone(str(config), "--dry-run", "--global_batch_rows", "2")
    assert made.returncode == 0, made.stderr
    assert "# steps: 10, about" in made.stdout
    assert "% full" in made.stdout
    assert "# start: random weights, tiny" in made.stdout
    assert not (tmp_path / "run").exists()
    assert not imported(made) & HEAVY


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "steps = 0"),
        (["--optimizer.lr", "1"], "unknown key optimizer.lr; the nearest valid key is optimizer.learning_rate"),
        (["--optimizer.warmup_steps", "9"], "warmup_steps 9 leaves nothing of 9 steps"),
        (["--row_tokens", "100"], "are longer than a row of 100 tokens"),
        (["--layout.tensor_parallel", "2"], "1 processes are no multiple of"),
        (["--layout.context_parallel", "2", "--row_tokens", "250"], "row_tokens 250 is no multiple of"),
        (["--shards", '["nowhere/sft"]'], "there is no finished shard at this prefix"),
        (["--hugging_face_init", "nowhere"], "nowhere: not readable"),
        (["--fp8", "delayed"], "fp8 = 'delayed' computes with bf16 weights; set precision to bf16"),
        (["--fp8", "mxfp8", "--precision", "bf16"], "fp8 = 'mxfp8': needs a GPU and Transformer Engine"),
        (["--optimizer.decay_steps", "3"], 'decay_steps: to be given with schedule = "wsd"'),
        (["--epochs", "2"], "steps and epochs: give one of them"),
        (["--sources.a.shards", '["x"]'], "shards and sources: give one of them"),
        (["--layout.virtual_pipeline_parallel", "2"], "virtual_pipeline_parallel 2 needs a pipeline"),
        (["--shards", "[]"], "shards and sources: give one of them"),
    ],
)
def test_what_a_user_gets_wrong_is_named(flags: list[str], message: str, shard: Path, tmp_path: Path) -> None:
    config = tmp_path / "sft.toml"
    config.write_text(f'shards = ["{shard}"]\nrow_tokens = 256\nsteps = 9\nrun_folder = "{tmp_path / "run"}"\n')
    made = run_alone(str(config), *flags)
    assert made.returncode == 2
    errors = "\n".join(line for line in made.stderr.splitlines() if not line.startswith("import time:"))
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_the_example_is_a_valid_configuration() -> None:
    from megatron_klong.config import load_config

    config = load_config(SftConfig, [REPOSITORY / "examples" / "quickstart" / "sft.toml"])
    assert config.optimizer != OptimizerConfig()
