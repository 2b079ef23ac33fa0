"""Which trained tokens of a window count: those that are new in it, or all of them.

new      each token is trained once, in the window it was said in
window   the formula of the paper: overlaps and pinned turns are trained again in every window that holds them
"""

from collections import Counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_klong.trajectory.context import Window
from megatron_klong.trajectory.segments import Segment
from megatron_klong.trajectory.windows import SplitPlan

type LossOn = Literal["new", "window"]


class TrainedCounts:
    """How often each token of one transcript is trained.

    windows: trained tokens of each window.  times: how often -> so many tokens; nothing is in it that is trained never.
    """

    def __init__(self, segments: list[Segment], plan: SplitPlan, loss_on: LossOn) -> None:
        if loss_on == "new":
            self.windows = [window.trained_tokens for window in plan.windows]
            self.times = Counter({1: sum(self.windows)}) if any(self.windows) else Counter[int]()
            return
        lengths = np.array([len(segment) if segment.trained else 0 for segment in segments], dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(lengths)])
        self.windows = [_trained_in(window, before) for window in plan.windows]
        self.times = Counter()
        times = _windows_that_hold(len(segments), plan)
        for often in np.unique(times[lengths > 0]).tolist():
            if often:
                self.times[often] = int(lengths[times == often].sum())


def _trained_in(window: Window, before: NDArray[np.int64]) -> int:
    return sum(int(before[part.stop] - before[part.start]) for part in window.ranges)


def _windows_that_hold(segments: int, plan: SplitPlan) -> NDArray[np.int64]:
    """In how many windows each segment stands."""
    steps = np.zeros(segments + 1, dtype=np.int64)
    for window in plan.windows:
        for part in window.ranges:
            steps[part.start] += 1
            steps[part.stop] -= 1
    return np.cumsum(steps)[:-1]
