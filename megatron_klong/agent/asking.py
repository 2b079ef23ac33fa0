"""One turn asked of the model: the prompt the context policy makes, its reply, and what may go wrong between.

Always: a reply is taken once, with the prompt it was really given; an empty one is none; an engine that calls the
prompt too long gets one with half the history, which the record of the turn says; what failed for good raises.
The deadline stands still while a request waits for the engine's queue or for another try.
"""

import math
import time
from dataclasses import replace

import anyio
from inspect_ai.model import ChatMessage, ChatMessageAssistant, GenerateConfig, ModelOutput, get_model
from inspect_ai.util import LimitExceededError
from tenacity import RetryError

from megatron_klong.agent.messages import (
    reasoning_of,
    to_message,
    with_turn_record,
    without_marks,
    without_reasoning,
)
from megatron_klong.agent.state import Episode, sampled_turns
from megatron_klong.serve.client import seconds_to_wait
from megatron_klong.serve.protocol import ProtocolError, ReplyError
from megatron_klong.serve.provider import BriefTool
from megatron_klong.serve.turns import UnknownTurn
from megatron_klong.trajectory.context import ContextError
from megatron_klong.trajectory.episode import TurnRecord
from megatron_klong.trajectory.live import Prompt


class EngineFailed(RuntimeError):
    """The model's server gave no usable reply, retries included."""


async def ask(episode: Episode) -> ChatMessageAssistant:
    """Let the model take its turn. Raises EngineFailed, ContextError."""
    started, waited = time.monotonic(), episode.deadline.waited
    prompt, halved, output = await _fitting_reply(episode)
    given_back = episode.deadline.waited - waited
    return _took_turn(episode, prompt, output, halved, time.monotonic() - started - given_back, given_back)


def _took_turn(
    episode: Episode, prompt: Prompt, output: ModelOutput, halved: int, model_seconds: float, given_back_seconds: float
) -> ChatMessageAssistant:
    """Enter the reply into the episode."""
    reply = output.message
    episode.state.output = output
    episode.turns += 1
    episode.sampled_tokens += output.usage.output_tokens if output.usage else 0
    turns = sampled_turns()
    if turns is not None and episode.offered is episode.tools:
        episode.offered = [BriefTool.of(tool) for tool in episode.tools]
    sampled = None if turns is None else turns[reply.id or ""]
    if sampled is not None and sampled.prompt_sha256 != prompt.fingerprint.sha256:
        raise ContextError(f"turn {episode.turns}: the engine was given another prompt than the context policy made")
    message = replace(to_message(reply, sampled.reply if sampled else None), halved=halved)
    fingerprint = episode.live.add_turn(message)
    turn = TurnRecord(
        key=None if turns is None else reply.id,
        window=fingerprint.window if fingerprint else None,
        prompt_tokens=fingerprint.tokens if fingerprint else None,
        prompt_sha256=fingerprint.sha256 if fingerprint else None,
        model_seconds=model_seconds,
        given_back_seconds=given_back_seconds,
        halved=halved,
    )
    episode.state.messages.append(with_turn_record(reply, turn))
    return reply


async def _fitting_reply(episode: Episode) -> tuple[Prompt, int, ModelOutput]:
    """The prompt that the engine took, how often history was halved for it, and its reply."""
    prompt, halved = episode.live.next_prompt(), 0
    while (output := await _reply(episode, prompt)) is None:
        prompt = episode.live.halve_history()
        halved += 1
    return prompt, halved, output


async def _reply(episode: Episode, prompt: Prompt) -> ModelOutput | None:
    """A reply with something in it, or None if the prompt was too long. Raises EngineFailed."""
    tries = episode.config.engine_retries + 1
    fault: Exception = EngineFailed("not asked")
    for attempt in range(tries):
        try:
            output = await _generate(episode, prompt)
        except LimitExceededError:
            raise
        except Exception as error:  # whatever the provider raises once it has given up
            cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
            fault = EngineFailed(f"{type(cause).__name__}: {cause}")
            if isinstance(error, RetryError) or _status(error) is not None or _is_permanent(error):
                raise fault from cause  # Inspect has tried it again, or knows better than to
        else:
            if not output.empty and output.stop_reason == "model_length":
                return None
            if not _is_empty(output):
                return output
            fault = EngineFailed(f"the engine sent an empty reply {attempt + 1} times")
        if attempt + 1 < tries:
            waits = time.monotonic()
            await anyio.sleep(seconds_to_wait(None, attempt))
            episode.deadline.forgive(time.monotonic() - waits)
    raise fault


async def _generate(episode: Episode, prompt: Prompt) -> ModelOutput:
    limits = [prompt.reply_tokens]
    if episode.config.reply_tokens is not None:
        limits.append(episode.config.reply_tokens)
    if episode.config.token_limit is not None:
        limits.append(max(1, episode.config.token_limit - episode.sampled_tokens))
    return await get_model().generate(
        _visible(episode, prompt),
        tools=episode.offered,
        config=GenerateConfig(
            max_tokens=min(limits),
            max_retries=episode.config.engine_retries,
            attempt_timeout=math.ceil(episode.config.engine_timeout.in_seconds),
        ),
    )


def _is_permanent(error: Exception) -> bool:
    """Whether what was asked cannot be had, of a policy of our own."""
    return isinstance(error, UnknownTurn) or (isinstance(error, ProtocolError) and not isinstance(error, ReplyError))


def _status(error: Exception) -> int | None:
    """The HTTP status an error stands for; None for an answer that came and made no sense."""
    status = getattr(error, "status_code", getattr(error, "status", None))
    return status if isinstance(status, int) and status >= 400 else None


def _is_empty(output: ModelOutput) -> bool:
    """Nothing was said. What our own policy sampled is a reply whatever it says: it has ids."""
    if output.empty:
        return True
    message = output.message
    said = message.text.strip() or message.tool_calls or reasoning_of(message)
    return not said and sampled_turns() is None


def _visible(episode: Episode, prompt: Prompt) -> list[ChatMessage]:
    """The messages in context, those whose reasoning is left out in their stripped form.

    A message is the same object at every turn.
    """
    visible: list[ChatMessage] = []
    for number in prompt.visible:
        reasoning = number >= prompt.stripped_below
        shown = episode.shown.get((number, reasoning))
        if shown is None:
            shown = without_marks(episode.state.messages[number])
            episode.shown[number, reasoning] = shown = shown if reasoning else without_reasoning(shown)
        visible.append(shown)
    return visible
