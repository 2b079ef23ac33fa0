"""A reply as it grows -> what of it can be shown already: its text, or reasoning, content and at the end its calls.

Always (tests/unit/serve/test_turn_stream.py): however the ids come in, what was shown put together is what the whole
reply says up to the first stop string, for a turn as `parse` reads it; nothing is ever taken back. So white space waits
for what follows it, a character for its last bytes, and content for the end of the reasoning: without a </think> it may
still turn out to be reasoning itself. Calls are shown when the reply has ended: until then a call may still turn out to
be one that cannot be read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from megatron_klong.serve.parsing import ParsedTurn, Schemas, parse
from megatron_klong.serve.stop_strings import certain, cut
from megatron_klong.trajectory.sampled import decode, reasoning_range
from megatron_klong.trajectory.tokenizer import Tokenizer

type Part = tuple[Literal["reasoning", "content"], str]


class _Growing:
    """Ids so far. Reading all of them again for each new one would take longer than sampling them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._read = 0

    def take(self, ids: Sequence[int]) -> bool:
        """Take up new ids; whether it is time to read all of them."""
        self.ids += ids
        due = len(self.ids) - self._read > len(self.ids) // 128
        if due:
            self._read = len(self.ids)
        return due


class TextStream:
    """One reply as it is, control tokens spelled out. stop: strings at which it ends."""

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._growing = _Growing()
        self._shown = 0

    def feed(self, ids: Sequence[int]) -> str:
        """What new ids, without the token that ends the reply, add to what can be shown."""
        if not self._growing.take(ids):
            return ""
        text = decode(self._tokenizer, self._growing.ids)
        return self._new(text[: certain(text, self._stop)])

    def finish(self, body: Sequence[int]) -> str:
        """What is still to be shown; `body`: the whole reply without the token that ended it."""
        return self._new(cut(decode(self._tokenizer, body), self._stop))

    def _new(self, text: str) -> str:
        shown, self._shown = self._shown, len(text)
        return text[shown:]


class TurnStream:
    """One reply as a turn. stop: strings at which its text ends."""

    def __init__(self, tokenizer: Tokenizer, *, schemas: Schemas | None = None, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._schemas = schemas or {}
        self._stop = tuple(stop)
        self._growing = _Growing()
        self._shown = {"reasoning": 0, "content": 0}

    def feed(self, ids: Sequence[int]) -> Iterator[Part]:
        """What new ids, without the token that ends the reply, add to what can be shown."""
        if self._growing.take(ids):
            text = decode(self._tokenizer, self._growing.ids)
            turn, reasoning_over = self._read(self._growing.ids, certain(text, self._stop))
            yield from self._new("reasoning", turn.reasoning)
            if reasoning_over:
                yield from self._new("content", turn.content)

    def finish(self, body: Sequence[int]) -> tuple[list[Part], ParsedTurn]:
        """What is still to be shown, and all of it; `body`: the whole reply without the token that ended it."""
        turn, _ = self._read(body, len(cut(decode(self._tokenizer, body), self._stop)))
        return [*self._new("reasoning", turn.reasoning), *self._new("content", turn.content)], turn

    def _new(self, name: Literal["reasoning", "content"], text: str) -> Iterator[Part]:
        if len(text) > self._shown[name]:
            yield name, text[self._shown[name] :]
            self._shown[name] = len(text)

    def _read(self, ids: Sequence[int], length: int) -> tuple[ParsedTurn, bool]:
        """The turn whose text is the first `length` characters of these ids', and whether its reasoning is over.

        A call that is cut there is one that cannot be read.
        """
        kept, beyond = _within(ids, length, self._tokenizer)
        turn = parse(kept, self._tokenizer, self._schemas)
        _, end, answer = reasoning_range(kept, self._tokenizer)
        reasoning_over, surplus = end < answer, len(beyond.rstrip())
        if not surplus or turn.calls:
            return turn, reasoning_over
        if reasoning_over or not answer:
            return replace(turn, content=turn.content[:-surplus].rstrip()), reasoning_over
        return replace(turn, reasoning=turn.reasoning[:-surplus].rstrip()), reasoning_over


def _within(ids: Sequence[int], length: int, tokenizer: Tokenizer) -> tuple[Sequence[int], str]:
    """The ids that hold the first `length` characters, to the next control token; and what of their text is beyond.

    A control token of which only a part is within is left out.
    """
    control = frozenset(tokenizer.control.values())
    place = seen = 0
    text = ""
    while place < len(ids) and seen < length:
        end = next((n for n in range(place, len(ids)) if ids[n] in control), len(ids))
        end = max(end, place + 1)
        text = decode(tokenizer, ids[place:end])
        if ids[place] in control and seen + len(text) > length:
            break
        place, seen = end, seen + len(text)
    return ids[:place], text[len(text) - max(0, seen - length) :]
