"""A layer for multi-token prediction in training: it learns beside the model, or stays as it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.model.presets import tiny
from megatron_klong.train.config import OptimizerConfig
from megatron_klong.train.loss import cross_entropy
from megatron_klong.train.metrics import read_metrics
from megatron_klong.train.optimizer import make_trainable
from megatron_klong.train.step import train_step
from tests.integration.train.launcher import finish, start
from tests.unit.train.builders import mixture_of, small_shard


@pytest.mark.long
def test_it_is_trained_on_the_last_of_two_stages_and_exported_with_its_copies(tmp_path: Path) -> None:
    shard = small_shard(tmp_path / "sft")
    vocabulary = mixture_of(shard).vocabulary_size
    shape = tiny(vocabulary).model_copy(update={"num_nextn_predict_layers": 1})
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hugging_face()))
    flags = ["--shape", str(tmp_path / "config.json"), "--layout.pipeline_parallel", "2", "--steps", "12"]
    finish(start(shard, tmp_path / "run", *flags, "--export_initial", "true"))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5

    before = load_file(tmp_path / "run" / "initial_hugging_face" / "model.safetensors")
    after = load_file(tmp_path / "run" / "hugging_face" / "model.safetensors")
    own = [name for name in after if name.startswith("model.layers.4.")]
    assert len(own) > 20
    unmoved = [name for name in own if torch.equal(before[name], after[name])]
    assert not unmoved, unmoved
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert torch.equal(after[f"model.layers.4.{copy}.weight"], after[f"{original}.weight"])


def test_with_no_weight_in_the_loss_it_stays_bit_for_bit_as_it_is(tmp_path: Path) -> None:
    shard = small_shard(tmp_path / "sft")
    data = mixture_of(shard)
    rows = data.train.rows_of(0)[:2]
    moved: dict[float, set[str]] = {}
    for weight in (0.0, 0.1):
        changes = {"num_nextn_predict_layers": 1, "mtp_loss_weight": weight}
        initialize(LayoutConfig(), seed=3)
        try:
            model = build_model(tiny(data.vocabulary_size).model_copy(update=changes), LayoutConfig())
            training = make_trainable([model], OptimizerConfig(weight_decay=0.0), steps=1)
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            train_step(training, data.train.batches(rows, part=0, parts=1), cross_entropy)
            after = dict(model.named_parameters())
            moved[weight] = {name for name in before if not torch.equal(before[name], after[name])}
        finally:
            destroy()
    assert {name for name in moved[0.1] if name.startswith("mtp.")} == moved[0.1] - moved[0.0]
    assert len(moved[0.1] - moved[0.0]) > 20
