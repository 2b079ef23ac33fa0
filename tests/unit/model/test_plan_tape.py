"""Blocks of memory are counted as they are taken and freed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.model.planner.tape import Profile, Tape, profile


def test_the_peak_is_the_most_held_at_once_by_part() -> None:
    tape = Tape()
    tape.take("activations", a=10, b=20)
    tape.take("logits", c=5)
    tape.free("b")
    tape.take("experts", d=12)
    assert tape.held == {"activations": 10, "logits": 5, "experts": 12}
    assert tape.peak_since_last_asked() == {"activations": 30, "logits": 5}
    tape.free("a", "c", "d")
    assert tape.peak_since_last_asked() == {"activations": 10, "logits": 5, "experts": 12}


def test_without_recording_a_block_is_gone_after_its_last_use() -> None:
    for recording, held in ((True, {"activations": 3}), (False, {})):
        tape = Tape(recording=recording)
        tape.take("activations", a=1, b=2)
        tape.last_use("a", "b", "never taken")
        assert tape.held == held


def test_a_block_cannot_be_taken_twice_nor_freed_unheld() -> None:
    tape = Tape()
    tape.take("activations", a=1)
    with pytest.raises(ValueError, match="a is held already"):
        tape.take("activations", a=1)
    with pytest.raises(KeyError):
        tape.free("b")


def test_a_program_that_forgets_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks \['kept'\] are never freed"):
        profile(lambda tape: tape.take("activations", kept=1), lambda tape: None)


def test_a_profile_has_what_is_kept_and_both_peaks() -> None:
    def forward(tape: Tape) -> None:
        tape.take("activations", kept=4)
        tape.pass_by("activations", 6)

    def backward(tape: Tape) -> None:
        tape.take("experts", gradient=3)
        tape.free("kept", "gradient")

    assert profile(forward, backward) == Profile(
        kept={"activations": 4}, forward_peak={"activations": 10}, backward_peak={"activations": 4, "experts": 3}
    )


@given(sizes=st.lists(st.integers(0, 1000), max_size=30), freed=st.lists(st.booleans(), max_size=30))
def test_a_peak_is_never_below_what_is_held(sizes: list[int], freed: list[bool]) -> None:
    tape, held = Tape(), {}
    for number, size in enumerate(sizes):
        tape.take("activations", **{str(number): size})
        held[str(number)] = size
        if number < len(freed) and freed[number]:
            tape.free(str(number))
            del held[str(number)]
    assert sum(tape.held.values()) == sum(held.values())
    assert sum(held.values()) <= sum(tape.peak_since_last_asked().values()) <= sum(sizes)
