"""A source of given lengths, for tests of order and shares."""

from collections.abc import Sequence

import numpy as np

from megatron_klong.data.shard import WindowTokens


class Lengths:
    """Windows of so many tokens, of which so many are trained; documents of `windows_each` windows."""

    def __init__(self, lengths: Sequence[int], trained: Sequence[int] | None = None, *, windows_each: int = 1) -> None:
        self.lengths_tokens = np.array(lengths, dtype=np.int64)
        self.trained_tokens = np.array(trained if trained is not None else lengths, dtype=np.int64)
        self.prefix_tokens = np.zeros_like(self.lengths_tokens)
        self.document = np.arange(len(lengths)) // windows_each
        self.continuation = np.arange(len(lengths)) % windows_each > 0
        self.keys: Sequence[str] = [f"task:{number}" for number in range(int(self.document.max(initial=-1)) + 1)]
        self.fingerprint = str(list(lengths))

    def window(self, number: int) -> WindowTokens:
        length, trained = int(self.lengths_tokens[number]), int(self.trained_tokens[number])
        mask = np.arange(length) >= max(1, length - trained)
        return WindowTokens(ids=np.full(length, number, dtype=np.int32), loss_mask=mask, new_start=0)
