"""The KLong scaffold as an Inspect AI solver: prompt, reply, tools, until the work is done or the deadline has passed.

Always: what the model is sent is decided by the context policy alone (trajectory/live.py); after the task the scaffold
speaks through tool results, and by a user message only when a reply holds no tool call, since a user message makes
GLM render the history anew; the episode ends with a typed ending, which stands in the log even when it is cut.

    who waits                for whom                    ended by
    the turns                engine, commands            the soft deadline, which stands still while a request waits
    the sample               the turns                   Inspect's time limit, which cancels it from outside
"""

import logging
import time
from pathlib import Path
from typing import Any

import anyio
from inspect_ai._util.error import PrerequisiteError  # no public name in inspect-ai 0.3
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    execute_tools,
    get_model,
)
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import SandboxUnavailableError, store, time_limit

from megatron_klong.agent.archive import ArchiveError
from megatron_klong.agent.asking import EngineFailed, ask
from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.deadline import Deadline, readable_seconds
from megatron_klong.agent.ending import Ending
from megatron_klong.agent.frozen import episode_folder, freeze_requested, unfinished
from megatron_klong.agent.messages import final_tool_message, to_message, with_tool_seconds
from megatron_klong.agent.state import Episode, begin, freeze, hard_seconds_left, refused_requests
from megatron_klong.agent.tools import cut_middle
from megatron_klong.serve.provider import KlongAPI
from megatron_klong.trajectory.context import ContextError
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.tokenizer import load_tokenizer

_LOG = logging.getLogger(__name__)
STORE_KEY = "klong_episode"
GO_ON = "Please proceed with the task. Use a tool; call submit when the work is done."

_FAULTS: dict[type[Exception], Ending] = {
    ContextError: Ending.CONTEXT_ERROR,
    SandboxUnavailableError: Ending.SANDBOX_FAILED,
    EngineFailed: Ending.ENGINE_FAILED,
}


@solver
def klong_scaffold(
    config: EpisodeConfig, tokenizer: str | None = None, freeze_folder: str | None = None, *, go_on: bool = False
) -> Solver:
    """Play one episode.

    `tokenizer` is the file whose tokens the context policy counts; a policy of our own has its own. `freeze_folder` is
    where episodes are frozen (agent/frozen.py); without it they cannot be. `go_on`: from the newest state there, if the
    sample names none.
    """
    given = None if tokenizer is None else GlmRenderer(load_tokenizer(Path(tokenizer)))
    folder = None if freeze_folder is None else Path(freeze_folder)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        notes: dict[str, Any] = {"ending": None, "error": None}
        store().set(STORE_KEY, notes)
        renderer = _renderer(given)
        frozen_in = None if folder is None else episode_folder(folder, str(state.sample_id), state.epoch)
        if go_on and frozen_in is not None and (newest := unfinished(frozen_in)):
            state.metadata["frozen"] = str(newest)
        episode = None
        try:
            with time_limit(hard_seconds_left(config, state)):
                episode = await begin(state, config, renderer, notes)
                ending = await _play(episode, folder, frozen_in)
        except (ContextError, SandboxUnavailableError, EngineFailed) as fault:
            ending = _FAULTS[type(fault)]
            notes["error"] = str(fault)
        finally:  # also of an episode that is cut
            notes["refused_requests"] = refused_requests(episode) if episode is not None else 0
        notes["ending"] = str(ending)
        state.completed = True
        return state

    return solve


def _renderer(given: GlmRenderer | None) -> GlmRenderer:
    """The model's, if it is a policy of our own, so that each text is encoded once; else the one that was given."""
    api = get_model().api
    if isinstance(api, KlongAPI):
        if given is not None and given.tokenizer.sha256 != api.renderer.tokenizer.sha256:
            raise PrerequisiteError(
                f"tokenizer {given.tokenizer.path} is not the model's, {api.renderer.tokenizer.path}; leave it out"
            )
        return api.renderer
    if given is None:
        raise PrerequisiteError("no tokenizer: name the file whose tokens fill the window, with -T tokenizer=FILE")
    return given


async def _play(episode: Episode, freeze_folder: Path | None, frozen_in: Path | None) -> Ending:
    outcome: Ending | Exception = Ending.TIMED_OUT
    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_behind, episode.deadline, group.cancel_scope)
        try:
            outcome = await _turns(episode, freeze_folder, frozen_in)
        except Exception as fault:  # the group would wrap it
            outcome = fault
        group.cancel_scope.cancel()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def _cancel_behind(deadline: Deadline, scope: anyio.CancelScope) -> None:
    await deadline.passed()
    scope.cancel()


async def _turns(episode: Episode, freeze_folder: Path | None, frozen_in: Path | None) -> Ending:
    while (ending := _reached(episode)) is None:
        if freeze_folder is not None and frozen_in is not None and await _frozen(episode, freeze_folder, frozen_in):
            return Ending.SUSPENDED
        reply = await ask(episode)
        if reply.tool_calls:
            await _act(episode, reply)
        else:
            _go_on(episode)
    return ending


def _reached(episode: Episode) -> Ending | None:
    """Why the episode ends before its next turn, if it does."""
    config = episode.config
    if episode.toolbox.end_message is not None:
        return Ending.FINISHED
    if config.refused_requests is not None and refused_requests(episode) >= config.refused_requests:
        return Ending.BLACKLISTED
    if episode.replies_without_call >= config.stall_limit:
        return Ending.STALLED
    if episode.turns >= config.turn_limit:
        return Ending.TURN_LIMIT
    if config.token_limit is not None and episode.sampled_tokens >= config.token_limit:
        return Ending.TOKEN_LIMIT
    return None


async def _frozen(episode: Episode, freeze_folder: Path, frozen_in: Path) -> bool:
    """Write the episode down where that is due; whether it ends with that. Raises SandboxUnavailableError."""
    stop, every = freeze_requested(freeze_folder), episode.config.freeze_every_turns
    due = stop or (every and episode.turns and episode.turns % every == 0)
    if due and episode.turns != episode.gone_on_at:  # that state stands, and a kill while it is replaced would spoil it
        try:
            with episode.deadline.left_out():
                await freeze(episode, frozen_in, stop=stop)
        except ArchiveError as error:
            if stop:
                raise SandboxUnavailableError(f"the episode could not be frozen: {error}") from error
            _LOG.warning("%s: not frozen at turn %s, and goes on: %s", frozen_in.name, episode.turns, error)
    return stop


async def _act(episode: Episode, reply: ChatMessageAssistant) -> None:
    """Run the tools a reply calls; the last result carries the notes."""
    episode.replies_without_call = 0
    asked = len(episode.state.messages) - 1
    read_before = episode.reading.complete
    started = time.monotonic()
    episode.toolbox.begin_turn(episode.turns)
    results = (await execute_tools([reply], episode.tools, max_output=0)).messages
    _raise_for_sandbox(results)
    for number, result in enumerate(results, 1):
        assert isinstance(result, ChatMessageTool)
        text = result.text
        if result.error:
            text = cut_middle(f"Error: {result.error.message}", episode.config.output_characters)
        reading = episode.reading.show(text)
        if number == len(results):
            text = "\n".join([text, *_notes(episode, read_before)])
        message = final_tool_message(result, text, reading)
        episode.state.messages.append(message)
        episode.live.add_message(to_message(message))
    episode.state.messages[asked] = with_tool_seconds(episode.state.messages[asked], time.monotonic() - started)


def _raise_for_sandbox(results: list[ChatMessage]) -> None:
    """A failed sandbox is no news for the model: it ends the episode."""
    for result in results:
        if isinstance(result, ChatMessageTool) and result.error and result.error.type == "sandbox_unavailable":
            raise SandboxUnavailableError(result.error.message)


def _notes(episode: Episode, read_before: bool) -> list[str]:
    """What the scaffold has to say; `read_before`: whether the paper had been read before this turn."""
    notes, episode.news = episode.news, []
    if episode.config.reading != "off" and not read_before:
        notes.append("[paper read]" if episode.reading.complete else f"[paper read: {episode.reading.progress}]")
    every = episode.config.remind_every_turns
    if every and episode.turns % every == 0:
        notes.append(f"[time left: {readable_seconds(episode.deadline.remaining)}]")
    return notes


def _go_on(episode: Episode) -> None:
    """Answer a reply without a tool call: the one time the scaffold speaks as a user."""
    episode.replies_without_call += 1
    message = ChatMessageUser(content=GO_ON)
    episode.state.messages.append(message)
    episode.live.add_message(to_message(message))
