"""The Inspect AI scorer: the submission as it stands, judged against the task's rubric in a fresh sandbox.

Always: an episode is scored whatever its ending, but for one that is to be gone on with; a submission that cannot be
fetched scores 0 with the reason; where a task has no judge, the episode is marked as not scored.
"""

import asyncio
import json
import re
from dataclasses import asdict
from pathlib import Path

from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState
from inspect_ai.util import SandboxUnavailableError, sandbox, store

from megatron_klong.agent.archive import ArchiveError, archive_slot, provided, read_tar, write_compressed
from megatron_klong.agent.ending import Ending
from megatron_klong.agent.scaffold import STORE_KEY
from megatron_klong.agent.tools import SUBMISSION
from megatron_klong.files import write_atomically
from megatron_klong.judge.checks import CheckError
from megatron_klong.judge.grading import grade_submission

SUBMISSION_SUFFIX, REQUESTS_SUFFIX = ".workspace.tar.zst", ".requests.jsonl"


@scorer(metrics=[mean(), stderr()])
def rubric_score(submission_bytes: int, artifacts: str | None = None) -> Scorer:
    """Grade the submission folder; with `artifacts`, keep it there too, and what was asked of the network."""

    async def score(state: TaskState, target: Target) -> Score:
        if (store().get(STORE_KEY) or {}).get("ending") == Ending.SUSPENDED:
            return Score.unscored(reason="suspended", explanation="frozen; to be gone on with")
        submission, fault = b"", None
        async with archive_slot():
            try:
                submission = await read_tar(sandbox(), SUBMISSION, limit_bytes=submission_bytes)
            except (ArchiveError, SandboxUnavailableError) as error:
                fault = f"the submission could not be fetched: {error}"
            if artifacts is not None:
                await asyncio.to_thread(_keep, submission if fault is None else None, Path(artifacts), state)
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


def _keep(submission: bytes | None, folder: Path, state: TaskState) -> None:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{state.sample_id}-{state.epoch}")
    if submission is not None:
        write_compressed(submission, folder / f"{name}{SUBMISSION_SUFFIX}")
    ours = provided(sandbox())
    if ours is not None and ours.egress is not None:
        lines = "".join(f"{json.dumps(asdict(request))}\n" for request in ours.egress.requests())
        write_atomically(folder / f"{name}{REQUESTS_SUFFIX}", lines)
