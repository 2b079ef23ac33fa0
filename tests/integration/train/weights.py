"""Weights to start from: those of the tiny model, drawn here, with a bias of the experts that bf16 cannot hold."""

from pathlib import Path

import torch

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.hugging_face import save_hugging_face
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.model.presets import tiny
from tests.unit.trajectory.builders import byte_tokenizer

BIAS = ".expert_bias"


def write_weights(folder: Path) -> ModelConfig:
    """A folder in Hugging Face format for the byte tokenizer of the tests."""
    config = tiny(byte_tokenizer().vocabulary_size)
    initialize(LayoutConfig(), seed=1)
    try:
        model = build_model(config, LayoutConfig())
        for name, buffer in model.named_buffers():
            if name.endswith(BIAS):
                buffer.copy_(torch.randn_like(buffer) / 10)
        save_hugging_face([model], config, folder)
    finally:
        destroy()
    return config
