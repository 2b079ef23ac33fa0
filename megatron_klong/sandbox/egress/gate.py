"""What a sandbox's programs see on 127.0.0.1:3128 -> the proxy, from the source address that says which sandbox.

Always: bytes are passed on unread, in both directions, no faster than they are taken; an end of one direction is an
end of that direction; no more than `connections` at once, further ones wait; where there is no proxy the answer is
503, and nothing leads past it; after `close` nothing is open.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable

_CHUNK_BYTES = 65536
_LINGER_SECONDS = 1.0
_TEXT = b"The sandbox's network is down: its proxy does not run.\n"
_DOWN = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_TEXT), _TEXT)
)


class Gate:
    """Relays the connections of one sandbox. Made and closed in the same event loop."""

    def __init__(
        self, listener: socket.socket, *, source: str, proxy_port: Callable[[], int | None], connections: int
    ) -> None:
        self._listener = listener
        self._source = source
        self._proxy_port = proxy_port
        self._free = asyncio.Semaphore(connections)
        self._relays: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def close(self) -> None:
        """Drop all connections and accept no more; the listener stays its owner's."""
        tasks = [self._accepting, *self._relays]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._free.acquire()
            try:
                inside, _ = await loop.sock_accept(self._listener)
            except OSError:  # out of descriptors, or the client is gone already
                self._free.release()
                await asyncio.sleep(0.1)
                continue
            relay = loop.create_task(self._relay(inside))
            self._relays.add(relay)
            relay.add_done_callback(self._done)

    def _done(self, relay: asyncio.Task[None]) -> None:
        self._relays.discard(relay)
        self._free.release()

    async def _relay(self, inside: socket.socket) -> None:
        with contextlib.ExitStack() as closing:
            closing.callback(inside.close)
            reader, writer = await asyncio.open_connection(sock=inside)
            closing.callback(writer.transport.abort)
            port = self._proxy_port()
            try:
                if port is None:
                    raise ConnectionRefusedError
                proxy_reader, proxy_writer = await asyncio.open_connection(
                    "127.0.0.1", port, local_addr=(self._source, 0)
                )
            except OSError:
                await _answer(reader, writer)
                return
            closing.callback(proxy_writer.transport.abort)
            # an error of one direction ends both
            with contextlib.suppress(OSError, ExceptionGroup):
                async with asyncio.TaskGroup() as both:
                    both.create_task(_pass_on(reader, proxy_writer))
                    both.create_task(_pass_on(proxy_reader, writer))
            await _flush(writer)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _flush(writer: asyncio.StreamWriter) -> None:
    """Let the last bytes go out before the connection is cut."""
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say that there is no proxy. Closed with unread bytes, the connection would be reset before this is read."""
    writer.write(_DOWN)
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            writer.write_eof()
            while await reader.read(_CHUNK_BYTES):
                pass
