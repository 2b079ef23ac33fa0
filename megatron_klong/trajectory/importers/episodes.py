"""Our own episode records -> transcripts."""

from collections.abc import Mapping
from typing import Any

from megatron_klong.trajectory.episode import EpisodeError, parse_episode
from megatron_klong.trajectory.importers.formats import RowFormat
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Transcript


def recognises(row: Any) -> bool:
    """Whether a parsed value says that it is an episode record, of whatever version."""
    return isinstance(row, Mapping) and row.get("format") == "klong-episode"


def transcript(row: Any, source: str, number: int) -> Transcript:
    """Convert one record. Raises MalformedRow."""
    try:
        return parse_episode(row, f"{source}#{number}").transcript(source)
    except EpisodeError as error:
        raise MalformedRow(str(error)) from error


FORMAT = RowFormat(name="klong_episode", recognises=recognises, transcript=transcript)
