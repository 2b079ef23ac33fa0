"""Bytes -> the bytes of one JSON value after the other, with no more than one of them in memory.

Always: every byte of the input belongs to exactly one piece, or is white space, a bracket or a comma between pieces;
no more is held than the limit and one chunk; a value over the limit is passed over.

Three shapes are told apart by the content: one value a line (JSON Lines), one list whose elements are the values, and
values one after the other, each over several lines. A value that ends on the line it began on makes the rest JSON
Lines, where a damaged line spoils nothing but itself. Elsewhere brackets and strings are counted, so the end of a
value is known without parsing it; an event parser (ijson) is faster, but would hold a long string whole and stop
at the first value that is broken or not UTF-8.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

_BRACKET = re.compile(rb'["\[\]{}]')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SCALAR_END = re.compile(rb"[\s,\]}\[{]")
_SPACE = re.compile(rb"\s*")
_OPENING, _QUOTE, _BACKSLASH = b"[{", ord('"'), ord("\\")


class Fault(Enum):
    CUT = auto()  # the input ends before the value does
    TOO_LARGE = auto()
    STRAY = auto()  # no comma between two elements: where the next one begins is not known


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One value. offset and line: where it begins, in bytes from 0 and lines from 1; data is empty if too large."""

    data: bytes
    offset: int
    line: int
    fault: Fault | None = None


class _Input:
    """The bytes that are not used up yet, and where in the file they stand."""

    def __init__(self, chunks: Iterator[bytes], limit: int) -> None:
        self.buffer = bytearray()
        self.offset = 0  # of buffer[0]
        self.line = 1
        self.limit = limit
        self._chunks = chunks

    def more(self) -> bool:
        """Whether there was another chunk to append."""
        chunk = next(self._chunks, b"")
        self.buffer += chunk
        return bool(chunk)

    def drop(self, count: int) -> None:
        self.line += self.buffer.count(b"\n", 0, count)
        self.offset += count
        del self.buffer[:count]

    def take(self, count: int, fault: Fault | None = None) -> Piece:
        piece = Piece(data=bytes(self.buffer[:count]), offset=self.offset, line=self.line, fault=fault)
        self.drop(count)
        return piece

    def skip_space(self) -> bool:
        """Drop white space; whether anything follows it."""
        while True:
            match = _SPACE.match(self.buffer)
            self.drop(match.end() if match else 0)
            if self.buffer:
                return True
            if not self.more():
                return False


class _Scan:
    """Follows one value, that begins at buffer[0], to its end, however many chunks that takes."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.position = 0

    def advance(self, buffer: bytearray, floor: int) -> bool:
        """Go on until the depth falls to `floor`; whether it did before the buffer ended."""
        while True:
            if self.in_string:
                match = _IN_STRING.match(buffer, self.position)
                self.position = match.end() if match else self.position
                if self.position >= len(buffer) or buffer[self.position] == _BACKSLASH:
                    return False
                self.position += 1
                self.in_string = False
                if self.depth <= floor:
                    return True
            found = _BRACKET.search(buffer, self.position)
            if not found:
                self.position = len(buffer)
                return False
            self.position = found.end()
            byte = buffer[found.start()]
            if byte == _QUOTE:
                self.in_string = True
            elif byte in _OPENING:
                self.depth += 1
            else:
                self.depth -= 1
                if self.depth <= floor:
                    return True

    def pass_over(self, source: _Input) -> None:
        """Forget what was followed so far; the next bytes continue the same value."""
        source.drop(self.position)
        self.position = 0


def is_cut(data: bytes) -> bool:
    """Whether a value ends before its brackets and strings are closed."""
    scan = _Scan()
    return data[:1] in (b"{", b"[", b'"') and not scan.advance(bytearray(data), 0)


def pieces(
    chunks: Iterator[bytes], *, limit: int, is_one_value: Callable[[bytes], bool], lines_expected: bool = False
) -> Iterator[Piece]:
    """Split the input.

    limit: bytes of the longest value to hold.  is_one_value: whether a list with this first element is one value,
    rather than a list of values.  lines_expected: the input calls itself JSON Lines, which decides what to make of a
    first line that is not a whole value.
    """
    source = _Input(chunks, limit)
    while source.skip_space():
        if source.buffer[0] not in b"{[":
            yield from _lines(source)
            return
        if lines_expected and source.buffer[0] in b"{" and _first_line_is_broken(source):
            yield from _lines(source)
            return
        lines_expected = False
        first_line = source.line
        if source.buffer[0] in b"[":
            yield from _list(source, is_one_value)
        else:
            yield _value(source, _Scan())
        if source.line == first_line and _ends_its_line(source):
            yield from _lines(source)
            return


def _first_line_is_broken(source: _Input) -> bool:
    """Whether the first line is no whole value while the second one is."""
    ends = [_line_end(source, 0)]
    ends.append(_line_end(source, ends[0] + 1))
    first, second = (bytes(source.buffer[start:end]) for start, end in ((0, ends[0]), (ends[0] + 1, ends[1])))
    return is_cut(first) and second.strip()[:1] == b"{" and _is_json(second)


def _line_end(source: _Input, start: int) -> int:
    while (end := source.buffer.find(b"\n", start)) < 0 and len(source.buffer) <= start + source.limit:
        if not source.more():
            break
    return end if end >= 0 else len(source.buffer)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _ends_its_line(source: _Input) -> bool:
    while not source.buffer.strip(b" \t\r"):
        if not source.more():
            return True
    return source.buffer.lstrip(b" \t\r")[:1] == b"\n"


def _lines(source: _Input) -> Iterator[Piece]:
    while source.skip_space():
        yield _line(source)


def _line(source: _Input) -> Piece:
    """The line that begins at buffer[0], without its end."""
    too_large: Piece | None = None
    searched = 0
    while (end := source.buffer.find(b"\n", searched)) < 0:
        if len(source.buffer) > source.limit:
            too_large = too_large or source.take(0, Fault.TOO_LARGE)
            source.drop(len(source.buffer))
        searched = len(source.buffer)
        if not source.more():
            end = searched
            break
    if not too_large and end > source.limit:
        too_large = source.take(0, Fault.TOO_LARGE)
    if too_large:
        source.drop(end)
        return too_large
    return source.take(end)


def _value(source: _Input, scan: _Scan) -> Piece:
    """The value that begins at buffer[0], of which `scan` may have followed a part."""
    too_large: Piece | None = None
    while not scan.advance(source.buffer, 0):
        if too_large or len(source.buffer) > source.limit:
            too_large = too_large or source.take(0, Fault.TOO_LARGE)
            scan.pass_over(source)
        if not source.more():
            return too_large or source.take(len(source.buffer), Fault.CUT)
    if not too_large and scan.position > source.limit:
        too_large = source.take(0, Fault.TOO_LARGE)
    if too_large:
        source.drop(scan.position)
        return too_large
    return source.take(scan.position)


def _scalar(source: _Input) -> Piece:
    """A number, a word, or what is none: up to the next comma, bracket or space."""
    position = 1
    while not (found := _SCALAR_END.search(source.buffer, position)):
        position = len(source.buffer)
        if position > source.limit or not source.more():
            return source.take(position, Fault.CUT)
    return source.take(max(found.start(), 1))


def _list(source: _Input, is_one_value: Callable[[bytes], bool]) -> Iterator[Piece]:
    """The elements of the list that begins at buffer[0], or the list itself if it is one value."""
    scan = _Scan()
    if _first_element_makes_it_one(source, scan, is_one_value):
        yield _value(source, scan)
        return
    source.drop(1)
    element: Piece | None = None
    closed = _closes(source)
    while closed is False:
        element = _value(source, _Scan()) if source.buffer[0] in b'{["' else _scalar(source)
        yield element
        if not source.skip_space():
            closed = None
            break
        if source.buffer[0] in b",":
            source.drop(1)
        elif source.buffer[0] not in b"]":
            yield source.take(0, Fault.STRAY)
            source.drop(len(source.buffer))
            while source.more():
                source.drop(len(source.buffer))
            return
        closed = _closes(source)
    if closed:
        source.drop(1)
    elif element is None or element.fault is not Fault.CUT:
        yield source.take(0, Fault.CUT)


def _closes(source: _Input) -> bool | None:
    """Whether the list ends here; None if the input does."""
    return source.buffer[0] in b"]" if source.skip_space() else None


def _first_element_makes_it_one(source: _Input, scan: _Scan, is_one_value: Callable[[bytes], bool]) -> bool:
    scan.depth, scan.position = 1, 1
    while not (start := _start_of_element(source.buffer)):
        if not source.more():
            return False
    if source.buffer[start] not in b"{":
        return False
    while not scan.advance(source.buffer, 1):
        if len(source.buffer) > source.limit or not source.more():
            return False
    return is_one_value(bytes(source.buffer[start : scan.position]))


def _start_of_element(buffer: bytearray) -> int | None:
    match = _SPACE.match(buffer, 1)
    start = match.end() if match else 1
    return start if start < len(buffer) else None
