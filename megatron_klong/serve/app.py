"""The HTTP front: who may ask, how much at once, and what is answered when something is wrong; one engine behind it.

    400  malformed, a token id the model does not have, too long, or too many replies at once (with the numbers)
    401  without the token, where one is set
    404, 405  no such route, or not by that method
    408, 413  the body took too long to arrive, or is too large
    409  the policy is older than the request wants, or new weights were refused
    429  as many requests as are allowed already wait; Retry-After says when to come back
    502  the engine's reply was none: no ids, or a log-probability short
    503  the engine has ended
    504  the request's deadline passed before a token was sampled

Errors are JSON as OpenAI writes it. A client that goes away ends its requests; metrics count that as 499. What goes
wrong in the middle of a streamed reply is its last event, with the status above, which is also what metrics count.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megatron_klong.serve.chat import ChatCompletions
from megatron_klong.serve.completions import TextCompletions, characters
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.interface import Engine
from megatron_klong.serve.metrics import Metrics
from megatron_klong.serve.prompts import Prompts
from megatron_klong.serve.protocol import (
    CHAT,
    COMPLETIONS,
    HEALTH,
    METRICS,
    MODELS,
    REFIT,
    Completion,
    CompletionRequest,
    DeadlinePassed,
    EngineStopped,
    ProtocolError,
    RefitRefused,
    RefitRequest,
    ReplyError,
    validated,
)
from megatron_klong.serve.streams import Piece, pieces, replies
from megatron_klong.serve.waiting import encoded, unless_gone
from megatron_klong.serve.wire import read_json
from megatron_klong.trajectory.tokenizer import Tokenizer

_RETRY_AFTER_SECONDS = 1
_GONE = 499  # nobody reads the answer
_MIB = 1 << 20
_STATUS: Mapping[type[Exception], int] = {
    ReplyError: 502,  # is a ProtocolError, but of the engine: the fault is not the client's
    ProtocolError: 400,
    RefitRefused: 409,
    EngineStopped: 503,
    DeadlinePassed: 504,
}

type Asked = TextCompletions | ChatCompletions
type Handler = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Front:
    """The routes of one server."""

    def __init__(
        self, config: ServeConfig, engine: Engine, *, tokenizer: Tokenizer | None = None, token: str | None = None
    ) -> None:
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._prompts = Prompts(tokenizer) if tokenizer else None
        self._token = token
        self._metrics = Metrics()
        self._in_flight = 0

    def app(self) -> Starlette:
        routes: Sequence[tuple[str, str, Handler]] = (
            (COMPLETIONS, "POST", self.completions),
            (CHAT, "POST", self.chat),
            (REFIT, "POST", self.refit),
            (MODELS, "GET", self.models),
            (METRICS, "GET", self.metrics),
            (HEALTH, "GET", self.health),
            ("/v1" + HEALTH, "GET", self.health),  # where Megatron's own server has it
        )
        return Starlette(
            routes=[Route(path, self._guarded(path, handler), methods=[method]) for path, method, handler in routes],
            exception_handlers={HTTPException: _http_error, Exception: _server_error},
        )

    async def completions(self, request: Request) -> Response:
        body = read_json(await self._body(request))
        read = partial(
            TextCompletions.of,
            body,
            model=self._config.name,
            tokenizer=self._tokenizer,
            check_count=self._check_count,
        )
        return await self._answer(request, await encoded(read, characters(body)))

    async def chat(self, request: Request) -> Response:
        content = await self._body(request)
        body = read_json(content)
        if self._prompts is None or self._tokenizer is None:
            raise ProtocolError("messages: this server has no tokenizer; start it with --tokenizer")
        read = partial(
            ChatCompletions.of,
            body,
            model=self._config.name,
            prompts=self._prompts,
            tokenizer=self._tokenizer,
            longest=self._config.max_sequence_length,
        )
        return await self._answer(request, await encoded(read, len(content)))

    async def refit(self, request: Request) -> Response:
        asked = validated(RefitRequest, dict(read_json(await self._body(request))))
        reply = await self._engine.refit(asked)
        return JSONResponse(reply.model_dump(mode="json"))

    async def models(self, request: Request) -> Response:
        config = self._config
        entry = {
            "id": config.name,
            "object": "model",
            "created": 0,
            "owned_by": "megatron_klong",
            "max_model_len": config.max_sequence_length,
            "vocab_size": self._engine.vocabulary_size,
            "policy_epoch": self._engine.policy_epoch,
            "exact_tokens": self._engine.exact_tokens,
            # for clients on the same file system, which need no setting of their own then
            "tokenizer": None if config.tokenizer is None else str(Path(config.tokenizer).resolve()),
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(self._engine, self._in_flight), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        if self._engine.failure is not None:
            raise EngineStopped(f"the engine has ended: {self._engine.failure}")
        return JSONResponse({"status": "ok", "in_flight": self._in_flight})

    def _guarded(self, path: str, handler: Handler) -> Handler:
        """The handler with its faults as answers, and all answers counted."""

        async def guarded(request: Request) -> Response:
            try:
                self._admit(path, request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Refused as error:
                response = _error(error.status, str(error), error.headers)
            except tuple(_STATUS) as error:
                response = _error(_status(error), str(error))
            except Exception:  # answered by _server_error
                self._metrics.answered(path, 500)
                raise
            if not isinstance(response, _Events):  # those are counted when they have ended
                self._metrics.answered(path, response.status_code)
            return response

        return guarded

    def _admit(self, path: str, request: Request) -> None:
        if self._token is None or path.endswith(HEALTH):
            return
        given = request.headers.get("authorization", "")
        # read as Latin-1, whatever its bytes mean
        if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self._token}".encode()):
            message = "the bearer token is missing or wrong; send the header Authorization: Bearer <token>"
            raise Refused(401, message, {"WWW-Authenticate": "Bearer"})

    async def _body(self, request: Request) -> bytes:
        """Raises Refused for one that is too large or too slow, ClientDisconnect."""
        most = int(self._config.max_body_mib * _MIB)
        limit = f"max_body_mib {self._config.max_body_mib}"
        too_large = Refused(413, f"the body is larger than {limit}; send less, or start the server with more")
        if (length := request.headers.get("content-length", "0")).isdigit() and int(length) > most:
            raise too_large
        parts = bytearray()
        try:
            async with asyncio.timeout(self._config.body_seconds):
                async for part in request.stream():
                    parts += part
                    if len(parts) > most:
                        raise too_large
        except TimeoutError:
            limit = f"body_seconds {self._config.body_seconds}"
            message = f"the body did not arrive within {limit}; send it faster, or start the server with more"
            raise Refused(408, message, {"Connection": "close"}) from None
        return bytes(parts)

    async def _answer(self, request: Request, asked: Asked) -> Response:
        for one in asked.requests:
            self._check(one)
        self._take_up(len(asked.requests))
        started = time.monotonic()
        if asked.delivery.stream:
            return await self._stream(request, asked, started)
        try:
            completions = await unless_gone(request, replies(self._engine, asked.requests))
        finally:
            self._in_flight -= len(asked.requests)
        self._metrics.finished(completions, time.monotonic() - started)
        return JSONResponse(asked.reply(completions))

    @property
    def _most(self) -> tuple[int, str]:
        """How many replies may be in flight, and why."""
        config, replicas = self._config, max(1, len(self._engine.loads))
        on_each = f" on each of {replicas} replicas" if replicas > 1 else ""
        limit = f"max_requests {config.max_requests}{on_each} and max_waiting {config.max_waiting}"
        return config.max_requests * replicas + config.max_waiting, limit

    def _check_count(self, count: int) -> None:
        most, limit = self._most
        if count > most:
            raise ProtocolError(f"{count} replies in one body, above {limit} together; ask for fewer at once")

    def _take_up(self, count: int) -> None:
        self._check_count(count)
        most, limit = self._most
        if self._in_flight + count > most:
            headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
            message = f"{self._in_flight} requests are in flight already, of {limit}; come back after Retry-After"
            raise Refused(429, message, headers)
        self._in_flight += count

    async def _stream(self, request: Request, asked: Asked, started: float) -> Response:
        """The first piece is waited for, so that what goes wrong before it has a status of its own."""
        stream = pieces(self._engine, asked.requests)
        try:
            first = await unless_gone(request, anext(stream))
        except BaseException:
            self._in_flight -= len(asked.requests)
            await stream.aclose()
            raise
        outcome = _Outcome()

        async def ended() -> None:
            self._in_flight -= len(asked.requests)
            self._metrics.answered(request.url.path, outcome.status)
            await stream.aclose()

        return _Events(self._events(asked, first, stream, started, outcome), ended)

    async def _events(
        self, asked: Asked, first: Piece, stream: AsyncGenerator[Piece], started: float, outcome: "_Outcome"
    ) -> AsyncGenerator[str]:
        completions: list[Completion] = []

        def written(piece: Piece) -> str:
            if isinstance(piece[1], Completion):
                completions.append(piece[1])
            return _event(asked.chunk(*piece))

        try:
            yield written(first)
            async for piece in stream:
                yield written(piece)
                await asyncio.sleep(0)  # or, where many pieces lie ready, that the client left is seen at their end
        except Exception as error:  # the status line is out already
            outcome.status = _status(error)
            yield _event(_error_body(outcome.status, str(error)))
            if outcome.status == 500:  # to be logged with its traceback
                raise
            return
        if asked.delivery.include_usage:
            yield _event(asked.usage_chunk(completions))
        self._metrics.finished(completions, time.monotonic() - started)
        outcome.status = 200
        yield "data: [DONE]\n\n"

    def _check(self, asked: CompletionRequest) -> None:
        """Raise for what the engine cannot do."""
        asked.check_length(self._config.max_sequence_length)
        if asked.top_k >= self._engine.vocabulary_size:
            raise ProtocolError(f"top_k {asked.top_k} is not below the vocabulary's {self._engine.vocabulary_size}")
        if asked.stop and self._tokenizer is None:
            raise ProtocolError("stop: this server has no tokenizer; send stop_token_ids, or start it with --tokenizer")
        if asked.routes and not self._config.routes:
            raise ProtocolError("routes: this server does not record them; start it with --routes true")
        wanted, served = asked.policy_epoch_at_least, self._engine.policy_epoch
        if wanted is not None and wanted > served:
            raise Refused(409, f"policy_epoch_at_least {wanted}: policy {served} is served here")
        for name, ids in (("prompt", asked.prompt_token_ids), ("stop_token_ids", asked.stop_token_ids)):
            self._check_ids(name, ids)

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        known = self._engine.vocabulary_size
        if ids and not 0 <= min(ids) <= max(ids) < known:
            place, unknown = next((n, one) for n, one in enumerate(ids) if not 0 <= one < known)
            raise ProtocolError(
                f"{name}: token id {unknown} at place {place} is unknown; the model has 0 to {known - 1}"
            )


@dataclass
class _Outcome:
    """What metrics count of a stream."""

    status: int = _GONE  # unless it gets as far as its last event


class _Events(StreamingResponse):
    """What is streamed. `ended` is called however it ends, even if it never began."""

    def __init__(self, events: AsyncGenerator[str], ended: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._ended()


def _status(error: Exception) -> int:
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_error_body(status, message), status_code=status, headers=headers)


def _error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    """Starlette has the traceback logged besides, whereupon uvicorn closes the connection; so the client is told."""
    return _error(500, f"{type(error).__name__}: {error}", {"Connection": "close"})
