"""An episode frozen at a turn boundary: all that another process, on another node, needs to go on with it.

    FOLDER/FREEZE                        present: every episode that plays into this folder freezes at its next turn
    FOLDER/<episode>/turn-000123.json    messages, sampled ids, counters, seconds used; names its workspace
    FOLDER/<episode>/turn-000123-*.tar.zst  /home and /tmp of its sandbox
    FOLDER/<episode>/ended               it has been played to its end and judged

Always: a state is there whole or not at all, workspace first; the newest whole state is what is gone on with; older
ones go once a newer one is there. Not in it: weights (another policy may go on), and processes, which are named.
Inspect AI's own checkpoints are not used: they belong to a retry of the same evaluation, and a frozen rollout is
gone on with in another one.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_klong.agent.archive import Archive
from megatron_klong.files import write_atomically
from megatron_klong.serve.turns import SampledTurn

REQUEST, ENDED = "FREEZE", "ended"
_STATE = re.compile(r"turn-(\d{6})\.json")


class FrozenError(ValueError):
    """A frozen episode that cannot be gone on with; the message names the file and why."""


class FrozenEpisode(BaseModel):
    """The state between two turns. total_seconds and given_back_seconds: as in deadline.TimeUsed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["klong-frozen-episode"] = "klong-frozen-episode"
    version: Literal[1] = 1
    task: str
    turns: int
    messages: list[dict[str, Any]]
    """Inspect AI's messages, whole."""
    sampled: list[SampledTurn]
    """Of the turns a policy of our own sampled."""
    tokenizer_sha256: str
    total_seconds: float
    given_back_seconds: float
    sampled_tokens: int
    replies_without_call: int
    refused_requests: int
    ended_jobs: list[str]
    """Background commands that were running; their processes are gone."""
    workspace: dict[str, Archive]
    """By directory of the sandbox."""
    jobs_started: int = 0
    """Background commands so far; they are numbered on."""
    news: list[str] = []
    """What the agent has not been told yet."""


def freeze_requested(folder: Path) -> bool:
    """Whether episodes that play into this folder are to stop at their next turn."""
    return (folder / REQUEST).exists()


def request_freeze(folder: Path) -> None:
    """Ask all episodes that play into this folder to freeze and end; they do so within one turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST).touch()


def episode_folder(folder: Path, sample_id: str, epoch: int = 1) -> Path:
    """Where one episode's states are; epoch: Inspect's."""
    if epoch > 1:
        sample_id = f"{sample_id}.epoch-{epoch}"
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", sample_id)
    if safe != sample_id:  # two ids must not share a folder
        safe = f"{safe}-{hashlib.sha256(sample_id.encode()).hexdigest()[:8]}"
    return folder / safe


def workspace_file(folder: Path, turns: int, directory: str) -> Path:
    """Where a directory of the sandbox is kept with the state of a turn."""
    return folder / f"turn-{turns:06d}{directory.replace('/', '-')}.tar.zst"


def write_frozen(state: FrozenEpisode, folder: Path) -> Path:
    """Write a state whose workspace is in `folder` already; then remove the older ones."""
    path = folder / f"turn-{state.turns:06d}.json"
    write_atomically(path, state.model_dump_json())
    keep = {path.name, *(archive.file for archive in state.workspace.values())}
    older = [file for file in folder.glob("turn-*") if file.name not in keep]
    for file in sorted(older, key=lambda file: file.suffix != ".json"):  # a state before what it names
        file.unlink(missing_ok=True)
    (folder / ENDED).unlink(missing_ok=True)  # an earlier episode had; last, for its states must not be taken for ours
    return path


def mark_ended(folder: Path) -> None:
    """Say that the episode whose states these are needs no going on with."""
    if folder.is_dir():
        (folder / ENDED).touch()


def unfinished(folder: Path) -> Path | None:
    """The newest state of an episode that has not ended."""
    return None if (folder / ENDED).exists() else newest_frozen(folder)


def newest_frozen(folder: Path) -> Path | None:
    """The newest state of an episode's folder, if it has one."""
    states = [file for file in folder.glob("turn-*.json") if _STATE.fullmatch(file.name)] if folder.is_dir() else []
    return max(states, default=None, key=lambda file: file.name)


def read_frozen(path: Path) -> FrozenEpisode:
    """Read a state. Raises FrozenError."""
    try:
        return FrozenEpisode.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise FrozenError(f"{path}: no such state of an episode") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the state"
        raise FrozenError(f"{path}: {field}: {first['msg']}; was it written by another version?") from error
    except ValueError as error:
        raise FrozenError(f"{path}: not JSON ({error}); the file is damaged") from error
