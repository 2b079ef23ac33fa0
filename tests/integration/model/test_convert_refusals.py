"""Weights and checkpoints that are not whole or do not fit stop a conversion with their names; nothing stays behind."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_klong.model import tensor_files
from megatron_klong.model.build import build_model
from megatron_klong.model.checkpoint_folder import CheckpointError
from megatron_klong.model.config import LayoutConfig
from megatron_klong.model.conversion.export_checkpoint import export_checkpoint
from megatron_klong.model.conversion.import_checkpoint import import_checkpoint
from megatron_klong.model.conversion.weights_manifest import write_weights_manifest
from megatron_klong.model.load_megatron import load_megatron
from megatron_klong.model.parallel import destroy, initialize
from tests.integration.model.weights import CONFIG, assert_same_weights, flip_bit, tensors_of, write_weights
from tools.convert_checkpoint import main

LAYOUT = LayoutConfig(expert_parallel=2)
EXPERT = "model.layers.2.mlp.experts.5.gate_proj.weight"
type Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several files, with an index."""
    folder = tmp_path_factory.mktemp("weights") / "hf"
    whole = write_weights(folder.with_name("whole"))
    import_checkpoint(whole, folder.with_name("k"), LAYOUT, processes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "MAX_FILE_BYTES", 300_000)
        return export_checkpoint(folder.with_name("k"), folder, processes=1)


@pytest.fixture(scope="module")
def checkpoint(weights: Path) -> Path:
    return weights.with_name("k")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    command = ["convert_checkpoint.py", *map(str, arguments), "--processes", "1"]
    monkeypatch.setattr(sys, "argv", command)
    return main()


def file_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][name])


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Another tensor in the place of `name`, in the last file if there is none yet; None: it goes."""
    from safetensors.torch import load_file

    known = name in tensors_of(folder)
    file = file_of(folder, name) if known else max(folder.glob("*.safetensors"))
    tensors = {**load_file(file), name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, file, metadata={"format": "pt"})


def lose_a_tensor(folder: Path) -> None:
    change(folder, EXPERT, None)


def add_a_tensor(folder: Path) -> None:
    change(folder, "model.layers.9.mlp.extra.weight", torch.ones(3))


def reshape_a_tensor(folder: Path) -> None:
    change(folder, EXPERT, torch.ones(32, 72, dtype=torch.bfloat16))


def mix_dtypes(folder: Path) -> None:
    change(folder, EXPERT, torch.ones(32, 64, dtype=torch.float16))


def lose_a_file(folder: Path) -> None:
    file_of(folder, EXPERT).unlink()


def cut_a_file_short(folder: Path) -> None:
    file = file_of(folder, EXPERT)
    file.write_bytes(file.read_bytes()[:-7])


def store_one_twice(folder: Path) -> None:
    shutil.copy(file_of(folder, EXPERT), folder / "zzz.safetensors")


def flip_a_bit_beside_a_manifest(folder: Path) -> None:
    write_weights_manifest(folder, processes=1)
    flip_bit(file_of(folder, EXPERT))


def change_the_copies(folder: Path) -> None:
    change(folder, "model.layers.4.embed_tokens.weight", torch.ones(512, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_tensor, rf"hf: 1 tensors missing: {EXPERT}"),
        (add_a_tensor, r"hf: 1 tensors not of this model: model\.layers\.9\.mlp\.extra\.weight"),
        (reshape_a_tensor, rf"safetensors: {EXPERT} has shape \[32, 72\], the model needs \[32, 64\]"),
        (mix_dtypes, rf"neither all bf16 nor all fp32 \(.*{EXPERT} is float16.*\); pass --precision"),
        (lose_a_file, r"model-0000\d-of-\d+\.safetensors: missing, but model\.safetensors\.index\.json names it"),
        (cut_a_file_short, r"model-0000\d-of-\d+\.safetensors: not readable"),
        (store_one_twice, r" is in model-0000\d-of-\d+\.safetensors and in zzz\.safetensors; remove one"),
        (flip_a_bit_beside_a_manifest, r"model-0000\d-of-\d+\.safetensors: checksum differs from klong-manifest\.json"),
        (change_the_copies, r"model\.layers\.4\.embed_tokens\.weight differs from model\.embed_tokens\.weight"),
    ],
)
def test_an_import_stops_with_the_name_of_what_is_wrong(
    damage: Damage,
    message: str,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(weights, folder)
    damage(folder)
    assert run(monkeypatch, "import", "--hf", folder, "--out", tmp_path / "out", "--tensor-parallel", 2) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def newest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


def flip_a_bit_of_the_weights(folder: Path) -> None:
    flip_bit(newest(folder))


def flip_a_bit_of_the_metadata(folder: Path) -> None:
    flip_bit(folder / ".metadata")


def cut_the_weights_short(folder: Path) -> None:
    newest(folder).write_bytes(newest(folder).read_bytes()[:-1])


def lose_the_weights(folder: Path) -> None:
    newest(folder).unlink()


def cut_the_manifest_short(folder: Path) -> None:
    (folder / "klong.json").write_text((folder / "klong.json").read_text()[:-9])


def lose_the_setting(folder: Path) -> None:
    manifest = json.loads((folder / "klong.json").read_text())
    del manifest["setting"]
    (folder / "klong.json").write_text(json.dumps(manifest))


def claim_another_model(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / "klong.json").read_text())
    manifest["setting"]["model"] |= fields or {"hidden_size": 72}
    (folder / "klong.json").write_text(json.dumps(manifest))


def claim_fewer_layers(folder: Path) -> None:
    claim_another_model(folder, num_hidden_layers=3)


def claim_more_layers(folder: Path) -> None:
    claim_another_model(folder, num_hidden_layers=5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit_of_the_weights, r"__0_0\.distcp: checksum differs from the manifest's"),
        (flip_a_bit_of_the_metadata, r"\.metadata: checksum differs from the manifest's"),
        (cut_the_weights_short, r"__0_0\.distcp: \d+ bytes, manifest says \d+"),
        (lose_the_weights, r"__0_0\.distcp: no bytes, manifest says"),
        (cut_the_manifest_short, r"klong\.json: not readable"),
        (lose_the_setting, r"klong\.json: damaged \(KeyError: 'setting'\); delete .*, or make it again"),
        (claim_another_model, r"k: \S+ has shape \[.*64.*\], the model needs \[.*72.*\]"),
        (claim_fewer_layers, r"k: \d+ tensors not of this model: decoder\.layers\.3\."),
        (claim_more_layers, r"k: \d+ tensors missing: decoder\.layers\.4\."),
    ],
)
def test_an_export_stops_with_the_name_of_what_is_wrong(
    damage: Damage,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(checkpoint, tmp_path / "k")
    damage(tmp_path / "k")
    assert run(monkeypatch, "export", "--megatron", tmp_path / "k", "--hf", tmp_path / "out") == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


@pytest.fixture
def _alone() -> Iterator[None]:
    initialize(LayoutConfig(), seed=1)
    yield
    destroy()


@pytest.mark.usefixtures("_alone")
def test_a_model_is_not_filled_from_a_damaged_or_another_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "k")
    model = build_model(CONFIG, LayoutConfig())
    with pytest.raises(CheckpointError, match=r"k: of another model \(rope_theta 1000000.0 there, 5000.0 here\)"):
        load_megatron([model], CONFIG.model_copy(update={"rope_theta": 5000.0}), tmp_path / "k")
    flip_bit(newest(tmp_path / "k"))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: checksum differs"):
        load_megatron([model], CONFIG, tmp_path / "k")


def test_what_a_user_gets_wrong_is_named(
    weights: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there, out = tmp_path / "there", tmp_path / "out"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    other = write_weights(tmp_path / "other", CONFIG.model_copy(update={"rope_theta": 5000.0}))
    cases = [
        (["import", "--hf", weights, "--out", there], f"{there}: exists already; choose another folder, or pass"),
        (["import", "--hf", tmp_path / "no", "--out", out], f"{tmp_path / 'no'}: not readable"),
        (["import", "--hf", weights, "--out", out, "--tensor-parallel", "3"], "is no multiple of tensor_parallel 3"),
        (["export", "--megatron", tmp_path / "no", "--hf", out], "no: no such folder; give a checkpoint"),
        (["export", "--megatron", weights, "--hf", out], "hf/klong.json: not readable"),
        (["export", "--megatron", checkpoint, "--hf", there], f"{there}: exists already"),
        (
            ["export", "--megatron", checkpoint, "--hf", out, "--like", other],
            "other/config.json: of another model (rope_theta 5000.0 there, 1000000.0 in the checkpoint)",
        ),
        (["manifest", tmp_path], f"{tmp_path}: no *.safetensors there"),
    ]
    for arguments, message in cases:
        assert run(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
    assert (there / "notes.txt").read_text() == "mine"
    assert not out.exists()


def test_a_folder_with_its_manifest_is_imported_and_replaced_only_if_asked_for(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(weights, tmp_path / "hf")
    assert run(monkeypatch, "manifest", tmp_path / "hf") == 0
    command = ("import", "--hf", tmp_path / "hf", "--out", tmp_path / "k")
    assert run(monkeypatch, *command) == 0
    assert run(monkeypatch, *command) == 2
    assert run(monkeypatch, *command, "--overwrite", "--pipeline-parallel", 2) == 0
    assert run(monkeypatch, "export", "--megatron", tmp_path / "k", "--hf", tmp_path / "out") == 0
    assert_same_weights(tmp_path / "out", weights)
