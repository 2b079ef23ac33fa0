"""The invariants of windows, and live agent = splitter, on every real transcript and from small windows to large."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from megatron_klong.trajectory.context import ContextPolicy, DropReason
from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.windows import split
from tests.unit.trajectory.builders import policy
from tests.unit.trajectory.test_context import (
    RENDERER,
    test_live_agent_and_splitter_see_the_same_tokens,
    test_windows_keep_their_promises,
)

ROWS = 20  # of a file of many short ones
check_promises = test_windows_keep_their_promises.hypothesis.inner_test  # type: ignore[attr-defined]
check_agreement = test_live_agent_and_splitter_see_the_same_tokens.hypothesis.inner_test  # type: ignore[attr-defined]
del test_windows_keep_their_promises, test_live_agent_and_splitter_see_the_same_tokens  # collected where they are


@pytest.fixture(scope="module")
def transcripts(shared_data: Path) -> list[Transcript]:
    files = [*transcript_files(shared_data / "trajectories"), *(shared_data / "paperbench" / "runs").rglob("*.eval")]
    found = [item for file in files for item in islice(read_transcripts(file), ROWS)]
    return [item for item in found if isinstance(item, Transcript)]


@pytest.mark.parametrize("pin", ["task", "reading"])
@pytest.mark.parametrize("max_tokens", [2_048, 8_192, 32_768, 131_072])
def test_windows_of_real_transcripts(transcripts: list[Transcript], max_tokens: int, pin: str) -> None:
    # a byte is a token here, so that most transcripts are far longer than the windows
    rule = policy(max_tokens, reserve=max_tokens // 8, keep=max_tokens // 4, pin=pin)
    assert len(transcripts) > 40
    ends: Counter[int] = Counter()
    for made in transcripts:
        check_promises(made, rule)
        check_agreement(made, rule)
        ends[min(len(split(RENDERER.transcript(made), rule).windows), 2)] += 1
    assert ends[2] >= (3 if max_tokens > 100_000 else 10)  # many of them really are cut


def test_a_task_longer_than_the_window_is_counted(transcripts: list[Transcript]) -> None:
    rule: ContextPolicy = policy(2_048, reserve=256, keep=512)
    plans = [split(RENDERER.transcript(made), rule) for made in transcripts]
    dropped = [plan for plan in plans if DropReason.PREFIX_EXCEEDS_WINDOW in plan.dropped_tokens]
    assert dropped
    assert all(not plan.windows for plan in dropped)
    assert all(sum(plan.dropped_tokens.values()) == plan.trainable_tokens for plan in dropped)
