"""An engine that says what a test wrote, and the real front before it, under a real server on loopback."""

import asyncio
import contextlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from megatron_klong.serve.app import Front
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.interface import Engine, Load, Progress
from megatron_klong.serve.listener import listen
from megatron_klong.serve.protocol import (
    COMPLETIONS,
    Completion,
    CompletionRequest,
    DeadlinePassed,
    EngineStopped,
    FinishReason,
    RefitReply,
    RefitRequest,
)
from megatron_klong.serve.stop_strings import StopStrings
from megatron_klong.trajectory.tokenizer import Tokenizer

type Reply = Sequence[int | Exception] | Exception
"""Ids, as far as the first exception; the engine ends a reply before its end where a request says so."""

_SECONDS = 20.0


class Gate:
    """Tokens pass as far as they are let through, which any thread may do."""

    def __init__(self, permits: float) -> None:
        self._permits = permits
        self._stopped = False
        self._news: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        """Of those who wait, each in its event loop."""

    def let(self, tokens: float = math.inf, *, stopped: bool = False) -> None:
        self._permits += tokens
        self._stopped |= stopped
        for news, loop in list(self._news.items()):
            with contextlib.suppress(RuntimeError):  # its loop has ended
                loop.call_soon_threadsafe(news.set)

    async def passed(self) -> None:
        """Raises EngineStopped."""
        news = asyncio.Event()
        self._news[news] = asyncio.get_running_loop()
        try:
            while self._permits < 1 and not self._stopped:
                await news.wait()
                news.clear()
        finally:
            del self._news[news]
        if self._stopped:
            raise EngineStopped("the engine has ended: it was stopped")
        self._permits -= 1


class Scripted:
    """Says `replies` in order, or what they, if one function, make of a request; keeps what it was asked.

    held: each token waits to be let through.
    """

    exact_tokens = True
    on_failure: Callable[[], None] | None = None

    def __init__(
        self,
        *replies: Reply | Callable[[CompletionRequest], Reply],
        tokenizer: Tokenizer | None = None,
        held: bool = False,
        vocabulary_size: int = 400,
        policy_epoch: int = 0,
        refit: RefitReply | Exception | None = None,
    ) -> None:
        self.replies = list(replies)
        self.vocabulary_size = vocabulary_size
        self.policy_epoch = policy_epoch
        self.failure: BaseException | None = None
        self.loads: Sequence[Load] = (Load(running=1, blocks=8, prefill_reused=3),)
        self.asked: list[CompletionRequest] = []
        self.ended: list[CompletionRequest] = []
        """Those whose callers left before the end."""
        self.refits: list[RefitRequest] = []
        self._refit = refit
        self._tokenizer = tokenizer
        self._gate = Gate(0 if held else math.inf)
        self.let = self._gate.let

    def start(self) -> None: ...

    def stop(self) -> None:
        self.let(0, stopped=True)

    def follow(self) -> None:
        raise EngineStopped("a scripted engine has one rank")

    async def generate(self, request: CompletionRequest) -> Completion:
        async with contextlib.aclosing(self.stream(request)) as stream:
            async for part in stream:
                if isinstance(part, Completion):
                    return part
        raise AssertionError("unreachable")

    async def stream(self, request: CompletionRequest) -> AsyncGenerator[Progress | Completion]:
        self.asked.append(request)
        parts: list[Progress] = []
        try:
            reason: FinishReason = "length"
            async for part in self._parts(request):
                if part is None:
                    reason = "deadline"
                    break
                yield part
                parts.append(part)
                reason = "stop" if part.finished else reason
        except (GeneratorExit, asyncio.CancelledError):
            self.ended.append(request)
            raise
        yield self._whole(request, parts, reason)

    async def refit(self, request: RefitRequest) -> RefitReply:
        self.refits.append(request)
        if isinstance(self._refit, Exception):
            raise self._refit
        self.policy_epoch += 1
        return self._refit or RefitReply(policy_epoch=self.policy_epoch, seconds=0.5)

    async def _parts(self, request: CompletionRequest) -> AsyncGenerator[Progress | None]:
        """One a token; None where the deadline passes."""
        over = asyncio.get_running_loop().time() + request.deadline_seconds if request.deadline_seconds else None
        stops = StopStrings(request.stop, self._tokenizer) if request.stop and self._tokenizer else None
        for place, token in enumerate(self._reply(request)[: request.max_tokens]):
            if isinstance(token, Exception):
                raise token
            try:
                async with asyncio.timeout_at(over):
                    await self._gate.passed()
            except TimeoutError:
                if not place:
                    raise DeadlinePassed(f"deadline_seconds {request.deadline_seconds} passed") from None
                yield None
                return
            stopped = token in request.stop_token_ids or (stops is not None and stops.hit([token]))
            yield Progress(
                number=0,
                ids=(token,),
                log_probs=(log_prob(place),),
                top_log_probs=top(request, token),
                finished=stopped,
            )
            if stopped:
                return

    def _reply(self, request: CompletionRequest) -> Sequence[int | Exception]:
        first = self.replies[0]
        reply = first(request) if callable(first) else self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        assert not callable(reply)
        return reply

    def _whole(self, request: CompletionRequest, parts: Sequence[Progress], reason: FinishReason) -> Completion:
        return Completion(
            prompt_token_ids=request.prompt_token_ids,
            generation_token_ids=tuple(token for part in parts for token in part.ids),
            generation_log_probs=tuple(value for part in parts for value in part.log_probs),
            top_log_probs=tuple(one for part in parts for one in part.top_log_probs),
            finish_reason=reason,
            policy_epoch=((0, self.policy_epoch),),
            cached_tokens=1,
        )


def log_prob(place: int) -> float:
    """Of the token at a place of a reply."""
    return -0.25 * (place + 1)


def top(request: CompletionRequest, token: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The likeliest tokens: what was sampled, and those after it."""
    likeliest = tuple((token + number, -0.25 - number) for number in range(request.top_logprobs))
    return (likeliest,) if likeliest else ()


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` letter by letter, as no tokenizer would encode it but a policy may sample it."""
    return [identifier for letter in text for identifier in tokenizer.encode(letter)]


def written(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` letter by letter, with the control tokens it spells."""
    control = tokenizer.control
    pieces = re.split("(" + "|".join(map(re.escape, control)) + ")", text)
    return [one for piece in pieces for one in ([control[piece]] if piece in control else letters(tokenizer, piece))]


def call(name: str, **arguments: str) -> str:
    """A tool call as GLM-4.5 writes it."""
    pairs = (f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items())
    return f"\n<tool_call>{name}\n{''.join(pairs)}</tool_call>"


@contextmanager
def serving(
    engine: Engine,
    *,
    tokenizer: Tokenizer | None = None,
    tokenizer_file: str | None = None,
    token: str | None = None,
    **settings: Any,
) -> Iterator[str]:
    """The address of a server of this engine; settings: of its ServeConfig, as is tokenizer_file."""
    config = ServeConfig(**{"weights": "none", "tokenizer": tokenizer_file} | settings)
    app = Front(config, engine, tokenizer=tokenizer, token=token).app()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    listener = listen(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        engine.stop()
        server.should_exit = True
        thread.join(_SECONDS)
        assert not thread.is_alive()
        listener.close()


def post(url: str, body: Any, path: str = COMPLETIONS, **headers: str) -> httpx.Response:
    """body: what becomes JSON, or bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + path, content=content, headers=headers, trust_env=False, timeout=_SECONDS)


def get(url: str, path: str, **headers: str) -> httpx.Response:
    return httpx.get(url + path, headers=headers, trust_env=False, timeout=_SECONDS)


def connected(url: str) -> socket.socket:
    """For what no client library would do."""
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=_SECONDS)


def head(path: str, *, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {length}\r\n\r\n".encode()


def events(stream: str) -> list[dict[str, Any]]:
    """What a streamed reply holds but for its last event, which says that it is over."""
    *read, last, end = stream.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in read]


def eventually(holds: Callable[[], Any]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + _SECONDS
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.02)
