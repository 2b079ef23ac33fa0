"""Synthetic transcripts of four to eight windows in which every answer stands at one known place of the context.

    user       read the paper, then answer
    assistant  read                                     (two pages: the reading that a prefix pins)
    tool       set lamp 12 / set kite 33 / ...
    assistant  read
    tool       set drum 25 / ...
    assistant  next
    tool       log oak 17                               a fact that is needed a few turns later
    assistant  next
    tool       log elm 30 / ask kite oak                a setting of the paper, and something logged before
    assistant  say kite 33 oak 17, next
    ...

The work goes through phases, as a long task does: what is asked in a phase belongs to that phase alone, in the paper
and in the logs, so the words of a late phase are met in late turns only. Demonstrations are short, and have words of
their own: a paper, and all of it asked for twice.

Always (tests/unit/examples/test_ablation_transcripts.py): a setting of the paper is asked for exactly once, a logged
fact at most once, one to three results after the one that logged it; the same seed gives the same transcripts.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from examples.longhaul.experiment import LOWEST_NUMBER
from examples.longhaul.names import DATASETS, METHODS
from megatron_klong.trajectory.schema import Message, Reading, Role, ToolCall, Transcript

PHASES = range(1, 5)  # of a long transcript
DEMONSTRATED = 0  # whose words demonstrations use
WORDS_PER_PHASE = 10
SETTINGS_PER_PHASE = (6, 8)  # of the words of a phase, those that the paper of a task has; each is asked for in a turn
FACTS_DEMONSTRATED = (4, 8)
PAGES = 2
FIRST_LOGS = 2  # results that log and do not ask, so that there is something to ask for
NUM_VALUES = 32  # many more than a demonstration holds: to say any value it holds is then a first step
VALUES = tuple(str(number) for number in range(LOWEST_NUMBER, LOWEST_NUMBER + NUM_VALUES))

TASK = "read the paper, then answer"

type Fact = tuple[str, str]  # a word and its value


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One turn's reply and the result that follows it: a fact that is logged, and those that are asked for next."""

    said: Sequence[Fact]
    logged: Fact | None
    asked: Sequence[Fact]


def settings_of(phase: int) -> tuple[str, ...]:
    """The words whose values only the paper tells."""
    return METHODS[phase * WORDS_PER_PHASE : (phase + 1) * WORDS_PER_PHASE]


def logs_of(phase: int) -> tuple[str, ...]:
    """The words whose values only a log tells."""
    return DATASETS[phase * WORDS_PER_PHASE : (phase + 1) * WORDS_PER_PHASE]


def transcripts(count: int, *, seed: str) -> Iterator[Transcript]:
    """Long ones that no other seed gives."""
    for number in range(count):
        yield transcript(f"{seed}/{number}")


def demonstrations(count: int, *, seed: str) -> Iterator[Transcript]:
    """Short ones that no other seed gives; each fits into a window."""
    for number in range(count):
        yield demonstration(f"{seed}/{number}")


def transcript(seed: str) -> Transcript:
    """One long task, answered without a fault."""
    chosen = random.Random(seed)
    paper = {phase: _facts(chosen, settings_of(phase), chosen.randint(*SETTINGS_PER_PHASE)) for phase in PHASES}
    messages = [
        Message(role=Role.USER, content=TASK),
        *_reading(chosen, [fact for part in paper.values() for fact in part]),
    ]
    steps = list(_steps(chosen, paper))
    for step in steps:
        messages += _turn(step)
    messages.append(Message(role=Role.ASSISTANT, content=_saying(steps[-1].asked)))
    return _made(seed, messages)


def demonstration(seed: str) -> Transcript:
    """A short paper, all of which is asked for, twice and each time in another order."""
    chosen = random.Random(seed)
    facts = _facts(chosen, settings_of(DEMONSTRATED) + logs_of(DEMONSTRATED), chosen.randint(*FACTS_DEMONSTRATED))
    messages = [Message(role=Role.USER, content=TASK), *_reading(chosen, facts)]
    said: list[Fact] = []
    for _ in range(2):
        asked = chosen.sample(facts, len(facts))
        messages += _turn(Step(said=said, logged=None, asked=asked))
        said = asked
    messages.append(Message(role=Role.ASSISTANT, content=_saying(said)))
    return _made(seed, messages)


def _made(seed: str, messages: list[Message]) -> Transcript:
    return Transcript(id=seed, task=seed, source="examples.longhaul.ablation", tools=(), messages=tuple(messages))


def texts(count: int, *, seed: str) -> Iterator[str]:
    """What a tokenizer is trained on, as it stands between control tokens; the words occur behind a space."""
    everything = [word for phase in (DEMONSTRATED, *PHASES) for word in (*settings_of(phase), *logs_of(phase))]
    for made in transcripts(count, seed=seed):
        for message in made.messages:
            yield f"\n{message.content}\n"
            yield from (f"{call.name}\n" for call in message.tool_calls)
        yield "".join(f" {word}" for word in (*everything, *VALUES))


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
        yield Message(role=Role.TOOL, content="\n".join(f"set {_spelled([fact])}" for fact in page), reading=reading)


def _steps(chosen: random.Random, paper: Mapping[int, list[Fact]]) -> Iterator[Step]:
    """Two steps that only log, then one for each setting of the paper."""
    logged: list[Fact] = []
    for phase, settings in paper.items():
        logged += _facts(chosen, logs_of(phase), len(settings) + (0 if logged else FIRST_LOGS))
    settings = [fact for part in paper.values() for fact in part]
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
    lines = [f"log {_spelled([step.logged])}"] if step.logged else []
    lines += [f"ask {' '.join(word for word, _ in step.asked)}"] if step.asked else []
    yield Message(role=Role.TOOL, content="\n".join(lines))


def _saying(facts: Sequence[Fact]) -> str:
    return f"say {_spelled(facts)}" if facts else ""


def _spelled(facts: Sequence[Fact]) -> str:
    return " ".join(f"{word} {value}" for word, value in facts)
