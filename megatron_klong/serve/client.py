"""A client of the server: one request, one completion, or an error that says whether trying again makes sense.

It tries again only as often as its caller allows (0 by default: Inspect AI has retries of its own), after the time
the server names.
"""

import asyncio
import random
import ssl
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import anyio
import httpx
from pydantic_core import from_json, to_json

from megatron_klong.serve.protocol import (
    COMPLETIONS,
    MODELS,
    REFIT,
    Completion,
    CompletionRequest,
    PromptIds,
    ProtocolError,
    RefitReply,
    RefitRequest,
    Reply,
    ReplyError,
    Sampling,
    validated,
)

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
_CONNECT_SECONDS = 10.0
_JSON = {"Content-Type": "application/json"}


class ServerError(RuntimeError):
    """The server did not answer with a completion."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def passing(self) -> bool:
        """Whether it may go better another time: no connection, too many requests, or a fault of the server."""
        return self.status is None or self.status == 429 or self.status >= 500


class Client:
    """HTTP connections to one server, as many as it has requests. Close it, or use it as an async context manager.

    A request costs the processor a fifth of what httpx takes for one: a worker asks for all turns of many episodes.
    """

    def __init__(
        self, base_url: str, *, timeout_seconds: float | None = None, retries: int = 0, token: str | None = None
    ) -> None:
        """`base_url` with or without a closing /v1; `timeout_seconds` for a whole reply, None: as long as it takes.

        Raises ProtocolError for an address that is none.
        """
        self.base_url = server_address(base_url)
        self._retries = retries
        self._timeout_seconds = timeout_seconds
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that the session belongs to

    async def complete(self, request: CompletionRequest) -> Completion:
        """Sample one reply. Raises ServerError, ProtocolError."""
        reply = await self.sample(PromptIds(request.prompt_token_ids), request)
        return Completion(prompt_token_ids=request.prompt_token_ids, **dict(reply))

    async def sample(self, prompt: PromptIds, sampling: Sampling) -> Reply:
        """The same for a prompt that is kept as it is sent. Raises ServerError, ProtocolError."""
        # a long prompt need not come back: its hash says as well which one was read
        rest = to_json({**sampling.fields(), "return_prompt_tokens": False})
        body = b'{"prompt":' + prompt.json + b"," + rest.removeprefix(b"{")
        return Reply.from_wire(await self._with_retries("POST", COMPLETIONS, body), prompt)

    async def max_sequence_length(self) -> int:
        """Longest prompt with its reply that the server takes. Raises ServerError, ProtocolError.

        Refuses a server whose replies are not the ids that were sampled: nothing may train on those.
        """
        body = await self._with_retries("GET", MODELS, None)
        try:
            model = body["data"][0]
            longest, exact = int(model["max_model_len"]), model["exact_tokens"]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ProtocolError(
                f"{self.base_url}{MODELS} names no max_model_len and exact_tokens, so it is no server of ours; start "
                "one with python -m megatron_klong.serve"
            ) from None
        if exact is not True:
            raise ProtocolError(
                f"{self.base_url}: its replies hold no sampled ids (exact_tokens is {exact}), so nothing may train on "
                "it; serve with --engine megatron or nemo"
            )
        return longest

    async def refit(self, request: RefitRequest) -> RefitReply:
        """Have the server take other weights. Raises ServerError (409: it serves the old ones on), ProtocolError."""
        body = await self._once("POST", REFIT, to_json(request.model_dump(mode="json", exclude_none=True)))
        return validated(RefitReply, body)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def _with_retries(self, method: str, path: str, body: bytes | None) -> Any:
        for attempt in range(self._retries + 1):
            try:
                return await self._once(method, path, body)
            except ServerError as error:
                if attempt == self._retries or not error.passing:
                    raise
                await anyio.sleep(seconds_to_wait(error, attempt))
        raise AssertionError("unreachable")

    def _connected(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is not None and self._loop is not loop:  # Inspect keeps models from evaluation to evaluation
            self._session.detach()
            self._session = None
        if self._session is None:
            self._loop = loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=self._timeout_seconds, sock_connect=_CONNECT_SECONDS),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                # the server is named outright: proxies of the environment are for other traffic
                trust_env=False,
            )
        return self._session

    async def _once(self, method: str, path: str, body: bytes | None) -> Any:
        headers = None if body is None else _JSON
        try:
            async with self._connected().request(
                method, self.base_url + path, data=body, headers=headers, allow_redirects=False
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerError(f"{self.base_url}: {type(error).__name__}: {error}") from error
        if response.status != httpx.codes.OK:
            raise ServerError(
                f"{self.base_url}{path} answered {response.status}: {answer.decode(errors='replace')[:500]}",
                status=response.status,
                retry_after=_seconds(response.headers.get("Retry-After")),
            )
        try:
            return from_json(answer)
        except ValueError:
            raise ReplyError(f"{self.base_url}{path} answered with something that is not JSON") from None


def seconds_to_wait(fault: BaseException | None, attempt: int) -> float:
    """Before a request is tried again that failed at `attempt`, counted from 0: what the server named, else longer each
    time; and a little more, so that what failed together does not come back together."""
    named = fault.retry_after if isinstance(fault, ServerError) else None
    seconds = named or _FIRST_WAIT_SECONDS * 2 ** min(attempt, 10)
    return min(seconds, _LONGEST_WAIT_SECONDS) * random.uniform(1, 1.5)


def server_address(base_url: str) -> str:
    """Without a closing /v1. Raises ProtocolError for what is no address of a server."""
    address = base_url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ProtocolError(f"base_url {base_url!r} is no address of a server; one looks like http://127.0.0.1:5000")
    if parts.username is not None:
        raise ProtocolError("base_url holds a user name; a server of ours asks for a token, given as api_key")
    return address


def served_tokenizer(base_url: str, token: str | None = None) -> str:
    """The tokenizer file of a server, as it names it. Raises ServerError, ProtocolError."""
    address = server_address(base_url)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        # certificates of the system, as aiohttp takes them
        with httpx.Client(trust_env=False, verify=ssl.create_default_context(), headers=headers, timeout=10.0) as http:
            response = http.get(f"{address}{MODELS}")
            named = response.raise_for_status().json()["data"][0].get("tokenizer")
    except httpx.HTTPError as error:
        raise ServerError(f"{address}: {type(error).__name__}: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        named = None
    if not isinstance(named, str):
        raise ProtocolError(f"{address}{MODELS} names no tokenizer; give it with -M tokenizer=FILE")
    return named


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header else None
    except ValueError:  # a date, which servers of ours do not send
        return None
