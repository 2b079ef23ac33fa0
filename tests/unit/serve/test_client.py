"""The client against servers that behave badly, each a socket that says what a test wrote."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest

from megatron_klong.serve.client import Client, ServerError, seconds_to_wait, server_address
from megatron_klong.serve.protocol import Completion, CompletionRequest, ProtocolError, ReplyError
from tests.ports import free_port
from tests.unit.serve.scripted import Scripted, serving

REQUEST = CompletionRequest(prompt_token_ids=(1,), max_tokens=1)
FAULTS = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"choices"',
    "another protocol": b"220 smtp.example.com ESMTP\r\n",
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{",
}


@contextmanager
def saying(answer: bytes, *, hang: bool = False) -> Iterator[str]:
    """The address of a server that reads a request, sends these bytes, and closes the connection or never does."""
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)
                if hang:
                    over.wait()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def complete(url: str, *, timeout_seconds: float | None = None) -> Completion:
    async def run() -> Completion:
        async with Client(url, timeout_seconds=timeout_seconds) as client:
            return await client.complete(REQUEST)

    return anyio.run(run)


@pytest.mark.parametrize("name", FAULTS)
def test_a_connection_that_breaks_may_be_tried_again(name: str) -> None:
    with saying(FAULTS[name]) as url, pytest.raises(ServerError, match=url) as fault:
        complete(url)
    assert (fault.value.status, fault.value.passing) == (None, True)


def test_no_server_and_one_that_never_answers_may_be_tried_again() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match=nobody) as fault:
        complete(nobody)
    assert fault.value.passing
    with saying(b"HTTP/1.1 200 OK\r\n", hang=True) as url, pytest.raises(ServerError, match="Timeout") as fault:
        complete(url, timeout_seconds=0.2)
    assert fault.value.passing


def test_statuses_and_bodies_are_told_apart() -> None:
    moved = b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with saying(moved) as url, pytest.raises(ServerError, match="answered 307") as fault:
        complete(url)
    assert not fault.value.passing
    busy = b"HTTP/1.1 429 Busy\r\nRetry-After: 3\r\nContent-Length: 4\r\n\r\nbusy"
    with saying(busy) as url, pytest.raises(ServerError, match="429: busy") as fault:
        complete(url)
    assert (fault.value.passing, fault.value.retry_after) == (True, 3.0)
    with saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]") as url, pytest.raises(ReplyError, match="not JSON"):
        complete(url)


def test_a_client_goes_on_in_another_event_loop() -> None:
    with serving(Scripted([5], [6])) as url:
        client = Client(url)
        assert [anyio.run(client.complete, REQUEST).generation_token_ids for _ in range(2)] == [(5,), (6,)]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:5000", "no address of a server; one looks like http://"),
        ("ftp://node", "no address of a server"),
        ("http://", "no address of a server"),
        ("http://user:word@node:5000", "holds a user name"),
    ],
)
def test_what_is_no_address_is_said_at_once(url: str, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        Client(url)


def test_an_address_may_end_with_the_version() -> None:
    assert server_address("https://node:5000/v1/") == server_address("https://node:5000") == "https://node:5000"


@pytest.mark.parametrize(
    ("named", "attempt", "seconds"),
    [(None, 0, 0.5), (None, 3, 4), (None, 5000, 30), (2.0, 5, 2), (0.0, 1, 1), (1e9, 0, 30)],
)
def test_the_wait_is_what_the_server_named_or_longer_each_time(
    named: float | None, attempt: int, seconds: float
) -> None:
    assert seconds <= seconds_to_wait(ServerError("full", retry_after=named), attempt) <= 1.5 * seconds
    if named is None:
        assert seconds <= seconds_to_wait(TimeoutError(), attempt) <= 1.5 * seconds
