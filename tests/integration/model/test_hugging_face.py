"""Weights from and to a folder in Hugging Face format, on one process; other layouts: test_parity.py."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_klong.model import tensor_files
from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.hugging_face import WeightsError, load_hugging_face, save_hugging_face
from megatron_klong.model.parallel import destroy, initialize
from tests.integration.model.launch import kill_in_its_work
from tests.integration.model.reference import CONFIG, write_reference

LAYOUT = LayoutConfig()
EXPERT = "model.layers.2.mlp.experts.5.gate_proj.weight"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    write_reference(folder)
    return folder


@pytest.fixture(autouse=True)
def _process_groups() -> Iterator[None]:
    initialize(LAYOUT, seed=1)
    yield
    destroy()


def _changed(reference: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of the weights in which some tensors are others, or are gone."""
    shutil.copytree(reference / "weights", folder)
    file = folder / "model.safetensors"
    tensors: dict[str, Any] = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({EXPERT: None}, f"1 tensors missing: {EXPERT}"),
        ({"model.layers.4.enorm.weight": torch.ones(64)}, "1 tensors not of this model: model.layers.4.enorm.weight"),
        ({EXPERT: torch.ones(32, 72)}, f"{EXPERT} has shape [32, 72], the model needs [32, 64]"),
        (
            {"model.layers.0.self_attn.k_proj.weight": torch.ones(64, 64)},
            "model.layers.0.self_attn.k_proj.weight has shape [64, 64], the model needs [32, 64]",
        ),
    ],
    ids=["missing", "extra", "misshapen expert", "misshapen keys"],
)
def test_weights_that_do_not_fit_stop_with_the_name(
    reference: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = _changed(reference, tmp_path / "weights", **changes)
    with pytest.raises(WeightsError, match=re.escape(message)) as raised:
        load_hugging_face([build_model(CONFIG, LAYOUT)], CONFIG, folder)
    assert str(folder) in str(raised.value)


def test_a_folder_without_weights_and_a_file_cut_short_are_refused(reference: Path, tmp_path: Path) -> None:
    model = build_model(CONFIG, LAYOUT)
    with pytest.raises(WeightsError, match=r"no \*\.safetensors there"):
        load_hugging_face([model], CONFIG, tmp_path)
    content = (reference / "weights" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="not readable"):
        load_hugging_face([model], CONFIG, tmp_path)


def test_a_model_trained_from_scratch_loads_in_transformers_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 300_000)  # several files and an index
    config = CONFIG.model_copy(update={"eos_token_id": (7, 8), "partial_rotary_factor": 1.0})
    model = build_model(config, LAYOUT).eval()
    save_hugging_face([model], config, tmp_path / "exported")
    files = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert len(files) > 4
    assert files[0] == "config.json"
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.eos_token_id == [7, 8]
    ids = torch.arange(40)[None]
    assert (model(ids, ids, None) - loaded(ids).logits).abs().max() < 1e-5
    assert ModelConfig.from_hugging_face(tmp_path / "exported") == config


def test_bf16_weights_go_through_bit_for_bit_with_the_bias_in_fp32(reference: Path, tmp_path: Path) -> None:
    fp32 = load_file(reference / "weights" / "model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in fp32.items() if not name.endswith("correction_bias")}
    folder = _changed(reference, tmp_path / "weights", **halved)
    model = build_model(CONFIG, LAYOUT, precision="bf16")
    load_hugging_face([model], CONFIG, folder)
    save_hugging_face([model], CONFIG, tmp_path / "exported")
    written = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(written[name], (fp32 | halved)[name]) for name in fp32)
    assert {written[name].dtype for name in fp32.keys() - halved.keys()} == {torch.float32}
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"


SAVE_FOREVER = """
import sys
from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.presets import tiny
from megatron_klong.model.hugging_face import save_hugging_face
from megatron_klong.model.parallel import initialize
initialize(LayoutConfig(), seed=1)
model = build_model(tiny(500), LayoutConfig())
while True:
    save_hugging_face([model], tiny(500), sys.argv[1])
    print("done", flush=True)
"""


@pytest.mark.parametrize("milliseconds", [3, 17])
def test_a_writer_killed_at_any_moment_leaves_a_whole_folder_or_none(
    reference: Path, tmp_path: Path, milliseconds: int
) -> None:
    folder = tmp_path / "exported"
    kill_in_its_work(SAVE_FOREVER, str(folder), milliseconds=milliseconds)
    config = ModelConfig.from_hugging_face(reference / "weights")
    model = build_model(config, LAYOUT)
    if folder.exists():
        load_hugging_face([model], config, folder)
    save_hugging_face([model], config, folder)  # what was left behind is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
