"""What the front waits for: not longer than its client does, and without making others wait; imports no torch."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request

_MUCH_TEXT = 1 << 16  # characters, which take some 40 ms to encode


async def encoded[Result](read: Callable[[], Result], characters: int) -> Result:
    """What `read` makes of a body; in a thread where there is so much text that others would wait for it.

    Only there, so that requests of token ids, and short ones, reach the engine in the order in which they came.
    """
    return await asyncio.to_thread(read) if characters > _MUCH_TEXT else read()


async def unless_gone[Result](request: Request, work: Awaitable[Result]) -> Result:
    """What is worked out; if the client leaves first, that is cancelled. Raises ClientDisconnect."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
