"""Fields of untrusted JSON, checked: each of these returns a value of the wanted type or raises MalformedRow.

`place` is how the message of the error names the field: "line 12: message.content".
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from megatron_klong.trajectory.importers.formats import Json
from megatron_klong.trajectory.importers.refusal import MalformedRow


def an_object(value: Json, place: str) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise MalformedRow(f"{place}: {_kind(value)} where an object belongs; {_CURE}")
    return value


def a_list(value: Json, place: str) -> Sequence[Json]:
    if not isinstance(value, list | tuple):
        raise MalformedRow(f"{place}: {_kind(value)} where a list belongs; {_CURE}")
    return value


def a_text(value: Json, place: str) -> str:
    if not isinstance(value, str):
        raise MalformedRow(f"{place}: {_kind(value)} where text belongs; {_CURE}")
    return value


def an_id(value: Json, place: str) -> str | None:
    """An id that may be missing."""
    return None if value is None else a_text(value, place)


def unix_seconds(value: Json, place: str) -> float | None:
    """ISO 8601 -> Unix time; None if there is none."""
    if value is None:
        return None
    try:
        return datetime.fromisoformat(a_text(value, place)).timestamp()
    except (ValueError, OverflowError) as error:
        raise MalformedRow(f"{place}: {value!r} is no ISO 8601 time; {_CURE}") from error


_CURE = "the file is damaged or of an unknown version, export it again"


def _kind(value: Json) -> str:
    return "nothing" if value is None else type(value).__name__
