"""The Inspect AI scorer: the submission as it stands, judged against the task's rubric in a fresh sandbox.

Always: an episode is scored whatever its ending, but for one that is to be gone on with; a submission that cannot be
fetched scores 0 with the reason; where a task has no judge, the episode is marked as not scored.
"""

import asyncio
import re
from pathlib import Path

from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState
from inspect_ai.util import SandboxUnavailableError, sandbox, store

from megatron_klong.agent.archive import ArchiveError, archive_slot, read_tar, write_compressed
from megatron_klong.agent.ending import Ending
from megatron_klong.agent.scaffold import STORE_KEY
from megatron_klong.agent.tools import SUBMISSION
from megatron_klong.judge.checks import CheckError
from megatron_klong.judge.grading import grade_submission

SUBMISSION_SUFFIX = ".workspace.tar.zst"


@scorer(metrics=[mean(), stderr()])
def rubric_score(submission_bytes: int, submissions: str | None = None) -> Scorer:
    """Grade the submission folder; with `submissions`, keep it there too."""

    async def score(state: TaskState, target: Target) -> Score:
        if (store().get(STORE_KEY) or {}).get("ending") == Ending.SUSPENDED:
            return Score.unscored(reason="suspended", explanation="frozen; to be gone on with")
        submission, fault = b"", None
        async with archive_slot():
            try:
                submission = await read_tar(sandbox(), SUBMISSION, limit_bytes=submission_bytes)
            except (ArchiveError, SandboxUnavailableError) as error:
                fault = f"the submission could not be fetched: {error}"
            if submissions is not None and fault is None:
                await asyncio.to_thread(write_compressed, submission, submission_file(Path(submissions), state))
        try:
            graded = await grade_submission(Path(state.metadata["folder"]), submission)
        except CheckError as error:
            return Score.unscored(reason="no judge", explanation=str(error))
        return Score(
            value=graded.score,
            explanation=fault or graded.explanation,
            metadata={"graded_task_tree": graded.to_dict()},
        )

    return score


def submission_file(folder: Path, state: TaskState) -> Path:
    """Where what an episode left is kept."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{state.sample_id}-{state.epoch}")
    return folder / f"{name}{SUBMISSION_SUFFIX}"
