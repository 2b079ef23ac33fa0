"""Which tasks are held out for validation: by a hash of their name, so that a task never changes sides.

More data, another seed or another mixture move no task from one side to the other. A task held out by one source is
held out of all of them, whatever windows, samples and runs of it there are.
"""

import hashlib
from collections.abc import Sequence


def held_out(keys: Sequence[Sequence[str]], shares: Sequence[float]) -> frozenset[str]:
    """Keys (of tasks, or of transcripts without one) to be held out, given those of each source and its share.

    A share above 0 holds out at least one key of its source.
    """
    found: set[str] = set()
    for names, share in zip(keys, shares, strict=True):
        if share and names:
            lowest = min(names, key=_place)
            found |= {lowest} | {name for name in set(names) if _place(name) < share}
    return frozenset(found)


def _place(key: str) -> float:
    """In [0, 1)."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
