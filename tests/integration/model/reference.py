"""What transformers' own GLM-4.5 computes: a folder of random weights, its logits and its gradients."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from megatron_klong.model.config import ModelConfig
from megatron_klong.model.presets import tiny

TOKENS = 48
WINDOWS = (20, 16, 12)  # multiples of 4, for context parallelism over two processes
CONFIG = tiny(500).model_copy(update={"routed_scaling_factor": 1.5, "rope_theta": 1e4, "initializer_range": 0.1})


def write_reference(folder: Path, config: ModelConfig = CONFIG, *, seed: int = 0) -> None:
    """`folder`/weights as transformers saves them, `folder`/reference.pt with what the model makes of them."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
    from transformers.modeling_layers import MtpModel

    torch.manual_seed(seed)
    fields = {name: value for name, value in config.to_hugging_face().items() if name != "model_type"}
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**fields, attn_implementation="eager")).eval()
    # made first: it fills the embedding anew, which is the model's own
    mtp = MtpModel(model, 1) if config.num_nextn_predict_layers else None
    _randomize(model)
    model.save_pretrained(folder / "weights")
    if mtp is not None:
        _randomize(mtp.layers)
        mtp = _write_next_layer(mtp, model, folder / "weights", config)
    ids = torch.randint(0, config.vocab_size, (1, TOKENS))
    labels = torch.randint(0, config.vocab_size, (1, TOKENS))
    found: dict[str, Any] = {"ids": ids, "labels": labels}
    for case, lengths in (("whole", (TOKENS,)), ("packed", WINDOWS)):
        model.zero_grad()
        hidden = [model.model(window).last_hidden_state for window in ids.split(lengths, dim=1)]
        logits = model.lm_head(torch.cat(hidden, dim=1))
        loss = cross_entropy(logits[0], labels[0])
        found[case] = {"logits": logits.detach()}
        if mtp is not None:
            mtp.zero_grad()
            mask = next_loss_mask(lengths)
            parts = (tensor.split(lengths, dim=1) for tensor in (ids, labels, mask))
            next_logits, next_loss = _next_token_but_one(mtp, hidden, *parts)
            loss = loss + config.mtp_loss_weight * next_loss / TOKENS
            found[case]["next_logits"] = next_logits
        loss.backward()
        gradients = dict(_per_expert(_gradients(model)))
        if mtp is not None:
            gradients |= _as_in_file(_gradients(mtp), config)
            gradients |= _copies(gradients, config)
        found[case]["gradients"] = gradients
    torch.save(found, folder / "reference.pt")


def _randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + ("norm" in name))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)


def _write_next_layer(made: Any, model: Any, folder: Path, config: ModelConfig) -> Any:
    """Append a layer for multi-token prediction to the file, and give it back as transformers reads it there."""
    from transformers import Glm4MoeForCausalLM
    from transformers.modeling_layers import MtpModel

    tensors = load_file(folder / "model.safetensors")
    tensors |= _as_in_file(made.state_dict().items(), config)
    tensors |= _copies(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    # transformers knows where the layer is by the number of layers of the two published models
    Glm4MoeForCausalLM._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\..*"]
    read = MtpModel.from_pretrained(Glm4MoeForCausalLM.from_pretrained(folder))
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in made.state_dict().items())
    read.tie_with_main_model(model)
    return read.eval()


def next_loss_mask(lengths: tuple[int, ...]) -> torch.Tensor:
    """[1, TOKENS] bool: labels that a layer for multi-token prediction is trained on.

    None at the beginning of a window, as in real ones, nor of a chunk of it under context parallelism over two
    processes. Then Megatron, which weighs by each process's labels before and behind the shift to the next token but
    one, weighs all the same.
    """
    masks = [torch.arange(length) % (length // 4) != 0 for length in lengths]
    return torch.cat(masks)[None]


def _next_token_but_one(mtp: Any, hidden: Any, ids: Any, labels: Any, masks: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, TOKENS, vocab] (zero at the last token of each window, which has no next), and the sum of losses."""
    logits, losses = [], []
    for window, tokens, wanted, mask in zip(hidden, ids, labels, masks, strict=True):
        positions = torch.arange(1, tokens.shape[1])[None]
        found = mtp.forward_layer(0, window[:, :-1], positions, None, input_ids=tokens[:, 1:])
        found = mtp._project_to_logits(found)
        losses.append(cross_entropy(found[0], wanted[0, 1:], reduction="none")[mask[0, 1:]])
        logits.append(torch.cat([found, torch.zeros_like(found[:, :1])], dim=1))
    return torch.cat(logits, dim=1).detach(), torch.cat(losses).sum()


def _gradients(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.clone()


def _per_expert(tensors: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Under the names of the file: transformers keeps all experts of a layer in one tensor."""
    for name, tensor in tensors:
        stem, is_expert, kind = name.partition(".experts.")
        if not is_expert:
            yield name, tensor
            continue
        for number, one in enumerate(tensor):
            ends = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
            for end, part in zip(ends, one.chunk(len(ends)), strict=True):
                yield f"{stem}.experts.{number}.{end}.weight", part.contiguous()


def _as_in_file(tensors: Any, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors of transformers' MtpModel that are its own, under the names of the published checkpoints."""
    found = {}
    for name, tensor in _per_expert(tensors):
        if not name.startswith("layers.0."):
            continue
        inner = name.removeprefix("layers.0.").removeprefix("mtp_block.")
        inner = inner.replace("post_norm.", "shared_head.norm.")
        found[f"model.layers.{config.num_hidden_layers}.{inner}"] = tensor
    return found


def _copies(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    layer = f"model.layers.{config.num_hidden_layers}"
    return {
        f"{layer}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{layer}.shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
