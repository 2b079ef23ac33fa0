"""Tiny random weights, far from uniform so that an error would show, and transformers' model of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.conversion.import_checkpoint import import_checkpoint
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.model.parallel import destroy, initialize
from megatron_klong.model.presets import tiny
from megatron_klong.serve.protocol import Completion, CompletionRequest
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.integration.model.launch import launch
from tests.integration.serve.in_process import Trained
from tests.integration.serve.served import VOCABULARY, Server, prompts, serving

LONGEST = 2048
SLOTS = 4
LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "EP2": {"expert_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "DP2": {},
}
REQUESTS = [
    CompletionRequest(prompt_token_ids=prompt, max_tokens=most, temperature=0.0, routes=True)
    for prompt, most in zip(prompts(1, 9, 40, 70, 150, 30), (24, 3, 20, 24, 24, 1), strict=True)
]


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


@pytest.fixture(scope="session")
def server(weights: Path, tokenizer_folder: Path) -> Iterator[Server]:
    """Few places, so that requests wait; prompts are read in several steps."""
    options = ["--block_tokens", "16", "--kv_cache_gib", "0.05", "--step_tokens", "64", "--routes", "true"]
    options += ["--max_requests", str(SLOTS), "--tokenizer", str(tokenizer_folder)]
    with serving(weights, *options, limit=LONGEST) as running:
        yield running


@pytest.fixture(scope="module")
def trained(weights: Path, other_weights: Path) -> Iterator[Trained]:
    config, layout = ModelConfig.from_hugging_face(weights), LayoutConfig()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the machine has other tests to run
    initialize(layout, seed=0)
    model = build_model(config, layout)
    load_hugging_face([model], config, other_weights)
    yield Trained(model=model, config=config)
    assert distributed.is_initialized(), "engines leave the groups of others as they are"
    destroy()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def on_ranks(
    weights: Path, other_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[Completion]]]:
    """What two processes answer in each layout, by group of requests: what is sent at once. See on_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    seeded = [request.model_copy(update={"temperature": 0.8, "seed": 11 + n}) for n, request in enumerate(REQUESTS)]
    # twice the same: the second time prompts are found in the cache, and more is in flight
    groups = [REQUESTS + seeded, REQUESTS * 2 + seeded]
    asked = [[request.model_dump(mode="json") for request in group] for group in groups]
    (folder / "asked.json").write_text(json.dumps([LAYOUTS, asked]))
    import_checkpoint(other_weights, folder / "checkpoint", LayoutConfig(), processes=2)
    files = (weights, other_weights, folder / "checkpoint", folder / "asked.json", folder / "found.json")
    launch(Path(__file__).with_name("on_ranks.py"), *map(str, files), processes=2)
    found = json.loads((folder / "found.json").read_text())
    return {
        layout: [[Completion.model_validate_json(json.dumps(one)) for one in group] for group in groups]
        for layout, groups in found.items()
    }
