"""Strings that end a reply: where the text of sampled ids first holds one. Imports no torch.

The text is `decode`'s: control tokens count as what they are called, ids that pad the vocabulary as nothing.
"""

from collections.abc import Sequence

from megatron_klong.trajectory.sampled import decode
from megatron_klong.trajectory.tokenizer import Tokenizer

_BYTES = 4  # a token holds at least a byte, a character at most so many
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a character whose last bytes are still to come


class StopStrings:
    """Looks at a reply as it grows; a token is looked at with as many before it as a string could reach back."""

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer) -> None:
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        self._reach = _BYTES * max(map(len, strings)) + _BYTES
        self._ids: list[int] = []

    def hit(self, ids: Sequence[int]) -> bool:
        """Take up new ids; whether the reply holds one of the strings now."""
        self._ids += [identifier for identifier in ids if identifier < self._tokenizer.vocabulary_size]
        text = decode(self._tokenizer, self._ids[-self._reach - len(ids) :])
        return any(string in text for string in self._strings)


def cut(text: str, strings: Sequence[str]) -> str:
    """The text up to the first of the strings, without it."""
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))]


def certain(text: str, strings: Sequence[str]) -> int:
    """How many characters of a text that goes on are sure to stay, whatever comes: none of a string that may have begun
    with the last of them, nor of a character that is not whole yet."""
    whole = text.rstrip(_UNFINISHED)
    longest = max(map(len, strings), default=0)
    begun = range(max(0, len(whole) - longest + 1), len(whole))
    open_end = next((place for place in begun if any(s.startswith(whole[place:]) for s in strings)), len(whole))
    return min(open_end, len(cut(text, strings)))
