"""The split plan's rows: hand-computed borders and overlaps, and what always holds."""

from itertools import pairwise

from hypothesis import given

from megatron_klong.trajectory.context import ContextPolicy, WindowEnd
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.phases import Phase
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.segments import SegmentKind
from megatron_klong.trajectory.split_plan import Layout, split_rows
from megatron_klong.trajectory.windows import split
from tests.unit.trajectory.builders import (
    assistant,
    bash,
    byte_tokenizer,
    policies,
    policy,
    tool,
    transcript,
    transcripts,
    user,
)

RENDERER = GlmRenderer(byte_tokenizer())


def test_rows_of_a_small_transcript() -> None:
    # Task: 2 + 1 + len("\ntask") 5 = 8 tokens. A turn: header 1, empty think 3, answer, end 1, result.
    # Answer: "\n" <tool_call> "bash\n" <arg_key> cmd </arg_key> "\n" <arg_value> X </arg_value> "\n" </tool_call>
    #         1 + 1 + 5 + 1 + 3 + 1 + 1 + 1 + len(X) + 1 + 1 + 1 = 17 + len(X)
    # Result: "\n" <tool_response> "\n" Y "\n" </tool_response> = 5 + len(Y). Turn: 27 + len(X) + len(Y) = 50.
    turns = [(assistant(calls=[bash("cat " + "x" * 8)]), tool("y" * 11)) for _ in range(4)]
    made = transcript(user("task"), *[message for turn in turns for message in turn])
    rule = policy(170, reserve=50, keep=60, pin="task")
    rendered = RENDERER.transcript(made)
    rows = split_rows(rendered, made, split(rendered, rule))
    # 8 + 50 + 50 + 50 = 158: three turns fit, the fourth would end at 208 with a reserve of 50.
    # Before turn 2: 8 + 100 + 50 <= 170; before turn 3: 8 + 150 + 50 > 170.
    # The second window keeps turn 2 (50 tokens fit keep 60, 100 do not).
    assert [(row.first_message, row.last_message) for row in rows] == [(1, 5), (7, 7)]
    assert [(row.first_turn, row.last_turn) for row in rows] == [(0, 2), (3, 3)]
    assert [row.end for row in rows] == [WindowEnd.OVERFLOW, WindowEnd.FINISHED]
    assert [row.prefix_tokens for row in rows] == [8, 8]
    # Turn 2 as the first window holds it ends with its end token; the second also shows the result of 16 tokens.
    assert [row.overlap_tokens for row in rows] == [0, 50]
    assert [(row.shared_with_previous, row.shared_with_next) for row in rows] == [(0, 34), (34, 0)]
    assert rows[1].tokens_by_kind[SegmentKind.OBSERVATION] == 16
    assert [row.phase for row in rows] == [Phase.READING, Phase.READING]
    assert rows[0].turns_by_phase == {Phase.READING: 3}


@given(made=transcripts(), rule=policies())
def test_rows_add_up(made: Transcript, rule: ContextPolicy) -> None:
    rendered = RENDERER.transcript(made)
    plan = split(rendered, rule)
    rows = split_rows(rendered, made, plan)
    assert len(rows) == len(plan.windows)
    for row, window in zip(rows, plan.windows, strict=True):
        assert sum(row.tokens_by_kind.values()) == window.tokens
        assert row.shared_with_previous <= row.overlap_tokens
        assert sum(row.turns_by_phase.values()) == row.last_turn - row.first_turn + 1
        assert row.phase is not None
    for before, after in pairwise(rows):
        assert before.shared_with_next == after.shared_with_previous
        assert before.last_message < after.first_message
        assert before.last_turn < after.first_turn


@given(made=transcripts())
def test_kinds_tell_messages_as_rendering_made_them(made: Transcript) -> None:
    rendered = RENDERER.transcript(made)
    segments = rendered.segments
    layout = Layout.of([segment.kind for segment in segments], [len(segment) for segment in segments])
    expected = [-1] * len(rendered.preamble)
    for number, message in enumerate(rendered.messages):
        for segment in message.segments:
            ends_turn = segment.kind in (SegmentKind.TURN_END, SegmentKind.SAMPLED_END)
            expected.append(number - 1 if ends_turn else number)
    expected += [len(rendered.messages) - 1] * len(rendered.closing)
    assert layout.messages == expected
    assert max(layout.turns, default=-1) == made.turns - 1
