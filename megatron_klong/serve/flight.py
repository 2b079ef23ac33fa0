"""Requests on their way between a caller's event loop and the engine's thread; imports no torch."""

import asyncio
import contextlib
from dataclasses import dataclass, field

from megatron_klong.serve.interface import Progress
from megatron_klong.serve.protocol import (
    Completion,
    CompletionRequest,
    DeadlinePassed,
    FinishReason,
    InFlight,
    ProtocolError,
    RefitReply,
    ReplyError,
    validated,
)
from megatron_klong.serve.stop_strings import StopStrings


@dataclass(kw_only=True, eq=False)
class Flight:
    """A request on its way. `parts` belongs to the event loop of its caller, all else to the engine's thread."""

    number: int
    request: CompletionRequest
    streamed: bool
    loop: asyncio.AbstractEventLoop
    deadline: float | None
    stop_strings: StopStrings | None
    replica: int = 0
    parts: "asyncio.Queue[Progress | Completion | BaseException]" = field(default_factory=asyncio.Queue)
    held: list[Progress] = field(default_factory=list)

    def stopped_by(self, part: Progress) -> bool:
        """Whether a stop token or a stop string ends the reply with this part."""
        by_token = bool(part.ids) and part.ids[-1] in self.request.stop_token_ids
        return by_token or (self.stop_strings is not None and self.stop_strings.hit(part.ids))

    def completion(self, reason: FinishReason) -> Completion | ReplyError:
        """What the engine made of it, or why that is no reply."""
        last = self.held[-1]
        fields = {
            "prompt_token_ids": self.request.prompt_token_ids,
            "generation_token_ids": tuple(token for part in self.held for token in part.ids),
            "generation_log_probs": tuple(value for part in self.held for value in part.log_probs),
            "top_log_probs": tuple(top for part in self.held for top in part.top_log_probs),
            "finish_reason": reason,
            "policy_epoch": last.policy_epoch,
            "kv_cache_epoch": last.kv_cache_epoch,
            "num_evictions": last.evictions,
            "cached_tokens": last.cached_tokens,
            "moe_topk_indices": last.routes,
        }
        try:
            return validated(Completion, fields)
        except ProtocolError as error:
            return ReplyError(str(error))

    def too_late(self) -> DeadlinePassed:
        """What to say if nothing was sampled in time."""
        seconds = self.request.deadline_seconds
        return DeadlinePassed(f"deadline_seconds {seconds} passed before a token was sampled")

    def give(self, *results: Progress | Completion | BaseException) -> None:
        """Hand something to the caller, from the engine's thread."""

        def give() -> None:
            for result in results:
                self.parts.put_nowait(result)

        with contextlib.suppress(RuntimeError):  # the caller's loop has ended
            self.loop.call_soon_threadsafe(give)


@dataclass(kw_only=True, eq=False)
class RefitAsked:
    """New weights that somebody waits for. weights: their folder; None: those of the model trained beside."""

    weights: str | None
    policy_epoch: int | None
    in_flight: InFlight
    done: "asyncio.Future[RefitReply]"
    loop: asyncio.AbstractEventLoop

    def settle(self, result: RefitReply | BaseException) -> None:
        """Tell the caller, from the engine's thread."""

        def settle() -> None:
            if self.done.done():
                return
            if isinstance(result, BaseException):
                self.done.set_exception(result)
            else:
                self.done.set_result(result)

        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(settle)
