"""bf16 from existing weights: what the model keeps in fp32 is read, trained, saved and exported in fp32."""

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face, save_hugging_face
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.train.config import OptimizerConfig
from megatron_klong.train.metrics import read_metrics
from megatron_klong.train.optimizer import make_trainable
from tests.integration.train.launcher import finish, start
from tests.integration.train.weights import BIAS, write_weights
from tests.unit.train.builders import small_shard


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("weights") / "fp32"
    return folder, write_weights(folder)


def biases(folder: Path) -> Mapping[str, torch.Tensor]:
    found = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.endswith("e_score_correction_bias")}
    assert len(found) == 3
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    return found


def test_wrapping_for_bf16_changes_no_fp32_value(weights: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    folder, config = weights
    initialize(LayoutConfig(), seed=2)
    try:
        model = build_model(config, LayoutConfig(), precision="bf16")
        load_hugging_face([model], config, folder)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        training = make_trainable([model], OptimizerConfig(), steps=1)
        after = dict(training.chunks[0].named_buffers())
        save_hugging_face(training.chunks, config, tmp_path / "exported")
    finally:
        destroy()
    assert {name.rpartition(".")[2] for name in before} == {"expert_bias", "local_tokens_per_expert"}
    assert all(after[name].dtype == torch.float32 for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all((before[name] != before[name].bfloat16()).any() for name in before if name.endswith(BIAS))
    written, read = biases(tmp_path / "exported"), biases(folder)
    assert all(torch.equal(written[name], read[name]) for name in read)


@pytest.mark.long
def test_a_bf16_run_moves_the_bias_by_whole_steps_and_resumes_bit_for_bit(
    weights: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    folder, config = weights
    shard, run = small_shard(tmp_path / "sft"), tmp_path / "run"
    flags = ("--precision", "bf16", "--hugging_face_init", str(folder), "--steps", "2", "--save_every_steps", "1")
    finish(start(shard, run, *flags))
    trained, read = biases(run / "hugging_face"), biases(folder)
    rate = config.router_bias_update_rate
    for name, bias in read.items():  # two steps, each up, down or nowhere
        reachable = [bias + first * rate + second * rate for first, second in itertools.product((-1, 0, 1), repeat=2)]
        assert torch.stack([value == trained[name] for value in reachable]).any(0).all()
        assert (trained[name] != bias).any()

    undisturbed = [line["loss"] for line in read_metrics(run)]
    exported = (run / "hugging_face" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    shutil.rmtree(run / "hugging_face")
    assert "resumed from" in finish(start(shard, run, *flags))
    assert [line["loss"] for line in read_metrics(run)] == undisturbed
    assert (run / "hugging_face" / "model.safetensors").read_bytes() == exported
