"""The KLong scaffold as an Inspect AI solver: prompt, reply, tools, until the work is done or the deadline has passed.

Always: what the model is sent is decided by the context policy alone (trajectory/live.py); after the task the scaffold
speaks through tool results, and by a user message only when a reply holds no tool call, since a user message makes
GLM render the history anew; the episode ends with a typed ending, which stands in the log even when it is cut.

    who waits                for whom                    ended by
    the work loop            engine, commands            the soft deadline, which stands still while a request waits
    the sample               the work loop               Inspect's time limit, which cancels it from outside
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    GenerateConfig,
    ModelOutput,
    execute_tools,
    get_model,
)
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolDef
from inspect_ai.util import LimitExceededError, SandboxUnavailableError, sample_limits, sandbox, store

from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.deadline import Deadline, readable_seconds
from megatron_klong.agent.ending import Ending
from megatron_klong.agent.messages import (
    final_tool_message,
    to_message,
    tool_definitions,
    with_turn_record,
    without_reasoning,
)
from megatron_klong.agent.reading import ReadingTracker
from megatron_klong.agent.tools import PAPER, Toolbox, cut_middle
from megatron_klong.serve.provider import KlongAPI
from megatron_klong.serve.turns import TurnStore
from megatron_klong.trajectory.context import ContextError
from megatron_klong.trajectory.episode import PolicyRecord, TurnRecord
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.live import LiveContext, Prompt
from megatron_klong.trajectory.tokenizer import load_tokenizer

STORE_KEY = "klong_episode"
GO_ON = "Please proceed with the task. Use a tool; call submit when the work is done."


class EngineFailed(RuntimeError):
    """The model's server gave no usable reply, retries included."""


_FAULTS: dict[type[Exception], Ending] = {
    ContextError: Ending.CONTEXT_ERROR,
    SandboxUnavailableError: Ending.SANDBOX_FAILED,
    EngineFailed: Ending.ENGINE_FAILED,
}


@solver
def klong_scaffold(config: EpisodeConfig, tokenizer: str) -> Solver:
    """Play one episode. `tokenizer` is the file whose tokens the context policy counts."""
    renderer = GlmRenderer(load_tokenizer(Path(tokenizer)))

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        notes: dict[str, Any] = {"ending": None, "error": None}
        store().set(STORE_KEY, notes)
        try:
            ending = await _play(await _begin(state, config, renderer, notes))
        except (ContextError, SandboxUnavailableError, EngineFailed) as fault:
            ending = _FAULTS[type(fault)]
            notes["error"] = str(fault)
        notes["ending"] = str(ending)
        state.completed = True
        return state

    return solve


@dataclass(kw_only=True)
class _Episode:
    """All that one episode holds."""

    state: TaskState
    config: EpisodeConfig
    deadline: Deadline
    reading: ReadingTracker
    toolbox: Toolbox
    tools: list[ToolDef]
    live: LiveContext
    turns: int = 0
    stripped: dict[int, ChatMessage] = field(default_factory=dict)
    replies_without_call: int = 0


async def _begin(state: TaskState, config: EpisodeConfig, renderer: GlmRenderer, notes: dict[str, Any]) -> _Episode:
    reading = ReadingTracker(await sandbox().read_file(PAPER))
    toolbox = Toolbox(config, reading)
    tools = toolbox.tools()
    definitions = tool_definitions(tools)
    notes |= {
        "tools": list(definitions),
        "context": PolicyRecord.of(config.context.policy).model_dump(),
        "tokenizer_sha256": renderer.tokenizer.sha256,
    }
    return _Episode(
        state=state,
        config=config,
        deadline=Deadline(config.timeout.in_seconds, total=_sample_seconds, working=_working_seconds),
        reading=reading,
        toolbox=toolbox,
        tools=tools,
        live=LiveContext(renderer, config.context.policy, definitions, [to_message(m) for m in state.messages]),
    )


def _sample_seconds() -> float:
    return sample_limits().time.usage


def _working_seconds() -> float:
    """The sample's time without what it waited for: retries, and slots shared with other episodes."""
    return sample_limits().working.usage


async def _play(episode: _Episode) -> Ending:
    with anyio.CancelScope() as until_deadline:
        while episode.turns < episode.config.turn_limit:
            prompt = episode.live.next_prompt()
            reply = await _ask(episode, prompt, until_deadline)
            until_deadline.deadline = anyio.current_time() + episode.deadline.remaining
            if reply.tool_calls:
                await _act(episode, reply)
            else:
                _go_on(episode)
            if episode.toolbox.end_message is not None:
                return Ending.FINISHED
            if episode.replies_without_call >= episode.config.stall_limit:
                return Ending.STALLED
        return Ending.TURN_LIMIT
    return Ending.TIMED_OUT


async def _ask(episode: _Episode, prompt: Prompt, until_deadline: anyio.CancelScope) -> ChatMessageAssistant:
    """Let the model take its turn; the deadline stands still while the request waits for its turn."""
    started, waited = time.monotonic(), episode.deadline.given_back
    until_deadline.deadline = math.inf
    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_at, episode.deadline, until_deadline)
        output = await _generate(episode, prompt)
        group.cancel_scope.cancel()
    if isinstance(output, Exception):
        raise output
    given_back = episode.deadline.given_back - waited
    reply = output.message
    episode.state.output = output
    episode.turns += 1
    turns = sampled_turns()
    if turns is not None and turns[reply.id or ""].prompt_sha256 != prompt.fingerprint.sha256:
        raise ContextError(f"turn {episode.turns}: the engine was given another prompt than the context policy made")
    fingerprint = episode.live.add_turn(to_message(reply, None if turns is None else turns[reply.id or ""].reply))
    turn = TurnRecord(
        key=None if turns is None else reply.id,
        window=fingerprint.window if fingerprint else None,
        prompt_tokens=fingerprint.tokens if fingerprint else None,
        prompt_sha256=fingerprint.sha256 if fingerprint else None,
        model_seconds=time.monotonic() - started - given_back,
        given_back_seconds=given_back,
    )
    episode.state.messages.append(with_turn_record(reply, turn))
    return reply


async def _cancel_at(deadline: Deadline, scope: anyio.CancelScope) -> None:
    """Cancel the scope once the deadline, which may stand still, has passed."""
    while (remaining := deadline.remaining) > 0:
        await anyio.sleep(max(remaining, 0.02))
    scope.cancel()


async def _generate(episode: _Episode, prompt: Prompt) -> ModelOutput | Exception:
    """One reply, or the fault, returned so that no task group wraps it."""
    try:
        output = await get_model().generate(
            _visible(episode, prompt),
            tools=episode.tools,
            config=GenerateConfig(
                max_tokens=min(prompt.reply_tokens, episode.config.reply_tokens or prompt.reply_tokens),
                max_retries=episode.config.engine_retries,
            ),
        )
    except LimitExceededError as limit:
        return limit
    except Exception as error:  # whatever the provider raises once it has given up
        return EngineFailed(f"{type(error).__name__}: {error}")
    return EngineFailed("the engine sent a reply without a choice") if output.empty else output


def sampled_turns() -> TurnStore | None:
    """What the model of this evaluation samples, if it is one of our own policies."""
    api = get_model().api
    return api.turns if isinstance(api, KlongAPI) else None


def _visible(episode: _Episode, prompt: Prompt) -> list[ChatMessage]:
    """The messages in context, those whose reasoning is left out in their stripped form."""
    visible: list[ChatMessage] = []
    for number in prompt.visible:
        message = episode.state.messages[number]
        if number < prompt.stripped_below:
            if number not in episode.stripped:
                episode.stripped[number] = without_reasoning(message)
            message = episode.stripped[number]
        visible.append(message)
    return visible


async def _act(episode: _Episode, reply: ChatMessageAssistant) -> None:
    """Run the tools a reply calls; the last result carries the notes."""
    episode.replies_without_call = 0
    read_before = episode.reading.complete
    results = (await execute_tools([reply], episode.tools, max_output=0)).messages
    _raise_for_sandbox(results)
    for number, result in enumerate(results, 1):
        assert isinstance(result, ChatMessageTool)
        text = f"Error: {result.error.message}" if result.error else result.text
        text = cut_middle(text, episode.config.output_characters)
        reading = episode.reading.show(text)
        if number == len(results):
            text = "\n".join([text, *_notes(episode, read_before)])
        message = final_tool_message(result, text, reading)
        episode.state.messages.append(message)
        episode.live.add_message(to_message(message))


def _raise_for_sandbox(results: list[ChatMessage]) -> None:
    """A failed sandbox is no news for the model: it ends the episode."""
    for result in results:
        if isinstance(result, ChatMessageTool) and result.error and result.error.type == "sandbox_unavailable":
            raise SandboxUnavailableError(result.error.message)


def _notes(episode: _Episode, read_before: bool) -> list[str]:
    """What the scaffold has to say; `read_before`: whether the paper had been read before this turn."""
    notes = []
    if episode.config.reading != "off" and not read_before:
        notes.append("[paper read]" if episode.reading.complete else f"[paper read: {episode.reading.progress}]")
    every = episode.config.remind_every_turns
    if every and episode.turns % every == 0:
        notes.append(f"[time left: {readable_seconds(episode.deadline.remaining)}]")
    return notes


def _go_on(episode: _Episode) -> None:
    """Answer a reply without a tool call: the one time the scaffold speaks as a user."""
    episode.replies_without_call += 1
    message = ChatMessageUser(content=GO_ON)
    episode.state.messages.append(message)
    episode.live.add_message(to_message(message))
