"""A running proxy in front of the internet on loopback, as most tests of the network use it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.proxy import EgressProxy, SandboxEgress
from megatron_klong.sandbox.egress.rules import Blacklist
from megatron_klong.sandbox.results import SandboxUnavailable
from tests.integration.sandbox.egress_parts import Internet, Loop, reachable_folder, start_internet

FORBIDDEN = "https://github.com/owner/repo"


@dataclass(kw_only=True)
class World:
    """What there is: servers, a proxy in mode open that knows them, and the event loop it belongs to."""

    folder: Path
    internet: Internet
    loop: Loop
    proxy: EgressProxy

    @contextlib.contextmanager
    def sandbox(self, blacklist: str = FORBIDDEN) -> Iterator[SandboxEgress]:
        """The way out of a sandbox whose task forbids this."""
        self.internet.seen.clear()
        egress = self.loop.run(self.proxy.open(Blacklist.parse(blacklist), "test"))
        yield egress
        self.loop.run(egress.close())


@contextlib.contextmanager
def running_world() -> Iterator[World]:
    """All of it. Skips the test where there can be no proxy."""
    with reachable_folder() as folder:
        (folder / "internet").mkdir()
        internet, loop = start_internet(folder / "internet"), Loop()
        config = EgressConfig(
            mode="open",
            addresses={**internet.addresses, "service.example.org:8080": f"127.0.0.1:{internet.plain}"},
            upstream_ca=str(internet.authority),
            fetchers=("mirror.example.org",),
        )
        try:
            proxy = loop.run(EgressProxy.start(config, folder / "egress"))
        except SandboxUnavailable as error:
            pytest.skip(f"no proxy on this machine: {error}")
        yield World(folder=folder, internet=internet, loop=loop, proxy=proxy)
        loop.run(proxy.close())
        loop.stop()
