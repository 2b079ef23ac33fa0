"""The comparison from words to scores.

Stages as in the recipe: short demonstrations first, from random weights, then the long transcripts, cut in each way.

Always: the held-out windows are those of the full policy, the same for every variant and seed; a seed decides the
training transcripts, the random weights and the order of the rows, and is the same for all variants: those of a seed
go on from the very same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.longhaul.ablation.runs import LEARNING_RATE, budget, sft_config, train_all
from examples.longhaul.ablation.table import Outcome
from examples.longhaul.ablation.transcripts import demonstrations, texts, transcripts
from examples.longhaul.ablation.variants import Variant, write_shard
from examples.longhaul.corpus import ISOLATED
from megatron_klong.data.shard import Shard
from megatron_klong.train.config import SftConfig
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer

DEMONSTRATIONS = "demonstrations"
_VOCABULARY = 1024  # an upper bound: every word and number gets a token of its own
_TEXTS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is compared. demonstrations, train, heldout: transcripts.  at_once: training runs, each on a core."""

    folder: Path
    variants: Sequence[Variant]
    seeds: Sequence[int]
    demonstration_steps: int
    steps: int
    demonstrations: int
    train: int
    heldout: int
    at_once: int
    learning_rate: float = LEARNING_RATE

    def shard(self, name: str, seed: int) -> Path:
        return self.folder / "shards" / f"{name}-{seed}"

    def run(self, name: str, seed: int) -> Path:
        return self.folder / "runs" / f"{name}-{seed}"

    @property
    def pairs(self) -> list[tuple[Variant, int]]:
        """The compared runs."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]


def compare(plan: Plan) -> list[Outcome]:
    """Train and score every variant with every seed. Raises RunFailed, AnswerError."""
    tokenizer = make_tokenizer(plan.folder / "tokenizer")
    train_all([_demonstration_run(plan, seed, tokenizer) for seed in plan.seeds], at_once=plan.at_once)
    train_all([_variant_run(plan, variant, seed, tokenizer) for variant, seed in plan.pairs], at_once=plan.at_once)
    heldout = plan.folder / "heldout"
    write_shard(heldout, transcripts(plan.heldout, seed="heldout"), tokenizer, Variant.SPLIT)
    return [_outcome(plan, variant, seed, Shard(heldout), tokenizer) for variant, seed in plan.pairs]


def _demonstration_run(plan: Plan, seed: int, tokenizer: Tokenizer) -> SftConfig:
    shard = plan.shard(DEMONSTRATIONS, seed)
    write_shard(shard, demonstrations(plan.demonstrations, seed=f"demonstrate-{seed}"), tokenizer, Variant.SPLIT)
    folder = plan.run(DEMONSTRATIONS, seed)
    return sft_config(shard, folder, steps=plan.demonstration_steps, seed=seed, learning_rate=plan.learning_rate)


def _variant_run(plan: Plan, variant: Variant, seed: int, tokenizer: Tokenizer) -> SftConfig:
    shard = plan.shard(variant, seed)
    write_shard(shard, transcripts(plan.train, seed=f"train-{seed}"), tokenizer, variant)
    return sft_config(
        shard,
        plan.run(variant, seed),
        steps=plan.steps,
        seed=seed,
        learning_rate=plan.learning_rate,
        init=plan.run(DEMONSTRATIONS, seed) / "hugging_face",
    )


def make_tokenizer(folder: Path) -> Tokenizer:
    """A token for each word and each number."""
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
