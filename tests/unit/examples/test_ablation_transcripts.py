"""The ablation's transcripts: every answer was told at one place, and a late phase has words of its own."""

import pytest

from examples.longhaul.ablation.transcripts import PHASES, all_facts, logs_of, settings_of, transcript, transcripts
from megatron_klong.trajectory.schema import Reading, Role, Transcript

SEEDS = ("a", "b", "c")


def lines(made: Transcript, start: str) -> list[tuple[int, list[str]]]:
    """(number of the message, words behind the first) of every line that begins so."""
    found = [(n, line.split()) for n, message in enumerate(made.messages) for line in message.content.splitlines()]
    return [(number, words[1:]) for number, words in found if words and words[0] == start]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_answer_is_the_one_fact_that_was_told_of_its_word(seed: str) -> None:
    made = transcript(seed)
    told = [fact for start in ("set", "log") for _, (fact,) in lines(made, start)]
    assert set(told) <= {word + kind for word, kind in all_facts()}
    assert len({fact[:-1] for fact in told}) == len(told)
    said = [pair for _, words in lines(made, "say") for pair in zip(words[::2], words[1::2], strict=True)]
    assert all(fact in told and fact[:-1] == word for word, fact in said)
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_asked_for_is_said_in_the_next_turn_and_of_the_paper_all_is_asked_for(seed: str) -> None:
    made = transcript(seed)
    asked = [(number + 1, words) for number, words in lines(made, "ask")]
    assert asked == [(number, words[::2]) for number, words in lines(made, "say")]
    assert {word for phase in range(PHASES) for word in settings_of(phase)} <= {word for _, (word,) in asked}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_logged_fact_is_asked_for_by_one_of_the_next_three_results(seed: str) -> None:
    made = transcript(seed)
    logged = {fact[:-1]: number for number, (fact,) in lines(made, "log")}
    asked = [(number, word) for number, (word,) in lines(made, "ask") if word in logged]
    assert {(number - logged[word]) // 2 for number, word in asked} == {1, 2, 3}


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_phase_asks_of_the_paper_belongs_to_it(seed: str) -> None:
    made = transcript(seed)
    phase_of = {word: phase for phase in range(PHASES) for word in settings_of(phase)}
    phases = [phase_of[word] for _, (word,) in lines(made, "ask") if word in phase_of]
    assert phases == sorted(phases)
    assert set(phases) == set(range(PHASES))


def test_no_two_phases_share_a_word() -> None:
    words = [word for phase in range(PHASES) for word in (*settings_of(phase), *logs_of(phase))]
    assert len(set(words)) == len(words)


def test_the_reading_ends_with_the_last_page() -> None:
    shown = [message.reading for message in transcript("a").messages if message.role is Role.TOOL]
    assert shown[:2] == [Reading.PART, Reading.COMPLETE]
    assert set(shown[2:]) == {Reading.NONE}


def test_the_same_seed_gives_the_same_transcripts_and_another_one_others() -> None:
    first, again, other = (list(transcripts(3, seed=seed)) for seed in ("x", "x", "y"))
    assert first == again
    assert not [made for made in other if made.messages in [seen.messages for seen in first]]
