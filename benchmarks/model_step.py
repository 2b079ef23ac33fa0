"""Forward and backward of the model against what it is made of, and against transformers' model of the same weights.

Two rows of as many tokens: one that is whole, and one of several windows that do not see each other, as in training.

    over_bare_megatron           the whole row: tokens a second of our model / of a GPTModel of Megatron-Core's local
                                 layers as they come, with its own attention, norm and experts (which takes no windows)
    over_transformers            the row of windows: the same / of transformers' Glm4MoeForCausalLM, which is told of
                                 windows by their positions, as its padding-free collator does
    over_transformers_one_by_one / of the same model given the windows one by one: no padding, but many small steps
    over_transformers_whole_row  the whole row

One process, the loss of every token included, gradients left in place. All take turns; a ratio is the median over the
rounds. All give the same loss, which is checked. On a GPU the same program compares bf16 models. The last line is JSON.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import megatron_klong.model.megatron_ready  # noqa: E402, F401

# isort: split
import torch  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

from megatron_klong.model.build import build_model  # noqa: E402
from megatron_klong.model.config import LayoutConfig, ModelConfig  # noqa: E402
from megatron_klong.model.hugging_face import save_hugging_face  # noqa: E402
from megatron_klong.model.parallel import initialize  # noqa: E402
from megatron_klong.model.presets import tiny  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402

type Step = Callable[[], float]
type Times = Mapping[str, Sequence[float]]  # seconds a round


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """ids, labels, positions [1, tokens]; windows of these lengths."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]


def random_row(config: ModelConfig, lengths: list[int], device: torch.device) -> Row:
    ids, labels = (torch.randint(0, config.vocab_size, (1, sum(lengths)), device=device) for _ in range(2))
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    return Row(ids=ids, labels=labels, positions=positions, lengths=lengths)


def window_lengths(tokens: int) -> list[int]:
    """Two long windows, two of middle length and four short ones fill the row."""
    lengths = [tokens * share // 64 for share in (20, 16, 9, 7, 4, 3, 3)]
    return [*lengths, tokens - sum(lengths)]


def shape(scale: int) -> ModelConfig:
    """`tiny` at so many times its width and experts, with wider heads and twice the experts a token."""
    wide = tiny(8192, scale=scale)
    return wide.model_copy(update={"head_dim": 2 * wide.head_dim, "num_experts_per_tok": 4})


def transformers_model(model: GPTModel, config: ModelConfig) -> Any:
    """The same weights."""
    from transformers import Glm4MoeForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face([model], config, Path(folder) / "weights")
        return Glm4MoeForCausalLM.from_pretrained(Path(folder) / "weights").train()


def bare(model: GPTModel, config: ModelConfig) -> GPTModel:
    """What Megatron-Core makes of the same configuration when nothing of ours is put into it."""
    transformer_engine = model.config.transformer_impl == "transformer_engine"
    made = GPTModel(
        model.config,
        get_gpt_decoder_block_spec(model.config, use_transformer_engine=transformer_engine),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=config.partial_rotary_factor,
        rotary_base=config.rope_theta,
    ).cuda(torch.cuda.current_device())
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(own[_grouped_name(name)])
    return made


def _grouped_name(name: str) -> str:
    """Experts one by one are called local_experts.3.linear_fc1.weight, grouped ones linear_fc1.weight3."""
    head, one_by_one, tail = name.partition("local_experts.")
    if not one_by_one:
        return name
    number, linear, _ = tail.split(".")
    return f"{head}{linear}.weight{number}"


def megatron_step(model: GPTModel, row: Row) -> Step:
    ends = torch.tensor([0, *accumulate(row.lengths)], dtype=torch.int32, device=row.ids.device)
    packed = None
    if len(row.lengths) > 1:
        longest = max(row.lengths)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )

    def step() -> float:
        model.zero_grad()
        loss = model(row.ids, row.positions, None, labels=row.labels, packed_seq_params=packed).mean()
        loss.backward()
        return float(loss)

    return step


def transformers_step(model: Any, row: Row) -> Step:
    def step() -> float:
        model.zero_grad()
        loss = model(
            row.ids, position_ids=row.positions, labels=row.labels, shift_labels=row.labels, use_cache=False
        ).loss
        loss.backward()
        return float(loss)

    return step


def one_by_one_step(model: Any, row: Row) -> Step:
    windows = list(zip(row.ids.split(row.lengths, 1), row.labels.split(row.lengths, 1), strict=True))

    def step() -> float:
        model.zero_grad()
        total = 0.0
        for ids, labels in windows:
            loss = model(ids, labels=labels, shift_labels=labels, use_cache=False).loss * labels.numel()
            (loss / row.labels.numel()).backward()
            total += float(loss)
        return total / row.labels.numel()

    return step


def timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--scale", type=int, default=4, help="of the tiny model's width and number of experts")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    initialize(LayoutConfig(), seed=1)
    config = shape(options.scale)
    model = build_model(config, LayoutConfig(), precision="bf16" if torch.cuda.is_available() else "fp32")
    device = next(model.parameters()).device
    whole, windows = (
        random_row(config, lengths, device) for lengths in ([options.tokens], window_lengths(options.tokens))
    )
    theirs = transformers_model(model, config).to(device)
    rows: dict[str, dict[str, Step]] = {
        "whole": {
            "ours": megatron_step(model, whole),
            "bare_megatron": megatron_step(bare(model, config), whole),
            "transformers": transformers_step(theirs, whole),
        },
        "windows": {
            "ours": megatron_step(model, windows),
            "transformers": transformers_step(theirs, windows),
            "one_by_one": one_by_one_step(theirs, windows),
        },
    }
    times = {name: rounds(steps, options.rounds) for name, steps in rows.items()}
    ratios = {
        "over_bare_megatron": ratio(times["whole"], "bare_megatron"),
        "over_transformers": ratio(times["windows"], "transformers"),
        "over_transformers_one_by_one": ratio(times["windows"], "one_by_one"),
        "over_transformers_whole_row": ratio(times["whole"], "transformers"),
    }
    report(options, config, model, times, ratios)
    return 0


def rounds(steps: Mapping[str, Step], count: int) -> Times:
    losses = {name: step() for name, step in steps.items()}  # the warm-up
    assert max(losses.values()) - min(losses.values()) < 1e-3 * losses["ours"], losses
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            times[name].append(timed(step))
    return times


def ratio(times: Times, other: str) -> float:
    return statistics.median(theirs / own for theirs, own in zip(times[other], times["ours"], strict=True))


def report(
    options: argparse.Namespace,
    config: ModelConfig,
    model: GPTModel,
    times: Mapping[str, Times],
    ratios: Mapping[str, float],
) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, {config.n_routed_experts} experts, {options.tokens} tokens, "
        f"{options.rounds} rounds, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    rows = [
        [row, name, f"{options.tokens / statistics.median(seconds):,.0f}"]
        for row, models in times.items()
        for name, seconds in models.items()
    ]
    print("\n".join(aligned([["row", "model", "tokens a second"], *rows])))
    print("\n".join(aligned([["ratio", "median"], *([name, f"{value:.3f}"] for name, value in ratios.items())])))
    versions = {name: version(name) for name in ("megatron-core", "torch", "transformers")}
    versions["python"] = platform.python_version()
    rounded = {name: round(value, 4) for name, value in ratios.items()}
    print(json.dumps({"benchmark": "model_step", "ratios": rounded, "versions": versions}))


if __name__ == "__main__":
    sys.exit(main())
