"""What goes into a Megatron checkpoint comes out of it bit for bit, and is what the model reads on any layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_klong.model import tensor_files
from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.conversion import chunk_files
from megatron_klong.model.conversion.export_checkpoint import export_checkpoint
from megatron_klong.model.conversion.import_checkpoint import import_checkpoint
from megatron_klong.model.load_megatron import load_megatron, sharded_metadata
from megatron_klong.model.parallel import destroy, initialize
from tests.conftest import REPOSITORY
from tests.integration.model.launch import launch
from tests.integration.model.reference import CONFIG as REFERENCE
from tests.integration.model.reference import write_reference
from tests.integration.model.weights import CONFIG, COPIES, assert_same_weights, config_of, tensors_of, write_weights

# isort: split
from megatron.core import dist_checkpointing

WORKER = REPOSITORY / "tests/integration/model/convert_worker.py"
LAYOUTS = {
    "TP2": LayoutConfig(tensor_parallel=2),
    "PP2": LayoutConfig(pipeline_parallel=2),
    "PP3": LayoutConfig(pipeline_parallel=3),
    "EP2": LayoutConfig(expert_parallel=2),
    "TP2 EP2 ETP2": LayoutConfig(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2),
    "TP2 PP2 EP2": LayoutConfig(tensor_parallel=2, pipeline_parallel=2, expert_parallel=2),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("source") / "weights")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_import_and_export_give_back_every_tensor_bit_for_bit(
    source: Path, tmp_path: Path, layout: LayoutConfig
) -> None:
    assert {tensor.dtype for tensor in tensors_of(source).values()} == {torch.bfloat16, torch.float32}
    checkpoint = import_checkpoint(source, tmp_path / "checkpoint", layout, processes=1)
    assert checkpoint.model == CONFIG
    assert checkpoint.layout == layout
    assert checkpoint.progress is None
    exported = export_checkpoint(tmp_path / "checkpoint", tmp_path / "exported", processes=1)
    assert_same_weights(exported, source)
    assert config_of(exported)["dtype"] == "bfloat16"
    assert ModelConfig.from_hugging_face(exported) == CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "exported"]


def test_several_processes_and_several_files_make_no_difference(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 200_000)
    monkeypatch.setattr(chunk_files, "MAX_FILE_BYTES", 200_000)  # workers have their own, and write one file each
    several = import_checkpoint(source, tmp_path / "checkpoint", LAYOUTS["EP2"], processes=2)
    one = import_checkpoint(source, tmp_path / "in_one", LAYOUTS["EP2"], processes=1)
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json"} < several.files.keys()
    assert "__0_3.distcp" in one.files
    for number, folder in enumerate((several.folder, one.folder)):
        exported = export_checkpoint(folder, tmp_path / f"exported{number}", processes=2 - number)
        assert len(list(exported.glob("model-*-of-*.safetensors"))) > 3
        index = json.loads((exported / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors_of(source).keys()
        assert_same_weights(exported, source)


def test_a_checkpoint_read_on_another_layout_by_real_processes_gives_the_logits_of_transformers(
    tmp_path: Path,
) -> None:
    write_reference(tmp_path, REFERENCE)
    import_checkpoint(tmp_path / "weights", tmp_path / "checkpoint", LAYOUTS["TP2 PP2 EP2"], processes=1)
    launch(WORKER, str(tmp_path), json.dumps({"tensor_parallel": 2, "expert_tensor_parallel": 2}), processes=2)
    assert json.loads((tmp_path / "difference.json").read_text()) < 1e-4
    assert_same_weights(tmp_path / "exported", tmp_path / "weights")


def test_plain_megatron_loads_it(source: Path, tmp_path: Path) -> None:
    folder = import_checkpoint(source, tmp_path / "checkpoint", LAYOUTS["TP2 EP2 ETP2"], processes=1).folder
    initialize(LayoutConfig(), seed=1)
    model = build_model(CONFIG, LayoutConfig(), precision="bf16")
    sharded = model.sharded_state_dict(metadata=sharded_metadata())
    sharded = {name: entry for name, entry in sharded.items() if not name.endswith("_extra_state")}
    loaded = dist_checkpointing.load({"model": sharded}, str(folder), strict="raise_all")
    model.load_state_dict(loaded["model"], strict=False)
    other = build_model(CONFIG, LayoutConfig(), precision="bf16")
    load_megatron([other], CONFIG, folder)
    given = tensors_of(source)
    for made in (model, other):
        parameters = dict(made.named_parameters())
        assert torch.equal(parameters["output_layer.weight"], given["lm_head.weight"])
        expert = parameters["decoder.layers.2.mlp.experts.linear_fc1.weight5"]
        names = [f"model.layers.2.mlp.experts.5.{part}_proj.weight" for part in ("gate", "up")]
        assert torch.equal(expert, torch.cat([given[name] for name in names]))
    destroy()


def test_a_layer_left_out_of_the_import_is_carried_over_by_the_export(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("hello")
    checkpoint = import_checkpoint(source, tmp_path / "k", LAYOUTS["EP2"], processes=1, without_mtp=True)
    assert checkpoint.model.num_nextn_predict_layers == 0
    exported = export_checkpoint(tmp_path / "k", tmp_path / "exported", processes=1, like=source)
    assert_same_weights(exported, source)
    assert config_of(exported) == config_of(source)
    assert (exported / "chat_template.jinja").read_text() == "hello"
    assert (exported / "tokenizer.json").exists()
    bare = export_checkpoint(tmp_path / "k", tmp_path / "bare", processes=1)
    assert config_of(bare)["num_nextn_predict_layers"] == 0
    assert not any(name.startswith("model.layers.4.") for name in tensors_of(bare))


def test_a_file_without_the_copies_of_the_layer_comes_back_without_them(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: tensor for name, tensor in tensors_of(source).items() if name not in COPIES}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(folder, tmp_path / "k", LAYOUTS["PP2"], processes=1)
    assert_same_weights(export_checkpoint(tmp_path / "k", tmp_path / "like", processes=1, like=folder), folder)
    assert_same_weights(export_checkpoint(tmp_path / "k", tmp_path / "published", processes=1), source)


def test_a_precision_that_is_asked_for_is_that_of_the_checkpoint(source: Path, tmp_path: Path) -> None:
    import_checkpoint(source, tmp_path / "k", LAYOUTS["TP2"], processes=1, precision="fp32")
    exported = export_checkpoint(tmp_path / "k", tmp_path / "exported", processes=1)
    assert config_of(exported)["dtype"] == "float32"
    given = tensors_of(source)
    for name, tensor in tensors_of(exported).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, given[name].float())
