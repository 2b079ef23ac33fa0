"""How much the tokens of each rollout weigh in the loss of a global batch.

The train step divides the weighted sum over tokens by the number of trained tokens. The weights make of that

    per_token       each trained token counts the same; a rollout counts as much as it has tokens
    per_trajectory  each rollout counts the same: the mean over its tokens, then over the rollouts
    paper           each group counts the same: the sum over its tokens (no division by lengths) over its number of
                    windows n * K, then the mean over groups; scales with the number of tokens in a window

(reference: KLong, arXiv 2602.17547, progressive RL).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_klong.rl.config import Normalise


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRollout:
    """What a rollout adds to a global batch; group: its task."""

    group: str
    trained_tokens: int
    windows: int


def token_weights(rollouts: Sequence[TrainedRollout], normalise: Normalise) -> list[float]:
    """The weight of each rollout's tokens, to be divided by all trained tokens of `rollouts`, the global batch.

    Raises ValueError for a rollout with nothing to train on.
    """
    for rollout in rollouts:
        if rollout.trained_tokens < 1 or rollout.windows < 1:
            raise ValueError(f"{rollout} has nothing to train on; leave it out")
    tokens = sum(rollout.trained_tokens for rollout in rollouts)
    if normalise == "per_token":
        return [1.0] * len(rollouts)
    if normalise == "per_trajectory":
        return [tokens / (len(rollouts) * rollout.trained_tokens) for rollout in rollouts]
    windows: Counter[str] = Counter()
    for rollout in rollouts:
        windows[rollout.group] += rollout.windows
    return [tokens / (len(windows) * windows[rollout.group]) for rollout in rollouts]
