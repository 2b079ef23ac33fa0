"""A path -> its parsed JSON values, one in memory at a time, each with its number; what is damaged as a refusal.

Always: values and refusals come in the order of the file and share one numbering from 0; no damage to one value
keeps another from being read, if it can be told where the other begins.
Text that a JavaScript program cut within a character (half a surrogate pair) gets U+FFFD there, as any encoder of
such text to UTF-8 would write it.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_klong.trajectory.importers import tables
from megatron_klong.trajectory.importers.opening import DamagedStream, Kind, open_content, suffix_of
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from megatron_klong.trajectory.importers.row_fields import with_decoded_columns
from megatron_klong.trajectory.importers.splitting import Fault, Piece, is_cut, pieces

MAX_TRANSCRIPT_BYTES = 1 << 30
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_SUFFIXES = frozenset({".jsonl", ".ndjson"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """number: of the value in its file, from 0.  size: its bytes as they were written."""

    number: int
    content: Any
    size: int


def read_values(
    path: Path, *, is_one_value: Callable[[Any], bool], max_bytes: int = MAX_TRANSCRIPT_BYTES
) -> Iterator[Value | Refusal]:
    """Everything in a file.

    is_one_value: whether a list whose first element is this is one transcript rather than many.  max_bytes: of one
    value; what is longer is refused, and never held.
    """
    opened = open_content(path)
    if isinstance(opened, Refusal):
        yield opened
        return
    if opened.kind is Kind.JSON:
        items = _json_values(path, opened.chunks, is_one_value, max_bytes)
    else:
        items = (
            item if isinstance(item, Refusal) else Value(number=number, content=item.row, size=item.size)
            for number, item in enumerate(tables.rows(path, opened.kind, max_bytes))
        )
    nothing = True
    for item in items:
        nothing = False
        yield item if isinstance(item, Refusal) else replace(item, content=with_decoded_columns(item.content))
    if nothing:
        yield Refusal(source=str(path), reason=RefusalReason.EMPTY, detail="no row in it")


def _json_values(
    path: Path, chunks: Iterator[bytes], is_one_value: Callable[[Any], bool], max_bytes: int
) -> Iterator[Value | Refusal]:
    number = 0

    def is_one(first_element: bytes) -> bool:
        parsed = _parse(first_element)
        return not isinstance(parsed, _Problem) and is_one_value(parsed)

    split = pieces(chunks, limit=max_bytes, is_one_value=is_one, lines_expected=suffix_of(path) in _LINE_SUFFIXES)
    try:
        for piece in split:
            for item in _contents(piece, is_one_value, max_bytes):
                if isinstance(item, _Problem):
                    place = f"line {piece.line}, byte {piece.offset + item.position}"
                    yield Refusal(source=f"{path}#{number}", reason=item.reason, detail=f"{place}: {item.detail}")
                else:
                    yield Value(number=number, content=item, size=len(piece.data))
                number += 1
    except DamagedStream as error:
        yield Refusal(source=f"{path}#{number}", reason=error.reason, detail=str(error))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Problem:
    """position: bytes after the beginning of the value."""

    reason: RefusalReason
    position: int
    detail: str


def _contents(piece: Piece, is_one_value: Callable[[Any], bool], max_bytes: int) -> Iterator[Any]:
    """The value of a piece; of a list of values, each."""
    if piece.fault is Fault.TOO_LARGE:
        detail = f"a value of more than {max_bytes:,} bytes, the limit on one transcript"
        yield _Problem(reason=RefusalReason.TOO_LARGE, position=0, detail=detail)
        return
    if piece.fault is Fault.STRAY:
        detail = "neither a comma nor the end of the list; what follows is not read"
        yield _Problem(reason=RefusalReason.NOT_JSON, position=0, detail=detail)
        return
    if piece.fault is Fault.CUT:
        detail = "the file ends in the middle of a value" if piece.data else "the file ends before its list does"
        yield _Problem(reason=RefusalReason.TRUNCATED, position=len(piece.data), detail=detail)
        return
    value = _parse(piece.data)
    if isinstance(value, list) and value and not is_one_value(value[0]):
        yield from value
    elif not (isinstance(value, list) and not value):
        yield value


def _parse(data: bytes) -> Any:
    try:
        text = data.decode("utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        detail = f"the byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason})"
        return _Problem(reason=RefusalReason.NOT_UTF8, position=error.start, detail=detail)
    except json.JSONDecodeError as error:
        if is_cut(data):
            detail = f"the value ends too early ({error.msg})"
            return _Problem(reason=RefusalReason.TRUNCATED, position=len(data), detail=detail)
        position = len(text[: error.pos].encode("utf-8"))
        return _Problem(reason=RefusalReason.NOT_JSON, position=position, detail=error.msg)
    except RecursionError:
        return _Problem(reason=RefusalReason.NOT_JSON, position=0, detail="nested too deeply to be a transcript")
    except ValueError as error:  # a number of thousands of digits
        return _Problem(reason=RefusalReason.NOT_JSON, position=0, detail=str(error))
    return _whole_characters(value) if _ESCAPED_SURROGATE.search(data) else value


def _whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole_characters(element) for element in value]
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(element) for key, element in value.items()}
    return value
