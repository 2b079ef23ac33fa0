"""Synthetic transcripts of four to eight windows in which every answer stands at one known place of the context.

    user       read the paper, then answer
    assistant  read                                     (two pages: the reading that a prefix pins)
    tool       set 12 lamp / set 33 kite / ...
    assistant  read
    tool       set 25 drum / ...
    assistant  next
    tool       log 17 oak                               a fact that is needed a few turns later
    assistant  next
    tool       log 30 elm / ask kite oak                a setting of the paper, and something logged before
    assistant  say kite 33 oak 17, next
    ...

The work goes through phases, as a long task does: what is asked in a phase belongs to that phase alone, in the paper
and in the logs, so the words of a late phase are asked for in late turns only.

Always (tests/unit/examples/test_ablation_transcripts.py): a setting of the paper is asked for exactly once, a logged
fact at most once, one to three results after the one that logged it; the same seed gives the same transcripts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from examples.longhaul.experiment import LOWEST_NUMBER
from examples.longhaul.names import DATASETS, METHODS
from megatron_klong.trajectory.schema import Message, Reading, Role, ToolCall, Transcript

PHASES = 4
WORDS_PER_PHASE = 8
SETTINGS_PER_PHASE = (6, 8)  # of the words of a phase, those that the paper of a task has; each is asked for in a turn
NUM_VALUES = 32  # many more than a window holds facts of a phase, so that saying one of those is a first step
VALUES = tuple(str(number) for number in range(LOWEST_NUMBER, LOWEST_NUMBER + NUM_VALUES))
PAGES = 2
FIRST_LOGS = 2  # results that log and do not ask, so that there is something to ask for
TASK = "read the paper, then answer"

type Fact = tuple[str, str]  # a word and its value, told as "12 lamp" and said as "lamp 12"


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
    words = [word for phase in range(PHASES) for word in (*settings_of(phase), *logs_of(phase))]
    for made in transcripts(count, seed=seed):
        for message in made.messages:
            yield f"\n{message.content}\n"
            yield from (f"{call.name}\n" for call in message.tool_calls)
        yield "".join(f" {word}" for word in (*words, *VALUES))


def _facts(chosen: random.Random, words: Sequence[str], count: int) -> list[Fact]:
    return [(word, chosen.choice(VALUES)) for word in chosen.sample(words, count)]


def _reading(chosen: random.Random, facts: list[Fact]) -> Iterator[Message]:
    """The paper in pages, its settings in no order."""
    shuffled = chosen.sample(facts, len(facts))
    size = -(-len(shuffled) // PAGES)
    pages = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    for number, page in enumerate(pages, 1):
        yield Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name="read", arguments={}),))
        reading = Reading.COMPLETE if number == len(pages) else Reading.PART
        shown = "\n".join(f"set {value} {word}" for word, value in page)
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
    word, value = step.logged
    yield Message(role=Role.TOOL, content=f"log {value} {word}{asked}")


def _saying(facts: Sequence[Fact]) -> str:
    return "".join(["say", *(f" {word} {value}" for word, value in facts)]) if facts else ""
