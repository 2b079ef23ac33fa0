"""The sources of a run opened, and divided into what is trained and what is held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_klong.data.blend import Blend, Part
from megatron_klong.data.shard import Shard
from megatron_klong.data.sources import ShardSource, SourceConfig, check_one_tokenizer, find_tokenizer, open_source
from megatron_klong.data.splits import held_out
from megatron_klong.trajectory.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """validation: rows of what is held out, or None. shards: of all sources that are no plain documents."""

    train: Blend
    validation: Blend | None
    shards: tuple[Shard, ...]

    @property
    def vocabulary_size(self) -> int:
        """Ids of the tokenizer; 0 where all sources are plain documents, which do not say."""
        return max((int(shard.manifest["tokenizer"]["vocabulary_size"]) for shard in self.shards), default=0)

    def find_tokenizer(self, folders: Sequence[Path] = ()) -> Tokenizer | None:
        """As `sources.find_tokenizer`."""
        return find_tokenizer(self.shards, folders)


def open_mixture(
    configs: Mapping[str, SourceConfig],
    *,
    row_tokens: int,
    seed: int,
    validation_share: float = 0.0,
    window_multiple: int = 1,
    verify: bool = True,
) -> Mixture:
    """Open all sources. Raises ShardError, IndexedError, PackingError."""
    sources = {name: open_source(config, row_tokens=row_tokens, verify=verify) for name, config in configs.items()}
    shards = [shard for source in sources.values() if isinstance(source, ShardSource) for shard in source.shards]
    check_one_tokenizer(shards)
    shares = {
        name: validation_share if config.validation_share is None else config.validation_share
        for name, config in configs.items()
    }
    held = held_out([sources[name].keys for name in configs], [shares[name] for name in configs])
    train, validation = [], []
    for name, source in sources.items():
        out = _are_in(source.keys, held)[source.document]
        everything = np.arange(len(out))
        if shares[name] < 1:
            train.append(Part(name=name, source=source, windows=everything[~out], weight=configs[name].weight))
        validation.append(Part(name=name, source=source, windows=everything[out]))
    settings = {"row_tokens": row_tokens, "seed": seed, "window_multiple": window_multiple}
    measured = [part for part in validation if part.trained_tokens]
    return Mixture(
        train=Blend(train, **settings),
        validation=Blend(measured, **settings) if measured else None,
        shards=tuple(shards),
    )


def _are_in(keys: Sequence[str], held: frozenset[str]) -> NDArray[np.bool_]:
    """[documents]"""
    return np.array([key in held for key in keys], dtype=np.bool_)
