"""Names become public addresses or nothing, and one answer serves both the check and the connection."""

import asyncio
import gc
import socket

import pytest

from megatron_klong.sandbox.egress import resolving
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.resolving import (
    AddressInfo,
    AddressRefused,
    CheckedLoop,
    Resolver,
    is_disguise,
    is_public,
)


def answer(*addresses: str) -> list[AddressInfo]:
    def family(address: str) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in address else socket.AF_INET

    return [(family(address), socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]


class NameServer:
    """Answers with each of a list in turn, the last for ever."""

    def __init__(self, *answers: list[AddressInfo]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> list[AddressInfo]:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "140.82.121.4", "2606:4700::1111", "64:ff9b::1.1.1.1", "::ffff:8.8.8.8"]
)
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    """
    0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 127.64.0.1 168.63.129.16 169.254.169.254 172.31.0.1 192.168.1.1 192.0.2.1
    198.18.0.1 203.0.113.5 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:10.0.0.1 64:ff9b::10.0.0.1 64:ff9b:1::1 2001:db8::1 2001::1 2002:7f00:1:: fc00::1 fd12::1
    fe80::1 fe80::1%eth0 fec0::1 ff02::1
    """.split(),  # noqa: SIM905
)
def test_addresses_that_are_nobody_elses_business(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("140.82.121.4.example.org", "140.82.121.4"),
        ("x-93-184-216-34.example.org", "93.184.216.34"),
        ("5db8d822.example.org", "93.184.216.34"),
        ("2606-4700--1111.example.org", "2606:4700::1111"),
        ("harmless.example.org", "140.82.121.4"),
        ("notgithub.com", "192.30.252.1"),
    ],
)
def test_names_that_only_stand_for_an_address(host: str, address: str) -> None:
    assert is_disguise(host, address)
    resolver = Resolver(EgressConfig(mode="open"), NameServer(answer(address)))
    with pytest.raises(AddressRefused, match="not a name of"):
        asyncio.run(resolver.resolve(host, 443))


@pytest.mark.parametrize(
    ("host", "address"),
    [("github.com", "140.82.121.4"), ("api.github.com", "140.82.112.6"), ("pages.example.org", "185.199.108.153")],
)
def test_names_of_their_own(host: str, address: str) -> None:
    assert not is_disguise(host, address)


def test_one_private_address_among_public_ones_is_enough() -> None:
    resolver = Resolver(EgressConfig(mode="open"), NameServer(answer("1.1.1.1", "10.0.0.1")))
    with pytest.raises(AddressRefused, match=r"rebind.example.org has the address 10.0.0.1"):
        asyncio.run(resolver.resolve("rebind.example.org", 443))


def test_a_name_server_that_changes_its_mind_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: first a public address for the check, then a private one for the connection."""
    names = NameServer(answer("1.1.1.1"), answer("127.0.0.1"))
    resolver = Resolver(EgressConfig(mode="open"), names)
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    first = asyncio.run(resolver.resolve("rebind.example.org", 443))
    assert asyncio.run(resolver.resolve("rebind.example.org", 443)) == first == answer("1.1.1.1")
    assert names.asked == 1
    now += 60
    with pytest.raises(AddressRefused):
        asyncio.run(resolver.resolve("rebind.example.org", 443))


def test_only_configured_hosts_may_be_inside() -> None:
    config = EgressConfig(
        mode="open", addresses={"index.example.org": "10.0.0.7:3141", "v6.example.org:8443": "[fd00::7]:1"}
    )
    resolver = Resolver(config, NameServer(answer("1.1.1.1")))
    assert asyncio.run(resolver.resolve("Index.example.org.", 443))[0][4] == ("10.0.0.7", 3141)
    assert asyncio.run(resolver.resolve("v6.example.org", 8443))[0][:1] == (socket.AF_INET6,)
    assert asyncio.run(resolver.resolve("v6.example.org", 443)) == answer("1.1.1.1")


def test_a_name_without_address_is_an_error() -> None:
    resolver = Resolver(EgressConfig(mode="open"), NameServer([]))
    with pytest.raises(socket.gaierror):
        asyncio.run(resolver.resolve("absent.example.org", 443))


def test_a_source_whose_names_are_slow_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "_LOOKUP_SECONDS", 0.05)

    async def main() -> None:
        answering, running = asyncio.Event(), 0

        async def slow(host: str, port: int) -> list[AddressInfo]:
            nonlocal running
            running += 1
            if host.startswith("slow"):
                await answering.wait()  # as a thread does, whoever has gone meanwhile
            running -= 1
            return answer("1.1.1.1")

        resolver = Resolver(EgressConfig(mode="open"), slow)
        for batch in range(2):  # the first one's time is up, but its threads are not free
            names = [resolver.resolve(f"slow-{batch}-{n}.example.org", 443, source="127.64.0.1") for n in range(100)]
            ended = await asyncio.gather(*names, return_exceptions=True)
            assert {type(one) for one in ended} == {TimeoutError}
            del names, ended  # with the frames that their tracebacks hold
            assert running == 8
        assert await resolver.resolve("quick.example.org", 443, source="127.64.0.2") == answer("1.1.1.1")
        answering.set()
        assert await resolver.resolve("quick-too.example.org", 443, source="127.64.0.1") == answer("1.1.1.1")
        assert running == 0
        gc.collect()
        assert not resolver._places, "kept only while in use"

    asyncio.run(main())


def test_the_loop_itself_connects_to_no_private_address() -> None:
    """Whatever in the process asks for a connection, and whichever answer it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        async def connect() -> None:
            await asyncio.open_connection("inside.example.org", port)

        loop = CheckedLoop(EgressConfig(mode="open"), NameServer(answer("127.0.0.1")))
        with asyncio.Runner(loop_factory=lambda: loop) as runner, pytest.raises(AddressRefused):
            runner.run(connect())
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        named = EgressConfig(mode="open", addresses={f"inside.example.org:{port}": f"127.0.0.1:{port}"})
        loop = CheckedLoop(named, NameServer([]))
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(connect())
