"""What the tests of session importers share: real logs read as rows, small damage, and the order every result obeys."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megatron_klong.trajectory.schema import Provenance, Role, Transcript

type Row = dict[str, Any]


def rows_of(file: Path) -> list[Row]:
    """The lines of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def count(transcript: Transcript, role: Role) -> int:
    return sum(message.role is role for message in transcript.messages)


def calls(transcript: Transcript) -> int:
    return sum(len(message.tool_calls) for message in transcript.messages)


def provenances(transcript: Transcript) -> Counter[Provenance]:
    return Counter(message.provenance for message in transcript.messages if message.role is Role.ASSISTANT)


def contents(transcript: Transcript, role: Role | None = None) -> list[str]:
    return [message.content for message in transcript.messages if role in (None, message.role)]


def assert_results_follow_their_calls(transcript: Transcript) -> None:
    """Behind each turn: a result for each of its calls, in their order; none at all only at the very end."""
    messages = transcript.messages
    place = 0
    while place < len(messages):
        turn = messages[place]
        assert turn.role is not Role.TOOL, f"result {turn.tool_call_id} without a call"
        place += 1
        results = []
        while place < len(messages) and messages[place].role is Role.TOOL:
            results.append(messages[place].tool_call_id)
            place += 1
        if results or place < len(messages):
            assert results == [call.id for call in turn.tool_calls]


@st.composite
def damaged(draw: st.DrawFn, rows: Sequence[Any]) -> list[Any]:
    """Some of the rows gone, some there twice, a few moved."""
    order = list(range(len(rows)))
    gone = draw(st.sets(st.sampled_from(order), max_size=len(rows)))
    twice = draw(st.sets(st.sampled_from(order), max_size=4))
    kept = [rows[n] for n in order for _ in range(1 + (n in twice)) if n not in gone]
    if kept and draw(st.booleans()):
        kept.insert(draw(st.integers(0, len(kept) - 1)), kept.pop())
    return kept
