"""Small folders of weights in Hugging Face format, and whether two of them hold the same."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_klong.model.config import ModelConfig, Precision
from megatron_klong.model.conversion.random_weights import write_random_weights
from megatron_klong.model.presets import tiny

CONFIG = tiny(500).model_copy(update={"num_nextn_predict_layers": 1, "use_qk_norm": True, "eos_token_id": (7, 8)})

COPIES = {
    "model.layers.4.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.4.shared_head.head.weight": "lm_head.weight",
}


def write_weights(folder: Path, config: ModelConfig = CONFIG, precision: Precision = "bf16") -> Path:
    """Every tensor with values of its own, norms and biases too; only the copies of the MTP layer are copies."""
    write_random_weights(folder, config, seed=3, precision=precision)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(5)
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape) * 0.3)
    for copy, original in COPIES.items():
        if copy in tensors:
            tensors[copy] = tensors[original].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(found: Path, expected: Path) -> None:
    """Bit for bit, names and dtypes included."""
    made, given = tensors_of(found), tensors_of(expected)
    assert made.keys() == given.keys()
    assert [name for name in given if made[name].dtype != given[name].dtype] == []
    assert [name for name in given if not torch.equal(made[name], given[name])] == []


def flip_bit(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found
