"""One process of models under test: `worker.py RUNS-AS-JSON`, beside the others under torchrun.

RUNS: [[fields of a layout, [FOLDER, ...]], ...], one after the other. Reads each FOLDER/weights and reference.pt;
writes FOLDER/out: `exported` (the weights as read), `gradients_whole` and `gradients_packed` (gradients in the place of
weights) and `figures.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.context_parallel import held_positions
from megatron_klong.model.hugging_face import load_hugging_face, save_hugging_face
from megatron_klong.model.parallel import destroy, initialize, initialize_groups

# isort: split
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import distributed

from tests.integration.model.reference import WINDOWS, next_loss_mask


def main(runs: list[tuple[dict[str, Any], list[str]]]) -> None:
    initialize(LayoutConfig(), seed=1)  # once: processes that have met do not find each other a second time
    for fields, folders in runs:
        layout = LayoutConfig.model_validate_json(json.dumps(fields))
        parallel_state.destroy_model_parallel()
        initialize_groups(layout, seed=1)
        for folder in folders:
            print(layout, folder, flush=True)
            work(Path(folder), layout)
    destroy()


def work(folder: Path, layout: LayoutConfig) -> None:
    config = ModelConfig.from_hugging_face(folder / "weights")
    model = build_model(config, layout)
    reference = torch.load(folder / "reference.pt")
    load_hugging_face([model], config, folder / "weights")
    save_hugging_face([model], config, folder / "out" / "exported")
    cases = ["whole", "packed"]
    figures = {}
    trained = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    for case in cases:
        load_hugging_face([model], config, folder / "weights")
        figures[case] = _logits_difference(model, reference, case)
        _gradients(trained, reference, case)
        for parameter in model.parameters():
            parameter.data.copy_(parameter.main_grad)
        save_hugging_face([model], config, folder / "out" / f"gradients_{case}")
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, figures)
    if distributed.get_rank() == 0:
        worst = {case: max(figure[case] for figure in everyone) for case in cases}
        (folder / "out" / "figures.json").write_text(json.dumps(worst))


def _batch(reference: dict[str, Any], case: str) -> dict[str, torch.Tensor]:
    """This process's part of the row: all of it, but for context parallelism. place: of a token in the whole row."""
    lengths = WINDOWS if case == "packed" else (reference["ids"].shape[1],)
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    place = held_positions(lengths, rank=rank, size=size) if size > 1 else torch.arange(sum(lengths))
    batch = {
        "ids": reference["ids"],
        "labels": reference["labels"],
        "loss_mask": next_loss_mask(lengths),
        "positions": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    return {name: tensor[:, place] for name, tensor in batch.items()} | {"place": place}


def _packed(case: str) -> PackedSeqParams | None:
    if case == "whole":
        return None
    ends = torch.tensor([0, *WINDOWS]).cumsum(0).to(torch.int32)
    longest = max(WINDOWS)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _run(model: Any, batch: dict[str, torch.Tensor], case: str, *, labels: bool, train: bool = False) -> list[Any]:
    """Logits of each head, gathered, on the last stage; or with `train` gradients in the model."""

    def step(batches: Any, part: Any) -> Any:
        now = next(batches)
        given = now["labels"] if labels else None
        heads: list[torch.Tensor] = []  # with a layer for multi-token prediction its logits first
        bare = getattr(part, "module", part)
        hook = None
        if bare.post_process:  # cloned, for the loss is computed in their place
            hook = bare.output_layer.register_forward_hook(lambda *call: heads.append(call[-1][0].clone()))
        output = part(
            now["ids"],
            now["positions"],
            None,
            labels=given,
            loss_mask=now["loss_mask"],
            packed_seq_params=_packed(case),
        )
        if hook:
            hook.remove()

        def loss(output: torch.Tensor, non_loss_data: bool = False) -> Any:
            if non_loss_data:
                return [gather_from_tensor_model_parallel_region(head.transpose(0, 1)) for head in heads]
            tokens = torch.tensor(output.numel(), dtype=torch.int)
            return output.sum(), tokens, {"loss": output.detach().sum()}

        return output, loss

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=[model],
        num_microbatches=1,
        seq_length=batch["ids"].shape[1] * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=1,
        forward_only=not train,
        collect_non_loss_data=not train,
    )
    return results


def _logits_difference(model: Any, reference: dict[str, Any], case: str) -> float:
    model.eval()
    batch = _batch(reference, case)
    # the layer for multi-token prediction wants labels, or gives no logits of its own
    results = _run(model, batch, case, labels=bool(model.config.mtp_num_layers))
    model.train()
    if not results:  # not the last stage
        return 0.0
    expected = [
        reference[case][name][:, batch["place"]] for name in ("next_logits", "logits") if name in reference[case]
    ]
    found = results[0]
    assert len(found) == len(expected)
    if len(found) == 2:  # the last token of a window has no next one
        found[0] = torch.where(expected[0] == 0, 0, found[0])
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


def _gradients(trained: Any, reference: dict[str, Any], case: str) -> None:
    trained.zero_grad_buffer()
    _run(trained, _batch(reference, case), case, labels=True, train=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
