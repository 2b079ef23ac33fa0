"""Weights in training -> a folder in Hugging Face format that can be used by itself, tokenizer included."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
from megatron.core.models.gpt import GPTModel
from torch import distributed

from megatron_klong.files import sync_directory
from megatron_klong.model.config import ModelConfig
from megatron_klong.model.hugging_face import save_hugging_face, save_tokenizer
from megatron_klong.trajectory.tokenizer import Tokenizer


def export(chunks: Sequence[GPTModel], model_config: ModelConfig, final: Path, tokenizer: Tokenizer | None) -> None:
    """Called by all processes at once; the folder appears when it is whole, in place of an earlier one."""
    temporary = final.with_name(f".{final.name}.tmp")
    if distributed.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        final.parent.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    save_hugging_face(chunks, model_config, temporary)
    distributed.barrier()
    if distributed.get_rank() == 0:
        if tokenizer:
            save_tokenizer(tokenizer, temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_directory(final.parent)
    distributed.barrier()
