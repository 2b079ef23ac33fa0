"""The record of an episode + what its policy sampled, by turn -> sampled tokens by segment, as the bank keeps them."""

import numpy as np
from numpy.typing import NDArray

from megatron_klong.rl.sampled import SampledSegment
from megatron_klong.serve.turns import SampledTurn, TurnStore
from megatron_klong.trajectory.episode import EpisodeRecord
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.segments import SegmentKind


def by_segment(record: EpisodeRecord, turns: TurnStore, renderer: GlmRenderer) -> list[SampledSegment]:
    """Each trained segment of the transcript with its log-probabilities and policy epochs.

    Raises UnknownTurn for a turn that is not among `turns`, SampledError if a turn does not fill its segments.
    """
    rendered = renderer.transcript(record.transcript(record.id))
    keys = iter(turn.key or "" for turn in record.turns)
    found: list[SampledSegment] = []
    arrays: _Tokens | None = None
    for number, segment in enumerate(rendered.segments):
        if segment.kind is SegmentKind.HEADER:
            arrays = _Tokens(turns[next(keys)])
        elif segment.trained and arrays is not None:
            found.append(arrays.next_segment(number, len(segment)))
    return found


class _Tokens:
    """The tokens of one turn, handed out from the first on."""

    def __init__(self, turn: SampledTurn) -> None:
        self._ids = np.array(turn.ids, dtype=np.int32)
        self._log_probs = np.array(turn.log_probs, dtype=np.float32)
        self._epochs = _epochs(turn)
        self._place = 0

    def next_segment(self, number: int, tokens: int) -> SampledSegment:
        start, self._place = self._place, self._place + tokens
        part = slice(start, self._place)
        return SampledSegment(
            segment=number, ids=self._ids[part], log_probs=self._log_probs[part], epochs=self._epochs[part]
        )


def _epochs(turn: SampledTurn) -> NDArray[np.int32]:
    """The policy epoch of each sampled token; the engine counts tokens from the start of the prompt."""
    starts, epochs = np.array(sorted(turn.policy_epoch) or [(0, 0)], dtype=np.int32).T
    places = turn.prompt_tokens + np.arange(len(turn.ids))
    found: NDArray[np.int32] = epochs[np.maximum(np.searchsorted(starts, places, side="right") - 1, 0)]
    return found
