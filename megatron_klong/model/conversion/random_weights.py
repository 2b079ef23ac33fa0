"""A model with random weights in Hugging Face format, written without a process group and one tensor at a time.

It loads in transformers as it is (tests/integration/model/test_make_tiny_model.py), and everything that reads weights
can be tried on it.
"""

import shutil
from pathlib import Path

import torch

from megatron_klong.model.checkpoint_folder import check_output, temporary_folder
from megatron_klong.model.config import LayoutConfig, ModelConfig, Precision
from megatron_klong.model.conversion.pieces import Stored, stored_parameters
from megatron_klong.model.presets import tiny
from megatron_klong.model.tensor_files import create_files, plan_files, put_in_place, put_tensor, write_config
from megatron_klong.model.weight_map import weights


def write_tiny_model(folder: Path, *, seed: int, vocabulary_size: int, mtp: bool, qk_norm: bool) -> ModelConfig:
    """`tiny()` of `model.presets`. Raises CheckpointError if the folder exists."""
    fields = {"num_nextn_predict_layers": int(mtp), "use_qk_norm": qk_norm}
    config = tiny(vocabulary_size).model_copy(update=fields)
    write_random_weights(folder, config, seed=seed)
    return config


@torch.no_grad()
def write_random_weights(folder: Path, config: ModelConfig, *, seed: int, precision: Precision = "fp32") -> None:
    """Matrices after `initializer_range`, norms one, biases zero. Raises CheckpointError if the folder exists."""
    stored = list(stored_parameters(config, LayoutConfig(), precision).values())
    check_output(folder, sum(one.num_bytes for one in stored), overwrite=False)
    mapping = weights(config)
    temporary = temporary_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        places = create_files(temporary, plan_files([one.tensors_like for one in stored]))
        generator = torch.Generator().manual_seed(seed)
        for one in stored:
            operator = mapping[one.parameter].operator
            parts = operator.part(operator.unflatten(_values(one, config, generator), config), config)
            for name, part in zip(one.tensors, parts, strict=True):
                put_tensor(places[name], part)
        dtype = next(one.dtype for one in stored)
        write_config(temporary, config.to_hugging_face(), dtype)
        put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _values(stored: Stored, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    if "norm" in stored.parameter:
        return torch.ones(stored.shape, dtype=stored.dtype)
    if stored.parameter.endswith("bias"):
        return torch.zeros(stored.shape, dtype=stored.dtype)
    made = torch.empty(stored.shape, dtype=torch.float32)
    return made.normal_(0, config.initializer_range, generator=generator).to(stored.dtype)
