"""The ablation's transcripts: every answer stands at one known place, and a late phase has words of its own."""

import pytest

from examples.longhaul.ablation.transcripts import (
    DEMONSTRATED,
    PHASES,
    VALUES,
    demonstration,
    logs_of,
    settings_of,
    transcript,
    transcripts,
)
from megatron_klong.trajectory.schema import Reading, Role, Transcript

SEEDS = ("a", "b", "c")


def lines(made: Transcript, start: str) -> list[tuple[int, list[str]]]:
    """(number of the message, words behind the first) of every line that begins so."""
    found = [(n, line.split()) for n, message in enumerate(made.messages) for line in message.content.splitlines()]
    return [(number, words[1:]) for number, words in found if words and words[0] == start]


def said(made: Transcript) -> list[tuple[str, str]]:
    """The facts of all replies."""
    return [fact for _, words in lines(made, "say") for fact in zip(words[::2], words[1::2], strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_answer_is_the_one_fact_that_was_told_of_its_word(seed: str) -> None:
    made = transcript(seed)
    told = [tuple(words) for start in ("set", "log") for _, words in lines(made, start)]
    assert len({word for word, _ in told}) == len(told)
    assert set(said(made)) <= set(told)
    assert len({word for word, _ in said(made)}) == len(said(made))
    assert {value for _, value in told} <= set(VALUES)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_asked_for_is_said_in_the_next_turn_and_of_the_paper_all_is_asked_for(seed: str) -> None:
    made = transcript(seed)
    asked = [(number + 1, words) for number, words in lines(made, "ask")]
    assert asked == [(number, words[::2]) for number, words in lines(made, "say")]
    assert {words[0] for _, words in asked} == {word for _, (word, _) in lines(made, "set")}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_logged_fact_is_asked_for_by_one_of_the_next_three_results(seed: str) -> None:
    made = transcript(seed)
    logged = {word: number for number, (word, _) in lines(made, "log")}
    assert {(number - logged[words[1]]) // 2 for number, words in lines(made, "ask")} == {1, 2, 3}


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_phase_asks_of_the_paper_belongs_to_it(seed: str) -> None:
    made = transcript(seed)
    phase_of = {word: phase for phase in PHASES for word in settings_of(phase)}
    phases = [phase_of[words[0]] for _, words in lines(made, "ask")]
    assert phases == sorted(phases)
    assert set(phases) == set(PHASES)


def test_no_two_phases_share_a_word() -> None:
    words = [word for phase in (DEMONSTRATED, *PHASES) for word in (*settings_of(phase), *logs_of(phase))]
    assert len(set(words)) == len(words)


def test_the_reading_ends_with_the_last_page() -> None:
    shown = [message.reading for message in transcript("a").messages if message.role is Role.TOOL]
    assert shown[:2] == [Reading.PART, Reading.COMPLETE]
    assert set(shown[2:]) == {Reading.NONE}


def test_the_same_seed_gives_the_same_transcripts_and_another_one_others() -> None:
    first, again, other = (list(transcripts(3, seed=seed)) for seed in ("x", "x", "y"))
    assert first == again
    assert not [made for made in other if made.messages in [seen.messages for seen in first]]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_demonstration_asks_twice_for_all_that_its_paper_has(seed: str) -> None:
    made = demonstration(seed)
    told = sorted(tuple(words) for _, words in lines(made, "set"))
    answered = said(made)
    assert [sorted(answered[: len(told)]), sorted(answered[len(told) :])] == [told, told]
    own = {*settings_of(DEMONSTRATED), *logs_of(DEMONSTRATED)}
    assert {word for word, _ in told} <= own
    assert {number + 1: words for number, words in lines(made, "ask")} == {
        number: words[::2] for number, words in lines(made, "say")
    }
