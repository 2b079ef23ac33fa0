"""Five ways to make training windows of the same transcripts; each takes one thing away from the first.

    split       every window of the context policy: pinned prefix, surviving history, new turns
    head        the transcript truncated to its first window
    tail        the transcript truncated to its last window
    no_prefix   every window, but only the task is pinned: the reading is dropped as any other history
    no_overlap  every window, but of the history nothing survives a cut beyond the newest turn

The truncations have no other window that could train what theirs holds, so all of it is trained; elsewhere a token is
trained where it is new.

Always (tests/unit/examples/test_ablation_variants.py): no variant's window is longer than another's may be; head and
tail are windows of the split plan.
"""

from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from megatron_klong.data.loss_on import LossOn
from megatron_klong.data.shard import ShardWriter
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.tokenizer import Tokenizer
from megatron_klong.trajectory.windows import SplitPlan, split

# A transcript has about 650 tokens; a turn with its result 20, so `keep` holds every fact that is asked for.
POLICY = ContextPolicy(max_tokens=264, reserve_tokens=24, keep=84, pin="reading", prefix_cap_tokens=96)


class Variant(StrEnum):
    SPLIT = "split"
    HEAD = "head"
    TAIL = "tail"
    NO_PREFIX = "no_prefix"
    NO_OVERLAP = "no_overlap"


def policy_of(variant: Variant) -> ContextPolicy:
    """The rule that cuts the variant's windows."""
    match variant:
        case Variant.NO_PREFIX:
            return replace(POLICY, pin="task")
        case Variant.NO_OVERLAP:
            return replace(POLICY, keep=0)
    return POLICY


def write_shard(prefix: Path, transcripts: Iterable[Transcript], tokenizer: Tokenizer, variant: Variant) -> None:
    """The variant's windows of all transcripts; what a truncation leaves out is in no window."""
    renderer, policy = GlmRenderer(tokenizer), policy_of(variant)
    loss_on: LossOn = "window" if variant in (Variant.HEAD, Variant.TAIL) else "new"
    with ShardWriter(prefix, tokenizer, policy, renderer=renderer.name, overwrite=True, loss_on=loss_on) as shard:
        for transcript in transcripts:
            rendered = renderer.transcript(transcript)
            shard.add(transcript, rendered, _truncated(split(rendered, policy), variant))


def _truncated(plan: SplitPlan, variant: Variant) -> SplitPlan:
    match variant:
        case Variant.HEAD:
            return replace(plan, windows=plan.windows[:1])
        case Variant.TAIL:
            return replace(plan, windows=plan.windows[-1:])
    return plan
