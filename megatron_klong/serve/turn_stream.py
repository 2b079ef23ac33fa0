"""A reply as it grows -> what of it can be shown already: reasoning, content, and at the end its calls.

Always (tests/unit/serve/test_turn_stream.py): however the ids come in, what was shown put together is what `parse`
makes of the whole reply, up to the first stop string. Calls are shown when the reply has ended: until then a call may
still turn out to be one that cannot be read.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from megatron_klong.serve.parsing import ParsedTurn, Schemas, parse
from megatron_klong.serve.stop_strings import cut
from megatron_klong.trajectory.sampled import decode
from megatron_klong.trajectory.tokenizer import Tokenizer

type Part = tuple[Literal["reasoning", "content"], str]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a character whose last bytes are still to come


class TurnStream:
    """One reply. stop: strings at which its text ends."""

    def __init__(self, tokenizer: Tokenizer, *, schemas: Schemas | None = None, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._schemas = schemas or {}
        self._stop = tuple(stop)
        self._held_back = max(map(len, self._stop), default=1) - 1
        self._ids: list[int] = []
        self._shown = {"reasoning": "", "content": ""}
        self._looked_at = -1

    def feed(self, ids: Sequence[int]) -> Iterator[Part]:
        """What new ids add to what can be shown."""
        self._ids += ids
        # reading the reply again at every token would take longer than sampling it
        if len(self._ids) < 128 or len(self._ids) - self._looked_at >= len(self._ids) // 128:
            self._looked_at = len(self._ids)
            yield from self._new(self._parsed(self._ids), done=False)

    def finish(self, body: Sequence[int]) -> tuple[list[Part], ParsedTurn]:
        """What is still to be shown, and all of it; `body`: the whole reply without the token that ended it."""
        turn = self._parsed(body)
        return list(self._new(turn, done=True)), turn

    def _parsed(self, ids: Sequence[int]) -> ParsedTurn:
        turn = parse(ids, self._tokenizer, self._schemas)
        if not self._stop or not any(string in decode(self._tokenizer, ids) for string in self._stop):
            return turn
        return ParsedTurn(reasoning=cut(turn.reasoning, self._stop), content=cut(turn.content, self._stop), calls=())

    def _new(self, turn: ParsedTurn, *, done: bool) -> Iterator[Part]:
        content_begun = bool(turn.content or turn.calls) or done
        for name, text, complete in (
            ("reasoning", turn.reasoning, content_begun),
            ("content", turn.content, bool(turn.calls) or done),
        ):
            certain = text if complete else text.rstrip(_UNFINISHED)[: len(text.rstrip(_UNFINISHED)) - self._held_back]
            shown = self._shown[name]
            if len(certain) > len(shown) and certain.startswith(shown):
                self._shown[name] = certain
                yield name, certain[len(shown) :]  # type: ignore[misc]  # mypy sees a str in the name
