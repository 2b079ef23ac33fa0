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
from megatron_klong.agent.frozen import episode_folder, mark_ended
from megatron_klong.agent.scaffold import STORE_KEY
from megatron_klong.agent.tools import SUBMISSION
from megatron_klong.files import write_atomically
from megatron_klong.judge.checks import CheckError
from megatron_klong.judge.grading import grade_submission

SUBMISSION_SUFFIX, REQUESTS_SUFFIX = ".workspace.tar.zst", ".requests.jsonl"


@scorer(metrics=[mean(), stderr()])
def rubric_score(submission_bytes: int, artifacts: str | None = None, freeze_folder: str | None = None) -> Scorer:
    """Grade the submission folder; with `artifacts`, keep it there too, and what was asked of the network.

    In `freeze_folder` an episode that was judged is marked as ended, unless the engine or the sandbox ended it: then it
    may be gone on with.
    """

    async def score(state: TaskState, target: Target) -> Score:
        ending = (store().get(STORE_KEY) or {}).get("ending")
        if ending == Ending.SUSPENDED:
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
            judged = Score.unscored(reason="no judge", explanation=str(error))
        else:
            judged = Score(
                value=graded.score,
                explanation=fault or graded.explanation,
                metadata={"graded_task_tree": graded.to_dict()},
            )
        if freeze_folder is not None and ending not in (Ending.ENGINE_FAILED, Ending.SANDBOX_FAILED):
            mark_ended(episode_folder(Path(freeze_folder), str(state.sample_id), state.epoch))
        return judged

    return score


def _keep(submission: bytes | None, folder: Path, state: TaskState) -> None:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{state.sample_id}-{state.epoch}")
    if submission is not None:
        write_compressed(submission, folder / f"{name}{SUBMISSION_SUFFIX}")
    ours = provided(sandbox())
    if ours is not None and ours.egress is not None:
        lines = "".join(f"{json.dumps(asdict(request))}\n" for request in ours.egress.requests())
        write_atomically(folder / f"{name}{REQUESTS_SUFFIX}", lines)
