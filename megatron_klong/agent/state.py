"""All that one episode holds, and how it begins: anew, or where another process froze it.

Always: an episode that is gone on with has the messages, files, sampled ids and seconds it was frozen with, and its
prompts are made anew and compared with those it had; one that would be rendered otherwise is refused.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inspect_ai.model import ChatMessage, get_model
from inspect_ai.solver import TaskState
from inspect_ai.tool import ToolDef, ToolInfo
from inspect_ai.util import sample_limits, sandbox
from pydantic import TypeAdapter
from pydantic_core import to_json

from megatron_klong.agent.archive import archive_slot, provided, read_compressed, read_tar, write_compressed, write_tar
from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.deadline import Deadline, TimeUsed
from megatron_klong.agent.frozen import FrozenEpisode, FrozenError, read_frozen, workspace_file, write_frozen
from megatron_klong.agent.messages import to_message, tool_definitions, turn_record
from megatron_klong.agent.reading import ReadingTracker
from megatron_klong.agent.tools import PAPER, Toolbox
from megatron_klong.serve.provider import KlongAPI
from megatron_klong.serve.turns import TurnStore
from megatron_klong.trajectory.episode import PolicyRecord
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.live import LiveContext

WORKSPACE = ("/home", "/tmp")
_MESSAGES = TypeAdapter(list[ChatMessage])


@dataclass(kw_only=True)
class Episode:
    """All that one episode holds."""

    state: TaskState
    config: EpisodeConfig
    deadline: Deadline
    reading: ReadingTracker
    toolbox: Toolbox
    tools: list[ToolDef]
    offered: Sequence[ToolDef | ToolInfo]  # these, as the next request names them
    live: LiveContext
    tokenizer_sha256: str
    turns: int = 0
    sampled_tokens: int = 0
    replies_without_call: int = 0
    refused_before: int = 0  # requests the egress filter refused before it was frozen
    gone_on_at: int | None = None  # the turn that its state is of
    shown: dict[tuple[int, bool], ChatMessage] = field(default_factory=dict)  # by number, and whether with reasoning
    news: list[str] = field(default_factory=list)  # what the next tool result tells the agent


async def begin(state: TaskState, config: EpisodeConfig, renderer: GlmRenderer, notes: dict[str, Any]) -> Episode:
    """Start the episode of a sample, or go on with the frozen one its metadata names. `notes` go into the log."""
    path = state.metadata.get("frozen")
    frozen = await _thaw(state, Path(path)) if path else None
    # not the agent's copy, which it may have changed or removed before it was frozen
    paper = Path(state.metadata["folder"]) / Path(PAPER).name
    reading = ReadingTracker(paper.read_bytes().decode())
    used = (
        TimeUsed(total_seconds=frozen.total_seconds, given_back_seconds=frozen.given_back_seconds) if frozen else None
    )
    deadline = Deadline(
        config.timeout.in_seconds,
        total=_sample_seconds,
        working=_working_seconds,
        give_back=config.give_back,
        before=used,
    )
    toolbox = Toolbox(config, reading, deadline)
    tools = toolbox.tools()
    definitions = tool_definitions(tools)
    notes |= {
        "tools": to_json(definitions).decode(),  # a text: Inspect compares the store, field by field, at every call
        "context": PolicyRecord.of(config.context.policy).model_dump(),
        "tokenizer_sha256": renderer.tokenizer.sha256,
        "seconds_before": frozen.total_seconds if frozen else 0.0,
    }
    head = [to_message(message) for message in state.messages[: _head_stop(state.messages)]]
    episode = Episode(
        state=state,
        config=config,
        deadline=deadline,
        reading=reading,
        toolbox=toolbox,
        tools=tools,
        offered=tools,
        live=LiveContext(renderer, config.context.policy, definitions, head),
        tokenizer_sha256=renderer.tokenizer.sha256,
    )
    if frozen:
        _replay(episode, frozen, str(path))
    return episode


def hard_seconds_left(config: EpisodeConfig, state: TaskState) -> float:
    """Of the hard limit, which an episode that was frozen has used a part of. Raises FrozenError."""
    path = state.metadata.get("frozen")
    used = read_frozen(Path(path)).total_seconds if path else 0.0
    return max(0.0, config.hard_timeout.in_seconds - used)


async def freeze(episode: Episode, folder: Path, *, stop: bool) -> Path:
    """Write the episode down between two turns. stop: end its background commands first, since it ends here.

    Raises ArchiveError for a workspace that cannot be packed.
    """
    ended = episode.toolbox.jobs.running
    used = episode.deadline.used
    if stop:
        await episode.toolbox.jobs.stop_all()
    folder.mkdir(parents=True, exist_ok=True)
    workspace = {}
    for directory in WORKSPACE:
        async with archive_slot():
            tar = await read_tar(sandbox(), directory, limit_bytes=episode.config.workspace_bytes)
            path = workspace_file(folder, episode.turns, directory)
            workspace[directory] = await asyncio.to_thread(write_compressed, tar, path)
    turns = sampled_turns()
    keys = [turn.key for message in episode.state.messages if (turn := turn_record(message)) and turn.key]
    state = FrozenEpisode(
        task=str(episode.state.metadata["task"]),
        turns=episode.turns,
        messages=_MESSAGES.dump_python(episode.state.messages, mode="json"),
        sampled=[turns[key] for key in keys] if turns is not None else [],
        tokenizer_sha256=episode.tokenizer_sha256,
        total_seconds=used.total_seconds,
        given_back_seconds=used.given_back_seconds,
        sampled_tokens=episode.sampled_tokens,
        replies_without_call=episode.replies_without_call,
        refused_requests=refused_requests(episode),
        ended_jobs=ended,
        workspace=workspace,
        jobs_started=episode.toolbox.jobs.started,
        news=episode.news,
    )
    return await asyncio.to_thread(write_frozen, state, folder)


async def _thaw(state: TaskState, path: Path) -> FrozenEpisode:
    """Put files and messages where they were. Raises FrozenError, ArchiveError."""
    frozen = await asyncio.to_thread(read_frozen, path)
    if frozen.task != state.metadata["task"]:
        raise FrozenError(f"{path}: an episode of task {frozen.task}, not of {state.metadata['task']}")
    for directory, archive in frozen.workspace.items():
        async with archive_slot():
            tar = await asyncio.to_thread(read_compressed, archive, path.parent)
            await write_tar(sandbox(), directory, tar)
    state.messages = _MESSAGES.validate_python(frozen.messages)
    turns = sampled_turns()
    if turns is None and frozen.sampled:
        raise FrozenError(f"{path}: was sampled by a policy of ours; go on with a model klong/...")
    if turns is not None and len(frozen.sampled) != frozen.turns:
        raise FrozenError(f"{path}: was played by another model, whose replies have no ids; go on with that one")
    for turn in frozen.sampled:
        if turns is not None:
            turns.add(turn)
    return frozen


def _replay(episode: Episode, frozen: FrozenEpisode, path: str) -> None:
    """Bring context, reading and counters to where they were, and see that each prompt is made as it was."""
    turns = sampled_turns()
    for message in episode.state.messages[_head_stop(episode.state.messages) :]:
        turn = turn_record(message)
        if message.role == "tool":
            episode.reading.show(message.text)
        if turn is None:
            episode.live.add_message(to_message(message))
            continue
        episode.live.next_prompt()
        for _ in range(turn.halved):
            episode.live.halve_history()
        sampled = turns[turn.key].reply if turns is not None and turn.key else None
        made = episode.live.add_turn(replace(to_message(message, sampled), halved=turn.halved))
        if (made.sha256 if made else None) != turn.prompt_sha256:
            raise FrozenError(
                f"{path}: its prompts are made otherwise here; go on with the tokenizer, tools and context settings it "
                "was played with"
            )
    episode.turns = frozen.turns
    episode.sampled_tokens = frozen.sampled_tokens
    episode.replies_without_call = frozen.replies_without_call
    episode.refused_before = frozen.refused_requests
    episode.gone_on_at = frozen.turns
    episode.toolbox.jobs.before = frozen.jobs_started
    episode.news = list(frozen.news)
    if frozen.ended_jobs:
        named = ", ".join(repr(command[:100]) for command in frozen.ended_jobs)
        episode.news.append(f"[the machine was changed; these background commands were ended: {named}]")


def _head_stop(messages: Sequence[ChatMessage]) -> int:
    """Number of messages before the first turn."""
    return next((n for n, message in enumerate(messages) if message.role == "assistant"), len(messages))


def sampled_turns() -> TurnStore | None:
    """What the model of this evaluation samples, if it is one of our own policies."""
    api = get_model().api
    return api.turns if isinstance(api, KlongAPI) else None


def refused_requests(episode: Episode) -> int:
    """Requests for what the task forbids, refused by the egress filter, in the whole episode."""
    ours = provided(sandbox())
    here = ours.egress.counts.forbidden if ours is not None and ours.egress is not None else 0
    return episode.refused_before + here


def _sample_seconds() -> float:
    return sample_limits().time.usage


def _working_seconds() -> float:
    """The sample's time without what it waited for: retries, and slots shared with other episodes."""
    return sample_limits().working.usage
