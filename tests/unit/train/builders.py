"""A small shard to train on."""

from pathlib import Path

from megatron_klong.data.mixture import Mixture, open_mixture
from megatron_klong.data.shard import ShardWriter
from megatron_klong.data.sources import SourceConfig
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.tokenizer import Tokenizer
from megatron_klong.trajectory.windows import split
from tests.unit.trajectory.builders import assistant, bash, byte_tokenizer, policy, tool, transcript, user

ROW_TOKENS = 256


def mixture_of(
    *prefixes: Path,
    row_tokens: int = ROW_TOKENS,
    seed: int = 0,
    window_multiple: int = 1,
    validation_share: float = 0.0,
) -> Mixture:
    """As the SFT program opens them by default."""
    source = SourceConfig(shards=tuple(map(str, prefixes)))
    return open_mixture(
        {"shards": source},
        row_tokens=row_tokens,
        seed=seed,
        validation_share=validation_share,
        window_multiple=window_multiple,
    )


def small_shard(prefix: Path, tokenizer: Tokenizer | None = None) -> Path:
    """Transcripts of a counting agent, cut into windows of at most 200 tokens."""
    tokenizer = tokenizer or byte_tokenizer()
    renderer = GlmRenderer(tokenizer)
    rule = policy(200)
    with ShardWriter(prefix, tokenizer, rule, renderer=renderer.name, overwrite=False) as shard:
        for number in range(12):
            turns = [
                message
                for turn in range(4 + number)
                for message in (assistant(calls=[bash(f"count {turn}")]), tool(f"counted to {turn}"))
            ]
            made = transcript(user(f"count to {4 + number}"), *turns, assistant("done"))
            rendered = renderer.transcript(made)
            shard.add(made, rendered, split(rendered, rule))
    return prefix
