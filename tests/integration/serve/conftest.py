"""Tiny random weights, far from uniform so that an error would show, and transformers' model of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_klong.model.presets import tiny
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.integration.serve.served import VOCABULARY


def random_weights(folder: Path, *, seed: int, **changes: Any) -> Path:
    """As transformers saves them; changes: of the tiny model's fields."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    fields = {
        name: value
        for name, value in tiny(VOCABULARY).model_copy(update=changes).to_hugging_face().items()
        if name != "model_type"
    }
    torch.manual_seed(seed)
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**fields))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.1 + ("norm" in name))
    model.save_pretrained(folder)
    return folder


def load_reference(weights: Path) -> torch.nn.Module:
    from transformers import Glm4MoeForCausalLM

    return Glm4MoeForCausalLM.from_pretrained(weights).eval()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights"), seed=0)


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same architecture."""
    return random_weights(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def reference(weights: Path) -> torch.nn.Module:
    return load_reference(weights)


@pytest.fixture(scope="session")
def other_reference(other_weights: Path) -> torch.nn.Module:
    return load_reference(other_weights)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some text to merge"] * 4, vocabulary_size=290, folder=folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)
