"""A rendered transcript + context policy -> its windows: cut where the live agent would have been cut.

Always: trained tokens of all windows + dropped tokens = trainable tokens of the transcript.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_klong.trajectory.context import ContextError, ContextPolicy, ContextTracker, DropReason, Window
from megatron_klong.trajectory.schema import Role
from megatron_klong.trajectory.segments import RenderedTranscript


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """The windows of one transcript, and what could not be put into any, in trained tokens by reason.

    cuts_without_newest_turn: windows that begin without the last thing the agent saw, since it was too long to keep.
    """

    windows: tuple[Window, ...]
    trainable_tokens: int
    dropped_tokens: Mapping[DropReason, int]
    cuts_without_newest_turn: int


def split(rendered: RenderedTranscript, policy: ContextPolicy) -> SplitPlan:
    """Cut a transcript into windows."""
    tracker = ContextTracker(policy)
    head_stop = rendered.head_stop
    try:
        tracker.begin(rendered.preamble, rendered.messages[:head_stop])
    except ContextError:
        trainable = sum(len(segment) for segment in rendered.segments if segment.trained)
        dropped = {DropReason.PREFIX_EXCEEDS_WINDOW: trainable}
        return SplitPlan(windows=(), trainable_tokens=trainable, dropped_tokens=dropped, cuts_without_newest_turn=0)
    for message in rendered.messages[head_stop:]:
        if message.role is Role.ASSISTANT:
            tracker.next_turn()
            for _ in range(message.halved):
                tracker.halve_history()
            tracker.add_turn(message)
        else:
            tracker.add_message(message)
    tracker.finish(rendered.closing)
    return SplitPlan(
        windows=tuple(tracker.windows),
        trainable_tokens=tracker.trainable_tokens,
        dropped_tokens=Counter(tracker.dropped_tokens),
        cuts_without_newest_turn=tracker.cuts_without_newest_turn,
    )
