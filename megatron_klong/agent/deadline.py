"""One deadline an episode: made once from the stage's timeout, handed down, written down as what is left of it.

Always: by default time spent waiting for the engine (its queue, retries) does not count, so that load does not change
what an agent can achieve; how much that was is kept either way. An episode that was frozen goes on with what was left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio

_SHORTEST_WAIT_SECONDS = 0.02  # else what stands still shortly before the end would be asked all the time


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeUsed:
    """Seconds of an episode so far: on the wall, and of those the ones that did not count."""

    total_seconds: float = 0.0
    given_back_seconds: float = 0.0


class Deadline:
    """Counts down from `seconds` by the clock `working`; `total` is the clock that also counts waiting."""

    def __init__(
        self,
        seconds: float,
        *,
        total: Callable[[], float],
        working: Callable[[], float],
        give_back: bool = True,
        before: TimeUsed | None = None,
    ) -> None:
        """`before`: what an earlier part of the episode used. give_back: whether waiting is left out of the count."""
        self.seconds = seconds
        self._total, self._working = total, working
        self._total_start, self._working_start = total(), working()
        self._give_back = give_back
        self._before = before or TimeUsed()
        self._forgiven = 0.0
        self._left_out_since: tuple[float, float] | None = None  # by both clocks

    def forgive(self, seconds: float) -> None:
        """Count seconds among those waited for others."""
        self._forgiven += seconds

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens within takes none of the episode's seconds: the machinery works, and nobody is waited for."""
        self._left_out_since = (started, _) = self._total(), self._working()
        try:
            yield
        finally:
            self._left_out_since = None
            seconds = self._total() - started
            self._total_start += seconds
            self._working_start += seconds

    async def passed(self) -> None:
        """Wait until it has, however often it stands still before."""
        while (remaining := self.remaining) > 0:
            await anyio.sleep(max(remaining, _SHORTEST_WAIT_SECONDS))

    @property
    def waited(self) -> float:
        """Seconds waited for others, whether they count or not."""
        return self._before.given_back_seconds + self._forgiven + self._waited_now()

    @property
    def total(self) -> float:
        """Seconds on the wall."""
        return self._before.total_seconds + self._clocks[0] - self._total_start

    @property
    def elapsed(self) -> float:
        """Seconds used."""
        return self.total - self.waited if self._give_back else self.total

    @property
    def remaining(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.seconds - self.elapsed

    @property
    def used(self) -> TimeUsed:
        """What to write down."""
        return TimeUsed(total_seconds=self.total, given_back_seconds=self.waited)

    @property
    def _clocks(self) -> tuple[float, float]:
        return self._left_out_since or (self._total(), self._working())

    def _waited_now(self) -> float:
        total, working = self._clocks
        return max(0.0, (total - self._total_start) - (working - self._working_start))


def readable_seconds(seconds: float) -> str:
    """1h 5m, 3m 20s or 42s, for a reminder."""
    whole = max(0, int(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"
