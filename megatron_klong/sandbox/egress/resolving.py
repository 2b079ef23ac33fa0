"""Names -> public addresses, and an event loop that can connect to no other.

Always (tests/unit/sandbox/test_egress_resolving.py): what has one address that is not public is refused whole; a
connection goes to an address of the very answer that was checked, so a name server that answers differently the
second time gains nothing; only hosts with an entry in `addresses` of the configuration are exempt.

Refused too are names that lead to a host under a name that no rule knows: those made of an address
(140-82-121-4.example.org), and strange ones for GitHub's own servers, which answer for github.com whatever name
brought the client there. Other hosts have no networks of their own to know them by. (Mode listed has said which
names are meant.)
"""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.urls import normal_host

type AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]
type Lookup = Callable[[str, int], Awaitable[list[AddressInfo]]]

_LOOKUP_SECONDS = 15.0
_LOOKUP_THREADS = 64  # a sandbox that asks for names whose servers are slow must not hold up the others, so each
_LOOKUPS_OF_A_SOURCE = 8  # may have so many of them
_KEEP_SECONDS = 10.0
_KEEP_NAMES = 1024
# Not for connections of strangers, though some versions of Python call them global.
_NEVER = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's own services, for each of its machines
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
        "::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/9",
        "ff00::/8",
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


# Of https://api.github.com/meta, "web", "api" and "git"; 185.199.108.0/22 serves pages under names of their owners.
_GITHUB = [ipaddress.ip_network(network) for network in ("140.82.112.0/20", "143.55.64.0/20", "192.30.252.0/22")]
_GITHUB_NAMES = (
    *("github.com", "github.io", "github.dev", "githubapp.com", "githubassets.com", "githubusercontent.com"),
    *("githubcopilot.com", "githubstatus.com"),
)


class AddressRefused(OSError):
    """A name that resolves to an address inside (the machine's own, a private network's, link-local, multicast), or
    that only stands for an address."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's. IPv4 inside IPv6 is looked at as IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)))
    return found.is_global and not any(found in network for network in _NEVER if network.version == found.version)


def is_disguise(host: str, address: str) -> bool:
    """Whether a name only stands for an address, so that rules for names would not hold."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if any(found in network for network in _GITHUB if network.version == found.version):
        return not any(host == name or host.endswith(f".{name}") for name in _GITHUB_NAMES)
    spellings = [str(found), found.exploded, f"{int(found):08x}"]
    dashed = [spelling.replace(".", "-").replace(":", "-") for spelling in spellings]
    return any(spelling in host for spelling in (*spellings, *dashed))


class Resolver:
    """Looks names up and keeps answers for a few seconds, so that a check and the connection after it see the same."""

    def __init__(self, config: EgressConfig, lookup: Lookup) -> None:
        self._config = config
        self._lookup = lookup
        self._kept: dict[tuple[str, int], tuple[float, list[AddressInfo]]] = {}
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by source, while in use

    async def resolve(self, host: str, port: int, *, source: str | None = None) -> list[AddressInfo]:
        """Where to connect to. AddressRefused, or the OSError of a name that has no address.

        `source`: who asks, with whose other look-ups this one shares its places.
        """
        name = normal_host(host) or ""
        named = self._config.address(name, port)
        if named is not None:
            family = socket.AF_INET6 if ":" in named[0] else socket.AF_INET
            return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", named)]
        until, answer = self._kept.get((host, port), (0.0, []))
        if time.monotonic() < until:
            return answer
        async with asyncio.timeout(_LOOKUP_SECONDS):
            answer = await (self._lookup(host, port) if source is None else self._in_place(source, host, port))
        for *_, (address, *_) in answer:
            if not is_public(address):
                raise AddressRefused(f"{host} has the address {address}, which is not public")
            if self._config.mode == "open" and is_disguise(name, address):
                raise AddressRefused(f"{host} is not a name of {address} that rules know")
        if not answer:
            raise socket.gaierror(socket.EAI_NONAME, f"{host} has no address")
        if len(self._kept) >= _KEEP_NAMES:
            self._kept.clear()
        self._kept[host, port] = time.monotonic() + _KEEP_SECONDS, answer
        return answer

    async def _in_place(self, source: str, host: str, port: int) -> list[AddressInfo]:
        """Look a name up when the source has a place. A thread cannot be cancelled: it keeps its place to its end."""
        places = self._places.setdefault(source, asyncio.Semaphore(_LOOKUPS_OF_A_SOURCE))
        await places.acquire()
        looking = asyncio.ensure_future(self._lookup(host, port))

        def ended(looking: "asyncio.Future[list[AddressInfo]]") -> None:
            places.release()
            if not looking.cancelled():
                looking.exception()  # seen, should nobody wait for it any more

        looking.add_done_callback(ended)
        return await asyncio.shield(looking)


class CheckedLoop(asyncio.SelectorEventLoop):
    """An event loop whose connections to names go to checked addresses. (Literal addresses are not its concern.)"""

    def __init__(self, config: EgressConfig, lookup: Lookup | None = None) -> None:
        super().__init__()
        self.set_default_executor(ThreadPoolExecutor(_LOOKUP_THREADS, "lookup"))
        self.resolver = Resolver(config, lookup or self._system_lookup)

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        """As the event loop's own; asyncio asks it before each connection."""
        name = host.decode("ascii") if isinstance(host, bytes) else host
        return await self.resolver.resolve(name, int(port))

    async def _system_lookup(self, host: str, port: int) -> list[AddressInfo]:
        return [*await super().getaddrinfo(host, port, type=socket.SOCK_STREAM)]
