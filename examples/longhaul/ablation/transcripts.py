"""Synthetic transcripts of four to eight windows in which every answer stands at one known place of the context.

    user       read the paper, then answer
    assistant  read                                     (two pages: the reading that a prefix pins)
    tool       set lamp3 / set kite1 / ...
    assistant  read
    tool       set drum2 / ...
    assistant  next
    tool       log oak4                                 a fact that is needed a few turns later
    assistant  next
    tool       log elm1 / ask kite oak                  a setting of the paper, and something logged before
    assistant  say kite kite1 oak oak4, next
    ...

A fact is one token: a word and which of four it is. Without the fact one knows the word and guesses among the four.
The work goes through phases, as a long task does: what is asked in a phase belongs to that phase alone, in the paper
and in the logs, so the words of a late phase are asked for in late turns only.

Always (tests/unit/examples/test_ablation_transcripts.py): a setting of the paper is asked for exactly once, a logged
fact at most once, one to three results after the one that logged it; the same seed gives the same transcripts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from examples.longhaul.names import DATASETS, METHODS
from megatron_klong.trajectory.schema import Message, Reading, Role, ToolCall, Transcript

PHASES = 4
WORDS_PER_PHASE = 8
SETTINGS_PER_PHASE = (6, 8)  # of the words of a phase, those that the paper of a task has; each is asked for in a turn
KINDS = ("1", "2", "3", "4")  # what a fact may say of its word
PAGES = 2
FIRST_LOGS = 2  # results that log and do not ask, so that there is something to ask for
TASK = "read the paper, then answer"
ISOLATED = " [a-z]+[0-9]*(?![a-z0-9])"  # each word and each fact becomes one token

type Fact = tuple[str, str]  # ("kite", "1"), written kite1


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One turn's reply and the result that follows it: a fact that is logged, and those that are asked for next."""

    said: Sequence[Fact]
    logged: Fact
    asked: Sequence[Fact]


def settings_of(phase: int) -> tuple[str, ...]:
    """The words of which only the paper tells."""
    return METHODS[phase * WORDS_PER_PHASE : (phase + 1) * WORDS_PER_PHASE]


def logs_of(phase: int) -> tuple[str, ...]:
    """The words of which only a log tells: those of the first phase are a few more, for its first logs."""
    start = phase * WORDS_PER_PHASE + (FIRST_LOGS if phase else 0)
    return DATASETS[start : (phase + 1) * WORDS_PER_PHASE + FIRST_LOGS]


def all_facts() -> list[Fact]:
    """Every fact that may be told."""
    words = [word for phase in range(PHASES) for word in (*settings_of(phase), *logs_of(phase))]
    return [(word, kind) for word in words for kind in KINDS]


def transcripts(count: int, *, seed: str) -> Iterator[Transcript]:
    """Transcripts that no other seed gives."""
    for number in range(count):
        yield transcript(f"{seed}/{number}")


def transcript(seed: str) -> Transcript:
    """One task, answered without a fault."""
    chosen = random.Random(seed)
    paper = [_facts(chosen, settings_of(phase), chosen.randint(*SETTINGS_PER_PHASE)) for phase in range(PHASES)]
    messages = [Message(role=Role.USER, content=TASK), *_reading(chosen, [fact for part in paper for fact in part])]
    steps = list(_steps(chosen, paper))
    for step in steps:
        messages += _turn(step)
    messages.append(Message(role=Role.ASSISTANT, content=_saying(steps[-1].asked)))
    return Transcript(id=seed, task=seed, source="examples.longhaul.ablation", tools=(), messages=tuple(messages))


def texts(count: int, *, seed: str) -> Iterator[str]:
    """What a tokenizer is trained on, as it stands between control tokens."""
    for made in transcripts(count, seed=seed):
        for message in made.messages:
            yield f"\n{message.content}\n"
            yield from (f"{call.name}\n" for call in message.tool_calls)
        yield "".join(f" {word} {word}{kind}" for word, kind in all_facts())


def _facts(chosen: random.Random, words: Sequence[str], count: int) -> list[Fact]:
    return [(word, chosen.choice(KINDS)) for word in chosen.sample(words, count)]


def _reading(chosen: random.Random, facts: list[Fact]) -> Iterator[Message]:
    """The paper in pages, its settings in no order."""
    shuffled = chosen.sample(facts, len(facts))
    size = -(-len(shuffled) // PAGES)
    pages = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    for number, page in enumerate(pages, 1):
        yield Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="read", arguments={}),))
        reading = Reading.COMPLETE if number == len(pages) else Reading.PART
        shown = "\n".join(f"set {word}{kind}" for word, kind in page)
        yield Message(role=Role.TOOL, content=shown, reading=reading)


def _steps(chosen: random.Random, paper: Sequence[list[Fact]]) -> Iterator[Step]:
    """Two steps that only log, then one for each setting of the paper."""
    logged: list[Fact] = []
    for phase, settings in enumerate(paper):
        logged += _facts(chosen, logs_of(phase), len(settings) + (0 if phase else FIRST_LOGS))
    settings = [fact for part in paper for fact in part]
    noted = _neighbours_swapped(chosen, logged[: len(settings)])
    asked = [*([()] * FIRST_LOGS), *zip(settings, noted, strict=True)]
    for said, fact, next_asked in zip([(), *asked], logged, asked, strict=False):
        yield Step(said=said, logged=fact, asked=next_asked)


def _neighbours_swapped(chosen: random.Random, facts: list[Fact]) -> list[Fact]:
    """Pair by pair, by chance: so what was logged two results ago is asked for, or one more or less."""
    swapped = []
    for start in range(0, len(facts), 2):
        pair = facts[start : start + 2]
        swapped += chosen.sample(pair, len(pair))
    return swapped


def _turn(step: Step) -> Iterator[Message]:
    yield Message(role=Role.ASSISTANT, content=_saying(step.said), tool_calls=(ToolCall(name="next", arguments={}),))
    asked = f"\nask {' '.join(word for word, _ in step.asked)}" if step.asked else ""
    yield Message(role=Role.TOOL, content=f"log {''.join(step.logged)}{asked}")


def _saying(facts: Sequence[Fact]) -> str:
    return "".join(["say", *(f" {word} {word}{kind}" for word, kind in facts)]) if facts else ""
