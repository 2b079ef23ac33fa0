"""Two processes at TP2 do this: what one of them fails at changes no weights on either; resharding changes all.

And it does so under an engine that runs beside the model whose weights it takes.
"""

import asyncio
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import torch
from megatron.core.models.gpt import GPTModel
from torch import distributed

from megatron_klong.model import load_megatron
from megatron_klong.model.build import build_model
from megatron_klong.model.checkpoint_folder import CheckpointFolder
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.serve import refit
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.engine import MegatronEngine
from megatron_klong.serve.protocol import CompletionRequest, RefitRequest


def check(weights: str, other: str, checkpoint: str, layout: LayoutConfig) -> None:
    """checkpoint: of the other weights, by two processes."""
    config = ModelConfig.from_hugging_face(weights)
    group = distributed.group.WORLD
    served, source = build_model(config, layout), build_model(config, layout)
    load_hugging_face([served], config, weights)
    load_hugging_face([source], config, other)
    before = state(served)

    def fail_on_one() -> None:
        for parameter in served.parameters():
            parameter.data.zero_()
        if distributed.get_rank() == 1:
            raise OSError("the disk went away")

    faults = []
    try:
        refit._all_or_nothing(served, fail_on_one, group)
    except refit.RefitError as error:
        faults.append(str(error))
    assert faults == ["OSError: the disk went away"]
    assert all(torch.equal(now, then) for now, then in zip(state(served), before, strict=True))

    for after_checksums in (False, True):
        assert "__1_0.distcp" in lose_a_file(served, config, Path(checkpoint), after_checksums=after_checksums)
    assert "the manifest is gone" in lose_the_manifest(served, config, Path(checkpoint))
    assert all(torch.equal(now, then) for now, then in zip(state(served), before, strict=True))

    refit.replace_from_model(served, source, group=group)
    after = state(served)
    assert all(torch.equal(now, wanted) for now, wanted in zip(after, state(source), strict=True))
    assert not torch.equal(after[0], before[0])
    refit.replace_from_folder(served, config, Path(weights), group=group)
    assert all(torch.equal(now, then) for now, then in zip(state(served), before, strict=True))
    beside(source, weights, other, layout)
    assert all(torch.equal(now, then) for now, then in zip(state(source), after, strict=True))


def lose_a_file(served: GPTModel, config: ModelConfig, checkpoint: Path, *, after_checksums: bool) -> str:
    """A trainer deletes a checkpoint while it is read, which not every process meets. The fault that is raised."""
    folder, rank = checkpoint.with_name(f"lost-{after_checksums}"), distributed.get_rank()
    if rank == 0:
        shutil.copytree(checkpoint, folder)
    distributed.barrier()
    changed = load_megatron.changed

    def changed_meanwhile(found: CheckpointFolder, names: Sequence[str]) -> list[str]:
        before = changed(found, names) if after_checksums else []
        distributed.barrier()
        if rank == 0:
            (folder / "__1_0.distcp").unlink()
        distributed.barrier()
        return before if after_checksums else changed(found, names)

    with patch.object(load_megatron, "changed", changed_meanwhile):
        return fault(served, config, folder)


def lose_the_manifest(served: GPTModel, config: ModelConfig, checkpoint: Path) -> str:
    """Which one process finds no more. The fault that is raised."""
    known = refit.model_config

    def lost(folder: Path) -> ModelConfig:
        if distributed.get_rank() == 1:
            raise FileNotFoundError("the manifest is gone")
        return known(folder)

    with patch.object(refit, "model_config", lost):
        return fault(served, config, checkpoint)


def fault(served: GPTModel, config: ModelConfig, folder: Path) -> str:
    try:
        refit.replace_from_folder(served, config, folder, group=distributed.group.WORLD)
    except refit.RefitError as error:
        return str(error)
    return "none"


def beside(source: GPTModel, weights: str, other: str, layout: LayoutConfig) -> None:
    settings = ServeConfig(
        weights=weights, layout=layout, block_tokens=16, kv_cache_gib=0.01, max_sequence_length=128, max_requests=4
    )
    engine = MegatronEngine(settings, trained=source)
    if distributed.get_rank():
        following = threading.Thread(target=engine.follow)
        following.start()
        following.join()
        return
    engine.start()
    request = CompletionRequest(prompt_token_ids=tuple(range(40)), max_tokens=20, temperature=0.0)

    async def play() -> list[tuple[int, ...]]:
        replies = [await engine.generate(request)]
        await engine.refit_from_trained()
        replies.append(await engine.generate(request))
        assert replies[-1].cached_tokens == 0
        for folder in (other, weights):
            await engine.refit(RefitRequest(weights=folder))
            replies.append(await engine.generate(request))
        assert [reply.policy_epoch for reply in replies] == [((0, epoch),) for epoch in range(4)]
        return [reply.generation_token_ids for reply in replies]

    first, taken, read, again = asyncio.run(play())
    assert taken == read != first == again
    engine.stop()


def state(model: GPTModel) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
