"""What the HTTP front asks of an engine, whichever it is; imports no torch."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_klong.serve.protocol import Completion, CompletionRequest, RefitReply, RefitRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What one step gave one request, and what holds for all of it so far."""

    number: int
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finished: bool = False
    policy_epoch: tuple[tuple[int, int], ...] = ()
    kv_cache_epoch: tuple[tuple[int, int], ...] = ()
    evictions: int = 0
    cached_tokens: int = 0
    routes: Any = None
    """[tokens - 1, expert layers, experts a token], or nothing where not all of it was recorded."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How full a replica is. prefill_*: tokens of prompts since it was started."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks: int = 0
    prefill_computed: int = 0
    prefill_reused: int = 0
    evictions: int = 0


class Engine(Protocol):
    """A policy that is served."""

    vocabulary_size: int
    policy_epoch: int
    exact_tokens: bool
    """Whether replies hold the ids that were sampled, with their log-probabilities; if not, nothing may train on it."""
    loads: Sequence[Load]
    """Of each replica, as last counted."""
    failure: BaseException | None
    on_failure: Callable[[], None] | None
    """Called, in any thread, when the engine has ended by itself."""

    def start(self) -> None:
        """Load the weights. Raises what loading raises."""

    def stop(self) -> None:
        """End for good; what is in flight raises EngineStopped."""

    def follow(self) -> None:
        """On another rank than 0, in place of all else: take part until rank 0 stops. Raises EngineStopped."""

    async def generate(self, request: CompletionRequest) -> Completion:
        """One reply. Cancelled, the request is ended. Raises EngineStopped, DeadlinePassed."""

    def stream(self, request: CompletionRequest) -> AsyncGenerator[Progress | Completion]:
        """Token by token, and at last the whole; closed before that, the request is ended."""

    async def refit(self, request: RefitRequest) -> RefitReply:
        """Replace the weights. Raises RefitRefused, EngineStopped."""
