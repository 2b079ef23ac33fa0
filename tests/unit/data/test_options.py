"""The windows one asks for on the command line, and a prefix given as a number of messages."""

import argparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.data.options import add_policy_options, policy_from_options
from megatron_klong.trajectory.context import ContextError, ContextPolicy
from megatron_klong.trajectory.episode import PolicyRecord
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.live import LiveContext
from megatron_klong.trajectory.replay import prompt_fingerprints
from megatron_klong.trajectory.schema import Role, Transcript
from megatron_klong.trajectory.windows import split
from tests.unit.trajectory.builders import (
    assistant,
    bash,
    byte_tokenizer,
    policy,
    tool,
    transcript,
    transcripts,
    user,
)

RENDERER = GlmRenderer(byte_tokenizer())


def parse(*arguments: str) -> ContextPolicy:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_policy_options(parser)
    return policy_from_options(parser.parse_args(arguments))


def test_defaults_follow_from_the_window_length() -> None:
    made = parse("--max-tokens", "4096", "--overlap-tokens", "512")
    assert (made.reserve_tokens, made.prefix_cap_tokens, made.keep, made.pin) == (512, 2048, 512, "reading")


@pytest.mark.parametrize(("given", "keep"), [("0.7", 0.7), ("300", 300), ("0", 0), ("0.0", 0.0)])
@pytest.mark.parametrize("option", ["--keep", "--overlap-tokens"])
def test_history_is_kept_as_tokens_or_as_a_fraction(option: str, given: str, keep: float) -> None:
    made = parse(option, given)
    assert made.keep == keep
    assert isinstance(made.keep, type(keep))


@pytest.mark.parametrize(("given", "pin"), [("task", "task"), ("reading", "reading"), ("3", 3)])
def test_the_prefix_is_named_or_counted(given: str, pin: object) -> None:
    made = parse("--pin", given)
    assert made.pin == pin
    assert PolicyRecord.of(made).policy() == made


@pytest.mark.parametrize("given", ["--pin=none", "--keep=half", "--keep=1.2.3"])
def test_what_is_neither_is_refused(given: str) -> None:
    with pytest.raises(argparse.ArgumentError):
        parse(given)


def test_a_prefix_of_no_messages_is_refused() -> None:
    with pytest.raises(ContextError, match="pin 0 is a number of messages and must be at least 1"):
        parse("--pin", "0")


def work(turns: int) -> list:  # type: ignore[type-arg]
    return [m for n in range(turns) for m in (assistant(calls=[bash(f"c{n}")]), tool(f"result {n}"))]


@pytest.mark.parametrize(
    ("pin", "turns"),
    [
        (1, 0),  # the task is the first message
        (2, 1),  # the second message is a call: its turn is pinned with the result
        (3, 1),
        (4, 2),
        (1000, 6),  # all there is, until the cap of 250 is reached: 8 + 6 * 37
    ],
)
def test_the_first_messages_are_pinned_in_whole_turns(pin: int, turns: int) -> None:
    made = transcript(user("task"), *work(20))
    rendered = RENDERER.transcript(made)
    rule = policy(600, reserve=60, keep=100, pin=pin, cap=250)  # type: ignore[arg-type]
    last = split(rendered, rule).windows[-1]
    pinned = rendered.head_tokens + sum(
        len(segment) for message in rendered.messages[1 : 1 + 2 * turns] for segment in message.segments
    )
    assert last.prefix_tokens == pinned


@settings(max_examples=150)
@given(
    made=transcripts(),
    pin=st.integers(1, 12),
    max_tokens=st.integers(80, 900),
    keep=st.integers(0, 70) | st.floats(0, 0.9),
)
def test_live_agent_and_splitter_agree_on_a_counted_prefix(
    made: Transcript, pin: int, max_tokens: int, keep: float
) -> None:
    rule = policy(max_tokens, reserve=max_tokens // 8, keep=keep, pin=pin)  # type: ignore[arg-type]
    rendered = RENDERER.transcript(made)
    try:
        live = LiveContext(RENDERER, rule, made.tools, made.messages[: rendered.head_stop])
    except ContextError:
        assert split(rendered, rule).windows == ()
        return
    seen = []
    for message in made.messages[rendered.head_stop :]:
        if message.role is Role.ASSISTANT:
            live.next_prompt()
            seen.append(live.add_turn(message))
        else:
            live.add_message(message)
    assert [one for one in seen if one is not None] == list(prompt_fingerprints(made, RENDERER, rule))
    for window in split(rendered, rule).windows:
        assert window.tokens <= rule.max_tokens
        assert window.prefix_tokens <= max(rule.prefix_cap_tokens, rendered.head_tokens)
