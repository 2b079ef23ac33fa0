"""Text -> text in which every character can be seen, and none of which a terminal or a page would act on.

Always: line ends stay; what is put in the place of a character is marked as such.
"""

import re
from collections.abc import Iterator

_TRAILING_SPACES = re.compile(r" +(?=\n|\Z)")
# Printable by Unicode, but blank; and what a decoder writes for bytes that are no text.
_BLANK = frozenset("\u00ad\u115f\u1160\u3164\uffa0\u2800\ufffd")
_NAMES = {0: "NUL", 7: "BEL", 8: "BS", 11: "VT", 12: "FF", 13: "CR", 27: "ESC", 127: "DEL", 0xA0: "NBSP", 0xFEFF: "BOM"}


def visible(text: str) -> Iterator[tuple[str, bool]]:
    """Runs of text in order, and whether a run stands in the place of what cannot be seen."""
    start = 0
    for space in _TRAILING_SPACES.finditer(text):
        yield from _runs(text[start : space.start()])
        yield "·" * len(space.group()), True
        start = space.end()
    yield from _runs(text[start:])


def one_line(text: str) -> str:
    """Text as one line, for names that come from outside."""
    return "".join(part for part, _ in visible(text.replace("\n", "⏎")))


def _runs(text: str) -> Iterator[tuple[str, bool]]:
    plain = 0
    for place, character in enumerate(text):
        if (character.isprintable() and character not in _BLANK) or character == "\n":
            continue
        if plain < place:
            yield text[plain:place], False
        yield _mark(character), True
        plain = place + 1
    if plain < len(text):
        yield text[plain:], False


def _mark(character: str) -> str:
    if character == "\t":
        return "⇥   "
    if character == "\ufffd":
        return character
    return f"⟨{_NAMES.get(ord(character), f'U+{ord(character):04X}')}⟩"
