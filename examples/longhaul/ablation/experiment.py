"""The comparison from words to table: tokenizer, held-out shard, a shard and a training run a variant and seed, scores.

Always: the held-out windows are those of the full policy, the same for every variant and seed; a seed decides the
training transcripts, the random weights and the order of the rows, and is the same for all variants.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.longhaul.ablation.runs import LEARNING_RATE, budget, sft_config, train_all
from examples.longhaul.ablation.table import Outcome
from examples.longhaul.ablation.transcripts import texts, transcripts
from examples.longhaul.ablation.variants import Variant, write_shard
from examples.longhaul.corpus import ISOLATED
from megatron_klong.data.shard import Shard
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer

_VOCABULARY = 1024  # an upper bound: every word and number gets a token of its own
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


def compare(plan: Plan) -> list[Outcome]:
    """Train and score every variant with every seed. Raises RunFailed, AnswerError."""
    tokenizer = make_tokenizer(plan.folder / "tokenizer")
    heldout = plan.folder / "heldout"
    write_shard(heldout, transcripts(plan.heldout, seed="heldout"), tokenizer, Variant.SPLIT)
    runs = [(variant, seed) for seed in plan.seeds for variant in plan.variants]
    for variant, seed in runs:
        write_shard(shard_of(plan, variant, seed), transcripts(plan.train, seed=f"train-{seed}"), tokenizer, variant)
    configs = [
        sft_config(
            shard_of(plan, variant, seed),
            run_of(plan, variant, seed),
            steps=plan.steps,
            seed=seed,
            learning_rate=plan.learning_rate,
        )
        for variant, seed in runs
    ]
    train_all(configs, at_once=plan.at_once)
    return [_outcome(plan, variant, seed, Shard(heldout), tokenizer) for variant, seed in runs]


def make_tokenizer(folder: Path) -> Tokenizer:
    """A token for each word and each number."""
    train_tokenizer(texts(_TEXTS, seed="tokenizer"), vocabulary_size=_VOCABULARY, folder=folder, isolated=ISOLATED)
    return load_tokenizer(folder)


def shard_of(plan: Plan, variant: Variant, seed: int) -> Path:
    return plan.folder / "shards" / f"{variant}-{seed}"


def run_of(plan: Plan, variant: Variant, seed: int) -> Path:
    return plan.folder / "runs" / f"{variant}-{seed}"


def _outcome(plan: Plan, variant: Variant, seed: int, heldout: Shard, tokenizer: Tokenizer) -> Outcome:
    from examples.longhaul.ablation.losses import score  # torch

    return Outcome(
        variant=variant,
        seed=seed,
        windows=len(Shard(shard_of(plan, variant, seed))),
        budget=budget(run_of(plan, variant, seed)),
        scores=score(run_of(plan, variant, seed) / "hugging_face", heldout, tokenizer),
    )
