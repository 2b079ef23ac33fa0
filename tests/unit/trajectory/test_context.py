"""Windows: where they are cut, what they hold, and that live agent and splitter agree."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.trajectory.context import ContextError, ContextPolicy, DropReason, Window, WindowEnd
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.live import LiveContext
from megatron_klong.trajectory.replay import prompt_fingerprints
from megatron_klong.trajectory.schema import Message, Reading, Role, Sampled, Transcript
from megatron_klong.trajectory.segments import RenderedTranscript, Segment, SegmentKind
from megatron_klong.trajectory.windows import SplitPlan, split
from tests.unit.trajectory.builders import (
    assistant,
    bash,
    byte_tokenizer,
    policies,
    policy,
    sampled,
    system,
    tool,
    transcript,
    transcripts,
    user,
)

RENDERER = GlmRenderer(byte_tokenizer())
ENDS = ("<|observation|>", "<|user|>", None)


def cut(made: Transcript, **settings: object) -> tuple[RenderedTranscript, SplitPlan]:
    rendered = RENDERER.transcript(made)
    return rendered, split(rendered, policy(**settings))  # type: ignore[arg-type]


def text(rendered: RenderedTranscript, window: Window) -> str:
    """What a window holds, as text."""
    segments = rendered.segments
    ids = [token for part in window.ranges for number in part for token in segments[number].ids]
    return RENDERER.tokenizer.decode(ids)


def numbers(window: Window) -> list[int]:
    return [number for part in window.ranges for number in part]


def working_turns(count: int, length: int = 10) -> list[Message]:
    """Turns of the same length: a call and a result, each with its number in it."""
    made: list[Message] = []
    for number in range(count):
        made += [assistant(calls=[bash(f"c{number:02d}")]), tool(f"r{number:02d}".ljust(length, "."))]
    return made


# -- hand-computed cuts


def test_a_transcript_that_fits_is_one_window() -> None:
    rendered, plan = cut(transcript(user("task"), *working_turns(2)), max_tokens=400)
    assert [window.end for window in plan.windows] == [WindowEnd.FINISHED]
    assert text(rendered, plan.windows[0]).startswith(
        "[gMASK]<sop><|user|>\ntask<|assistant|>\n<think></think>\n<tool_call>bash"
    )
    # The last window ends with the last turn's end token: nobody sampled anything after the result behind it.
    assert text(rendered, plan.windows[0]).endswith("</tool_call><|observation|>")


def test_windows_overlap_by_the_newest_whole_turns() -> None:
    # A turn: header 1, "\n" and think tags 3, "\n" and call 1 + 1 + "bash\n" 5 + key 1+3+1+1 + value 1+3+1+1 + 1 = 20,
    # end token 1; then the result: "\n" 1, tag 1, "\n" + 10 + "\n" 12, tag 1 = 15. Together 40; without the
    # result 25. Task: [gMASK]<sop> 2, <|user|>\ntask 6 = 8.
    rendered, plan = cut(transcript(user("task"), *working_turns(6)), max_tokens=150, reserve=30, keep=80)
    # Before turn n (from 0) the context has 8 + 40 n tokens. 8 + 40*3 = 128, + 30 > 150: cut before turn 3.
    # keep 80 holds two turns (80): context 88, turn 3 makes 128, cut before turn 4, and so on.
    assert [text(rendered, window).count("<|assistant|>") for window in plan.windows] == [3, 3, 3, 3]
    assert [window.tokens for window in plan.windows] == [8 + 40 * 2 + 25] * 4
    assert [(window.prefix_tokens, window.overlap_tokens, window.new_tokens) for window in plan.windows] == [
        (8, 0, 40 * 2 + 25),
        (8, 80, 25),
        (8, 80, 25),
        (8, 80, 25),
    ]
    # Trained per turn: call 20 + end token 1.
    assert [window.trained_tokens for window in plan.windows] == [63, 21, 21, 21]
    assert "c03" in text(rendered, plan.windows[1])
    assert "c00" not in text(rendered, plan.windows[1])


def test_keep_as_a_fraction_is_of_the_window_behind_the_prefix() -> None:
    made = transcript(user("task"), *working_turns(6))
    _, plan = cut(made, max_tokens=150, reserve=30, keep=0.6)  # 0.6 * (150 - 8) = 85.2: two turns
    assert plan.windows[1].overlap_tokens == 80


def test_the_newest_turn_survives_a_cut_even_above_keep() -> None:
    made = transcript(user("task"), *working_turns(6))
    _, plan = cut(made, max_tokens=150, reserve=30, keep=5)
    assert plan.windows[1].overlap_tokens == 40
    assert plan.cuts_without_newest_turn == 0


def test_a_result_longer_than_the_window_is_left_behind_and_counted() -> None:
    made = transcript(user("task"), assistant(calls=[bash("x")]), tool("y" * 500), *working_turns(1))
    rendered, plan = cut(made, max_tokens=150, reserve=30)
    assert plan.cuts_without_newest_turn == 1
    assert [window.overlap_tokens for window in plan.windows] == [0, 0]
    assert not plan.dropped_tokens
    assert "yyy" not in "".join(text(rendered, window) for window in plan.windows)


def test_reading_turns_are_pinned_until_the_reading_is_complete() -> None:
    reading = [
        assistant(calls=[bash("p1")]),
        tool("page one", Reading.PART),
        assistant(calls=[bash("p2")]),
        tool("page two", Reading.COMPLETE),
    ]
    rendered, plan = cut(transcript(user("task"), *reading, *working_turns(8)), max_tokens=260, reserve=40, cap=130)
    assert len(plan.windows) > 2
    for window in plan.windows:
        assert "page one" in text(rendered, window)
        assert "page two" in text(rendered, window)
    _, pinned_task = cut(
        transcript(user("task"), *reading, *working_turns(8)), max_tokens=260, reserve=40, cap=130, pin="task"
    )
    assert {window.prefix_tokens for window in pinned_task.windows} == {8}


def test_the_prefix_stops_below_its_cap() -> None:
    reading = [m for n in range(4) for m in (assistant(calls=[bash("p")]), tool(f"page {n}", Reading.PART))]
    rendered, plan = cut(transcript(user("task"), *reading, *working_turns(8)), max_tokens=260, reserve=40, cap=100)
    # A reading turn has 23 and its result "\n" tag "\npage 0\n" tag 11: 8 + 34 * 2 = 76 fits the cap, 110 does not.
    assert [window.prefix_tokens for window in plan.windows[1:]] == [76] * (len(plan.windows) - 1)
    assert all("page 1" in text(rendered, window) for window in plan.windows)
    assert "page 3" not in text(rendered, plan.windows[-1])


def test_reading_after_the_first_cut_no_longer_enters_the_prefix() -> None:
    late = [assistant(calls=[bash("p")]), tool("late page", Reading.COMPLETE)]
    rendered, plan = cut(
        transcript(user("task"), *working_turns(4), *late, *working_turns(5)), max_tokens=150, reserve=30
    )
    assert {window.prefix_tokens for window in plan.windows} == {8}
    assert "late page" not in text(rendered, plan.windows[-1])


def test_a_user_message_ends_a_window_only_if_it_strips_reasoning() -> None:
    plain = transcript(user("task"), assistant("hi"), user("go on"), assistant("ok"))
    _, plan = cut(plain)
    assert [window.end for window in plan.windows] == [WindowEnd.FINISHED]

    thinking = transcript(user("task"), assistant("hi", reasoning="hm"), user("go on"), assistant("ok"))
    rendered, plan = cut(thinking)
    assert [window.end for window in plan.windows] == [WindowEnd.RERENDERED, WindowEnd.FINISHED]
    assert "<think>hm</think>\nhi<|user|>" in text(rendered, plan.windows[0])
    assert "<think></think>\nhi<|user|>\ngo on" in text(rendered, plan.windows[1])


def test_reasoning_once_stripped_stays_stripped() -> None:
    made = transcript(
        user("task"),
        assistant(reasoning="hm", calls=[bash("p")]),
        tool("page", Reading.COMPLETE),
        assistant("done?"),
        user("go on"),
        *working_turns(9),
    )
    rendered, plan = cut(made, max_tokens=200, reserve=40, keep=60)
    assert "hm" in text(rendered, plan.windows[0])
    assert "go on" not in text(rendered, plan.windows[-1])  # the message that stripped it has left the context
    assert all("hm" not in text(rendered, window) for window in plan.windows[1:])


def test_rerendered_history_obeys_keep() -> None:
    made = transcript(user("task"), *working_turns(3), assistant("so?", reasoning="hm"), user("go on"), assistant("ok"))
    _, plan = cut(made, max_tokens=1000, reserve=30, keep=60)
    assert [window.end for window in plan.windows] == [WindowEnd.RERENDERED, WindowEnd.FINISHED]
    assert plan.windows[1].overlap_tokens <= 60


def test_a_turn_longer_than_the_reserve_cuts_before_itself() -> None:
    made = transcript(user("task"), *working_turns(2), assistant("x" * 80), user("go on"), assistant("ok"))
    rendered, plan = cut(made, max_tokens=150, reserve=30, keep=60)
    # Before it 88 tokens, and itself 1 + 3 + 81 + 1 = 86: it does not fit, though the reserve does.
    assert "x" * 80 not in text(rendered, plan.windows[0])
    assert "x" * 80 in text(rendered, plan.windows[1])
    assert not plan.dropped_tokens


def test_a_turn_longer_than_a_window_is_dropped_with_its_reason() -> None:
    made = transcript(user("task"), *working_turns(1), assistant("x" * 300), user("go on"), *working_turns(1))
    rendered, plan = cut(made, max_tokens=150, reserve=30)
    # "\n" + 300 and the end token.
    assert plan.dropped_tokens == {DropReason.TURN_EXCEEDS_WINDOW: 302}
    assert [text(rendered, window).count("<|assistant|>") for window in plan.windows] == [1, 1]


def test_a_task_longer_than_a_window_drops_the_transcript_with_its_reason() -> None:
    _, plan = cut(transcript(user("t" * 300), *working_turns(1)), max_tokens=150, reserve=30)
    assert plan.windows == ()
    assert plan.dropped_tokens == {DropReason.PREFIX_EXCEEDS_WINDOW: plan.trainable_tokens}
    assert plan.trainable_tokens == 21
    with pytest.raises(ContextError, match="tools and task have 304 tokens"):
        LiveContext(RENDERER, policy(150, reserve=30), (), [user("t" * 300)])


def test_messages_no_policy_produced_are_context() -> None:
    _, plan = cut(transcript(user("task"), assistant("shown", trained=False), user("now you"), assistant("mine")))
    # "\nmine" and its end token
    assert plan.trainable_tokens == 6
    assert sum(window.trained_tokens for window in plan.windows) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reserve": 200}, "reserve_tokens 200 must lie between"),
        ({"cap": 170}, "no turn would fit behind a full prefix"),
        ({"keep": 1.5}, "is a fraction and must lie in"),
        ({"keep": 200}, "must be less than max_tokens 200"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ContextError, match=message):
        policy(200, **changes)  # type: ignore[arg-type]


# -- invariants


@settings(max_examples=300)
@given(transcripts(), policies())
def test_windows_keep_their_promises(made: Transcript, rule: ContextPolicy) -> None:
    rendered = RENDERER.transcript(made)
    plan = split(rendered, rule)
    segments = rendered.segments
    head = sum(len(message.segments) for message in rendered.messages[: rendered.head_stop]) + len(rendered.preamble)
    for window in plan.windows:
        inside = numbers(window)
        assert inside == sorted(set(inside))
        assert window.tokens == sum(len(segments[number]) for number in inside) <= rule.max_tokens
        assert inside[:head] == list(range(head))
        assert window.first_new in inside
        assert segments[window.first_new].kind is SegmentKind.HEADER
        assert segments[inside[-1]].kind is not SegmentKind.OBSERVATION
        assert _results_follow_their_calls(segments, inside)
    new = Counter(n for w in plan.windows for n in numbers(w) if n >= w.first_new and segments[n].trained)
    assert all(count == 1 for count in new.values())
    trained = sum(len(segments[n]) for n in new)
    assert trained == sum(window.trained_tokens for window in plan.windows)
    assert trained + sum(plan.dropped_tokens.values()) == plan.trainable_tokens
    assert plan.trainable_tokens == sum(len(segment) for segment in segments if segment.trained)


_LEFT_OUT = (SegmentKind.REASONING, SegmentKind.SAMPLED_END)  # of history, whatever they follow
_BETWEEN = (SegmentKind.OBSERVATION, SegmentKind.TURN_END, *_LEFT_OUT)


def _results_follow_their_calls(segments: list[Segment], inside: list[int]) -> bool:
    """A tool result stands directly behind another result or behind the end of a turn with its answer in the window."""
    kept = set(inside)
    for number in inside:
        if segments[number].kind is SegmentKind.OBSERVATION:
            before = number - 1
            while segments[before].kind in _BETWEEN:
                if before not in kept and segments[before].kind not in _LEFT_OUT:
                    return False
                before -= 1
            if before not in kept:
                return False
    return True


@settings(max_examples=200)
@given(transcripts(), policies(), st.randoms(use_true_random=False))
def test_live_agent_and_splitter_agree_on_history_halved_for_an_engine(
    made: Transcript, rule: ContextPolicy, chance: Random
) -> None:
    rendered = RENDERER.transcript(made)
    try:
        live = LiveContext(RENDERER, rule, made.tools, made.messages[: rendered.head_stop])
    except ContextError:
        return
    seen = []
    for message in made.messages[rendered.head_stop :]:
        if message.role is not Role.ASSISTANT:
            live.add_message(message)
            continue
        prompt, halved = live.next_prompt(), 0
        while chance.random() < 0.3:
            before = prompt.fingerprint.tokens
            try:
                prompt = live.halve_history()
            except ContextError:
                assert seen == list(prompt_fingerprints(replace(made, messages=tuple(live.messages)), RENDERER, rule))
                return
            halved += 1
            assert prompt.fingerprint.tokens < before
        fingerprint = live.add_turn(replace(message, halved=halved))
        if fingerprint is not None:
            seen.append(fingerprint)
    assert seen == list(prompt_fingerprints(replace(made, messages=tuple(live.messages)), RENDERER, rule))


def test_halving_keeps_the_newest_whole_turns_of_half_the_history() -> None:
    live = LiveContext(RENDERER, policy(400, reserve=30, keep=200), (), [system("s"), user("t")])
    for message in working_turns(4):
        if message.role is Role.ASSISTANT:
            live.next_prompt()
            live.add_turn(message)
        else:
            live.add_message(message)
    assert live.next_prompt().visible == tuple(range(10))
    # Four turns of 40: half of them, then one, then there is nothing to leave out.
    assert live.halve_history().visible == (0, 1, 6, 7, 8, 9)
    assert live.halve_history().visible == (0, 1, 8, 9)
    with pytest.raises(ContextError, match="lower max_tokens, 400, to what it serves"):
        live.halve_history()


@settings(max_examples=200)
@given(transcripts(), policies())
def test_live_agent_and_splitter_see_the_same_tokens(made: Transcript, rule: ContextPolicy) -> None:
    rendered = RENDERER.transcript(made)
    try:
        live = LiveContext(RENDERER, rule, made.tools, made.messages[: rendered.head_stop])
    except ContextError:
        assert split(rendered, rule).windows == ()
        return
    seen = []
    for message in made.messages[rendered.head_stop :]:
        if message.role is Role.ASSISTANT:
            prompt = live.next_prompt()
            assert prompt.fingerprint.tokens + prompt.reply_tokens + 1 == rule.max_tokens
            fingerprint = live.add_turn(message)
            if message.sampled and len(message.sampled.body) <= prompt.reply_tokens:
                assert fingerprint == prompt.fingerprint  # trained in the very prompt it was sampled in
            if fingerprint is not None:
                seen.append(fingerprint)
        else:
            live.add_message(message)
    assert seen == list(prompt_fingerprints(made, RENDERER, rule))


@settings(max_examples=200)
@given(transcripts(), policies())
def test_sampled_tokens_stand_behind_their_prompt_unchanged(made: Transcript, rule: ContextPolicy) -> None:
    rendered = RENDERER.transcript(made)
    plan = split(rendered, rule)
    bodies = iter([message.sampled for message in made.messages if message.role is Role.ASSISTANT])
    if plan.dropped_tokens:
        return
    for window in plan.windows:
        ids: list[int] = []
        masks: list[bool] = []
        headers = []
        for number in numbers(window):
            segment = rendered.segments[number]
            ids += segment.ids
            masks += [segment.trained] * len(segment)
            if segment.kind is SegmentKind.HEADER and number >= window.first_new:
                headers.append(len(ids))
        for start in headers:
            reply = next(bodies)
            if reply is None:
                continue
            expected = [*reply.body, *([] if reply.end is None else [reply.end])]
            assert ids[start : start + len(expected)] == expected
            assert all(masks[start : start + len(expected)])
            if reply.end is None and start + len(expected) < len(ids):
                assert not masks[start + len(expected)]  # the template's token: nobody sampled it
    assert next(bodies, None) is None


def test_a_turn_ended_for_another_role_ends_its_window_there() -> None:
    replies = [Message(role=Role.ASSISTANT, sampled=sampled(f"go{n}", end)) for n, end in enumerate(ENDS)]
    messages = [user("task"), *(m for reply in replies for m in (reply, tool("r")))]
    rendered, plan = cut(transcript(*messages), max_tokens=300, keep=200)
    assert [window.end for window in plan.windows] == [WindowEnd.DIVERTED, WindowEnd.FINISHED]
    first, second = (text(rendered, window) for window in plan.windows)
    assert first.endswith(
        "<|assistant|>go0<|observation|>\n<tool_response>\nr\n</tool_response><|assistant|>go1<|user|>"
    )
    assert "go1<|observation|>\n<tool_response>" in second  # history shows what the scaffold made of it
    assert second.endswith("go2<|observation|>")
    # go0 and its end, go1 and its end; go2, whose length was cut: its end is the template's
    assert [window.trained_tokens for window in plan.windows] == [4 + 4, 3]


def test_sampled_ids_of_another_tokenizer_are_not_used() -> None:
    reply = Message(role=Role.ASSISTANT, content="hi", sampled=Sampled(body=(5, 6), end=7))
    ours = transcript(user("task"), reply)
    others = replace(ours, tokenizer_sha256="others")
    assert [5, 6] in [segment.ids for segment in RENDERER.transcript(ours).segments]
    from_text = transcript(user("task"), assistant("hi"))
    assert RENDERER.transcript(others).segments == RENDERER.transcript(from_text).segments


def test_a_live_prompt_names_the_messages_in_context() -> None:
    live = LiveContext(RENDERER, policy(150, reserve=30, keep=60), (), [system("s"), user("t")])
    for message in working_turns(4):
        if message.role is Role.ASSISTANT:
            live.next_prompt()
            live.add_turn(message)
        else:
            live.add_message(message)
    # Head 8, a turn 40. Cut before the fourth turn, keep 60: system, user, the third turn (6, 7), the fourth (8, 9).
    assert live.next_prompt().visible == (0, 1, 6, 7, 8, 9)
    assert live.windows == 2
