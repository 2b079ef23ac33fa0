"""The formats that are read. At most one recognises any value; a test holds each against an example of every other.

Inspect's logs are archives with many entries, not values: `inspect_logs` opens them itself.
"""

from typing import Any

from megatron_klong.trajectory.importers import (
    anthropic_messages,
    atif,
    claude_code,
    codex,
    completion,
    episodes,
    gemini_cli,
    glm,
    mini_swe_agent,
    openai_messages,
    openhands,
    openhands_events,
    pi,
    sharegpt,
    swe_agent,
)
from megatron_klong.trajectory.importers.formats import RowFormat, SessionFormat

ROW_FORMATS: tuple[RowFormat, ...] = (
    episodes.FORMAT,
    atif.FORMAT,
    swe_agent.FORMAT,
    mini_swe_agent.FORMAT,
    openhands.FORMAT,
    gemini_cli.FORMAT,
    anthropic_messages.FORMAT,
    glm.FORMAT,
    openai_messages.FORMAT,
    sharegpt.FORMAT,
    completion.FORMAT,
)
SESSION_FORMATS: tuple[SessionFormat, ...] = (
    claude_code.FORMAT,
    codex.FORMAT,
    pi.FORMAT,
    openhands_events.FORMAT,
)


def row_format(value: Any) -> RowFormat | None:
    """The format of a parsed value, if it is one transcript."""
    return next((format for format in ROW_FORMATS if format.recognises(value)), None)


def session_format(lines: list[Any]) -> SessionFormat | None:
    """The format of a session that begins with these values, if it is one."""
    objects = [line for line in lines if isinstance(line, dict)]
    return next((format for format in SESSION_FORMATS if objects and format.recognises(objects)), None)


def is_one_value(first_element: Any) -> bool:
    """Whether a list that begins so is one transcript (a bare list of messages), not a list of them."""
    return row_format([first_element]) is not None
