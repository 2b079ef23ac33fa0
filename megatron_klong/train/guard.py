"""Which updates are made: none by a gradient that is no number, or that is far longer than gradients lately were."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

_REMEMBERED = 64
_ENOUGH = 16


class UpdateGuard:
    """Given the same norms, it decides the same on every process, and after a resume.

    Example: factor 5, and the last norms had a median of 0.8: an update of norm 4.1 is skipped, and not remembered.
    """

    def __init__(self, *, spike_factor: float | None, max_skipped: int) -> None:
        """max_skipped: one after the other; spike_factor: None skips only what is no number."""
        self._factor = spike_factor
        self._max_skipped = max_skipped
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._in_a_row = 0
        self.skipped = 0
        """In all."""

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether the update is to be made; counts it."""
        fine = math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm <= self.limit
        if fine:
            self._norms.append(grad_norm)
            self._in_a_row = 0
        else:
            self._in_a_row += 1
            self.skipped += 1
        return fine

    @property
    def limit(self) -> float:
        """The longest gradient accepted next."""
        if self._factor is None or len(self._norms) < _ENOUGH:
            return math.inf
        return self._factor * median(self._norms)

    @property
    def gives_up(self) -> bool:
        """Whether more updates in a row were skipped than may be."""
        return self._in_a_row > self._max_skipped

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"norms": list(self._norms), "in_a_row": self._in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self._norms = deque(state["norms"], maxlen=_REMEMBERED)
        self._in_a_row, self.skipped = state["in_a_row"], state["skipped"]
