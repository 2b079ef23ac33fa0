"""Strings that end a reply: where the text of sampled ids first holds one. Imports no torch."""

from collections.abc import Sequence

from megatron_klong.trajectory.sampled import decode
from megatron_klong.trajectory.tokenizer import Tokenizer

_BYTES = 4  # a token holds at least a byte, a character at most so many


class StopStrings:
    """Looks at a reply as it grows; a token is looked at with as many before it as a string could reach back."""

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer) -> None:
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        self._reach = _BYTES * max(map(len, strings)) + _BYTES
        self._ids: list[int] = []

    def hit(self, ids: Sequence[int]) -> bool:
        """Take up new ids; whether the reply holds one of the strings now."""
        self._ids += ids
        text = decode(self._tokenizer, self._ids[-self._reach - len(ids) :])
        return any(string in text for string in self._strings)


def cut(text: str, strings: Sequence[str]) -> str:
    """The text up to the first of the strings, without it."""
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))]
