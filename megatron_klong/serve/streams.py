"""Replies to several requests at once, whole or piece by piece; leaving ends all of them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from megatron_klong.serve.interface import Engine, Progress
from megatron_klong.serve.protocol import Completion, CompletionRequest, ReplyError

type Piece = tuple[int, Progress | Completion]
"""Which request it belongs to, and what there is of it."""


async def replies(engine: Engine, requests: Sequence[CompletionRequest]) -> list[Completion]:
    """In the order of the requests. Raises what the first that fails raises; the others are ended."""
    if len(requests) == 1:
        return [await engine.generate(requests[0])]
    tasks = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _ended(tasks)


async def pieces(engine: Engine, requests: Sequence[CompletionRequest]) -> AsyncGenerator[Piece]:
    """As they come; the last of each request is its Completion. Raises what the first that fails raises."""
    arrived: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

    async def forward(place: int) -> None:
        try:
            async with contextlib.aclosing(engine.stream(requests[place])) as stream:
                async for part in stream:
                    arrived.put_nowait((place, part))
                    if isinstance(part, Completion):
                        return
            arrived.put_nowait(ReplyError("the engine's reply ended before it was whole"))
        except Exception as error:  # raised again where it is waited for
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(forward(place)) for place in range(len(requests))]
    waiting = len(requests)
    try:
        while waiting:
            piece = await arrived.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            waiting -= isinstance(piece[1], Completion)
    finally:
        await _ended(tasks)


async def _ended[Result](tasks: Sequence["asyncio.Future[Result]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
