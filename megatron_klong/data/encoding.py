"""Texts that come again and again (tool definitions, system prompts, names of tools) are encoded once.

Always: the ids are those of the encoder; memory is bounded, whatever the texts.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

_KEPT_CHARACTERS = 1 << 20
_SEEN_TEXTS = 1 << 14


class RepeatedTexts:
    """An encoder that keeps the ids of a text from the second time on that it is asked for it.

    So what occurs once, which is most of a transcript, never drives out what occurs in all of them.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode
        self._kept: OrderedDict[str, array[int]] = OrderedDict()
        self._kept_characters = 0
        self._seen: OrderedDict[int, None] = OrderedDict()  # hashes: two texts of one hash are only kept early

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        kept = self._kept.get(text)
        if kept is not None:
            self._kept.move_to_end(text)
            return kept.tolist()
        ids = list(self._encode(text))
        digest = hash(text)
        if digest in self._seen:
            self._keep(text, ids)
        else:
            self._seen[digest] = None
            if len(self._seen) > _SEEN_TEXTS:
                self._seen.popitem(last=False)
        return ids

    def _keep(self, text: str, ids: list[int]) -> None:
        if len(text) > _KEPT_CHARACTERS // 4:
            return
        self._kept[text] = array("q", ids)
        self._kept_characters += len(text)
        while self._kept_characters > _KEPT_CHARACTERS:
            forgotten, _ = self._kept.popitem(last=False)
            self._kept_characters -= len(forgotten)
