"""What an importer is: one module a format, with a value of one of these two types named FORMAT.

    rows      a file holds many transcripts, each a JSON object by itself: a line of JSON Lines, an element of a list,
              the one value of a .json file, a record of a Parquet file
    sessions  a file is one transcript (or a few: side chains) written as JSON Lines, a line an event

An importer never opens files: it is handed parsed JSON, so that compression, limits and damage are dealt with once.
It raises MalformedRow, with the field and the cure, for what it cannot use, and marks what no model said by
Provenance, never by leaving it out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_klong.trajectory.schema import Transcript

type Json = Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """name: as reports show it.  recognises: whether a parsed value has this format; must not raise.

    transcript: (value, source, number of the row in its file) -> transcript. Raises MalformedRow.
    """

    name: str
    recognises: Callable[[Json], bool]
    transcript: Callable[[Json, str, int], Transcript]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionFormat:
    """recognises: whether the first lines (at least one, at most 20, parsed) begin such a session; must not raise.

    transcripts: (all lines, one at a time; source) -> its transcripts, the main one first. Raises MalformedRow.
    """

    name: str
    recognises: Callable[[Sequence[Mapping[str, Json]]], bool]
    transcripts: Callable[[Iterator[Mapping[str, Json]], str], Iterator[Transcript]]
