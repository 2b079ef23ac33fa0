"""Synthetic transcripts of four to eight windows in which every answer stands at one known place of the context.

    user       read the paper, then answer
    assistant  read                                     (two pages: the reading that a prefix pins)
    tool       set lamp3 / set kite1 / ...
    assistant  read
    tool       set drum2 / ...
    assistant  next
    tool       log oak2                                 a fact that is needed one to three turns later
    assistant  next
    tool       log elm1 / ask kite                      what to say next: a setting of the paper,
    assistant  say kite kite1, next
    tool       log fern3 / ask oak                      or something that was logged before
    assistant  say oak oak2, next
    ...

A fact is one token: a word and which of three it is. Without the fact one knows the word and guesses among the three.
The work goes through phases, as a long task does: what is asked in a phase belongs to that phase alone, in the paper
and in the logs, so the words of a late phase are asked for in late turns only.

Always (tests/unit/examples/test_ablation_transcripts.py): a setting of the paper is asked for exactly once, a logged
fact at most once, by one of the three results behind the one that logged it; the same seed gives the same transcripts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from examples.longhaul.names import DATASETS, METHODS
from megatron_klong.trajectory.schema import Message, Reading, Role, ToolCall, Transcript

PHASES = 4
SETTINGS_PER_PHASE = 3  # words of which only the paper tells; each is asked for in a turn
LOGS_PER_PHASE = 10  # words of which only a log tells; every result logs one
TURNS_PER_PHASE = (7, 8)
LONGEST_DELAY_TURNS = 3  # between the result that logs a fact and the one that asks for it
KINDS = ("1", "2", "3")  # what a fact may say of its word
PAGES = 2
TASK = "read the paper, then answer"
ISOLATED = " [a-z]+[0-9]*(?![a-z0-9])"  # each word and each fact becomes one token

type Fact = tuple[str, str]  # ("kite", "1"), written kite1


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One turn's reply and the result that follows it: a fact that is logged, and the one that is asked for next."""

    said: Fact | None
    logged: Fact
    asked: Fact | None


def settings_of(phase: int) -> tuple[str, ...]:
    """The words of which only the paper tells."""
    return METHODS[phase * SETTINGS_PER_PHASE : (phase + 1) * SETTINGS_PER_PHASE]


def logs_of(phase: int) -> tuple[str, ...]:
    """The words of which only a log tells."""
    return DATASETS[phase * LOGS_PER_PHASE : (phase + 1) * LOGS_PER_PHASE]


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
    paper = [_facts(chosen, settings_of(phase), SETTINGS_PER_PHASE) for phase in range(PHASES)]
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
    said: Fact | None = None
    recent: list[list[Fact]] = []  # what the last results logged and none has asked for
    for phase, settings in enumerate(paper):
        turns = chosen.randint(*TURNS_PER_PHASE)
        # the very first result has no log to ask for
        from_paper = dict(zip(chosen.sample(range(0 if phase else 1, turns), len(settings)), settings, strict=True))
        for turn, logged in enumerate(_facts(chosen, logs_of(phase), turns)):
            waiting = [part for part in recent if part]
            asked = from_paper.get(turn) or (chosen.choice(waiting).pop() if waiting else None)
            yield Step(said=said, logged=logged, asked=asked)
            recent = [*recent, [logged]][-LONGEST_DELAY_TURNS:]
            said = asked


def _turn(step: Step) -> Iterator[Message]:
    yield Message(role=Role.ASSISTANT, content=_saying(step.said), tool_calls=(ToolCall(name="next", arguments={}),))
    asked = f"\nask {step.asked[0]}" if step.asked else ""
    yield Message(role=Role.TOOL, content=f"log {''.join(step.logged)}{asked}")


def _saying(fact: Fact | None) -> str:
    return f"say {fact[0]} {''.join(fact)}" if fact else ""
