"""The comparison from words to scores.

Always: the held-out windows are those of the full policy, the same for every variant and seed; a seed decides the
training transcripts, the random weights and the order of the rows, and is the same for all variants.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.longhaul.ablation.runs import LEARNING_RATE, budget, sft_config, train_all
from examples.longhaul.ablation.table import Outcome
from examples.longhaul.ablation.transcripts import ISOLATED, texts, transcripts
from examples.longhaul.ablation.variants import Variant, write_shard
from megatron_klong.data.shard import Shard
from megatron_klong.train.config import SftConfig
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer

_VOCABULARY = 2048  # an upper bound: every word and every fact gets a token of its own
_TEXTS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is compared. train, heldout: transcripts.  at_once: training runs, each on a core."""

    folder: Path
    variants: Sequence[Variant]
    seeds: Sequence[int]
    steps: int
    train: int
    heldout: int
    at_once: int
    learning_rate: float = LEARNING_RATE

    def shard(self, variant: Variant, seed: int) -> Path:
        return self.folder / "shards" / f"{variant}-{seed}"

    def run(self, variant: Variant, seed: int) -> Path:
        return self.folder / "runs" / f"{variant}-{seed}"

    @property
    def pairs(self) -> list[tuple[Variant, int]]:
        """The compared runs."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]


def compare(plan: Plan) -> list[Outcome]:
    """Train and score every variant with every seed. Raises RunFailed, AnswerError."""
    tokenizer = make_tokenizer(plan.folder / "tokenizer")
    heldout = plan.folder / "heldout"
    write_shard(heldout, transcripts(plan.heldout, seed="held-out"), tokenizer, Variant.SPLIT)
    train_all([_run(plan, variant, seed, tokenizer) for variant, seed in plan.pairs], at_once=plan.at_once)
    return [_outcome(plan, variant, seed, Shard(heldout), tokenizer) for variant, seed in plan.pairs]


def _run(plan: Plan, variant: Variant, seed: int, tokenizer: Tokenizer) -> SftConfig:
    shard = plan.shard(variant, seed)
    write_shard(shard, transcripts(plan.train, seed=f"train-{seed}"), tokenizer, variant)
    folder = plan.run(variant, seed)
    return sft_config(shard, folder, steps=plan.steps, seed=seed, learning_rate=plan.learning_rate)


def make_tokenizer(folder: Path) -> Tokenizer:
    """A token for each word and each fact."""
    train_tokenizer(texts(_TEXTS, seed="tokenizer"), vocabulary_size=_VOCABULARY, folder=folder, isolated=ISOLATED)
    return load_tokenizer(folder)


def _outcome(plan: Plan, variant: Variant, seed: int, heldout: Shard, tokenizer: Tokenizer) -> Outcome:
    from examples.longhaul.ablation.losses import score  # torch

    return Outcome(
        variant=variant,
        seed=seed,
        windows=len(Shard(plan.shard(variant, seed))),
        budget=budget(plan.run(variant, seed)),
        scores=score(plan.run(variant, seed) / "hugging_face", heldout, tokenizer),
    )
