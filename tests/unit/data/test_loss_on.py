"""loss_on: whose trained tokens count in a window, in the shard, its counts and the report."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.data.loss_on import LossOn, TrainedCounts
from megatron_klong.data.shard import Shard, ShardWriter
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.windows import split
from tests.unit.trajectory.builders import (
    assistant,
    byte_tokenizer,
    policies,
    policy,
    tool,
    transcript,
    transcripts,
    user,
)

RENDERER = GlmRenderer(byte_tokenizer())


def shard_of(prefix: Path, made: Transcript, rule: ContextPolicy, loss_on: LossOn) -> Shard:
    rendered = RENDERER.transcript(made)
    with ShardWriter(
        prefix, byte_tokenizer(), rule, renderer=RENDERER.name, overwrite=False, loss_on=loss_on
    ) as writer:
        writer.add(made, rendered, split(rendered, rule))
    return Shard(prefix)


def test_with_window_a_turn_that_is_kept_is_trained_again() -> None:
    # Head 8, a turn 13 to 15 with its result. Before the fourth 8 + 42 and a reserve of 15 exceed 60: two are kept.
    work = [message for n in range(4) for message in (assistant(f"say{n}"), tool(""))]
    rendered = RENDERER.transcript(transcript(user("task"), *work))
    plan = split(rendered, policy(60, reserve=15, keep=35))
    assert len(plan.windows) == 2
    new, window = (TrainedCounts(rendered.segments, plan, loss_on) for loss_on in ("new", "window"))  # type: ignore[arg-type]
    # "\nsay0" and the token that ends it: 6 a turn
    assert sum(new.windows) == 24
    assert new.times == {1: 24}
    assert window.windows == [18, 18]
    assert window.times == {1: 12, 2: 12}


@settings(max_examples=80)
@given(made=transcripts(), rule=policies(), loss_on=st.sampled_from(["new", "window"]))
def test_masks_columns_counts_and_times_agree_with_the_windows(
    made: Transcript, rule: ContextPolicy, loss_on: LossOn, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shard = shard_of(tmp_path_factory.mktemp("shard") / "s", made, rule, loss_on)
    rendered = RENDERER.transcript(made)
    segments, plan = rendered.segments, split(rendered, rule)
    times: Counter[int] = Counter()
    for number, window in enumerate(plan.windows):
        inside = [n for part in window.ranges for n in part]
        counts = [segments[n].trained and (loss_on == "window" or n >= window.first_new) for n in inside]
        mask = [count for n, count in zip(inside, counts, strict=True) for _ in segments[n].ids]
        assert shard.window(number).loss_mask.tolist() == mask
        assert shard.column("trained_tokens")[number] == sum(mask)
        assert not mask[0]  # nothing could predict it
        times.update(n for n, count in zip(inside, counts, strict=True) if count)
    assert shard.manifest["loss_on"] == loss_on
    assert shard.manifest["counts"]["trained_tokens"] == sum(shard.column("trained_tokens"))
    often: Counter[int] = Counter()
    for number, count in times.items():
        often[count] += len(segments[number])
    assert TrainedCounts(segments, plan, loss_on).times == {n: tokens for n, tokens in often.items() if tokens}


@settings(max_examples=60)
@given(made=transcripts(), rule=policies())
def test_every_token_is_trained_at_least_as_often_with_window(made: Transcript, rule: ContextPolicy) -> None:
    rendered = RENDERER.transcript(made)
    plan = split(rendered, rule)
    new, window = (TrainedCounts(rendered.segments, plan, loss_on) for loss_on in ("new", "window"))  # type: ignore[arg-type]
    assert all(a <= b for a, b in zip(new.windows, window.windows, strict=True))
    assert sum(window.times.values()) == sum(new.windows)
    assert sum(often * tokens for often, tokens in window.times.items()) == sum(window.windows)
