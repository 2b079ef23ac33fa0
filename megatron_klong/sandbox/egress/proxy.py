"""One proxy process for all sandboxes of a runner, and a way out through it for each.

    proxy = await EgressProxy.start(config, folder)
    egress = await proxy.open(Blacklist.read(file), label)
    ... run commands behind egress.network.enter(), with egress.environment and egress.files ...
    await egress.close()                      # after the sandbox's last command has ended
    await proxy.close()

Always (tests/integration/sandbox/test_egress.py): the proxy listens on loopback alone and dies with this process,
however that ends; a dead one is started again on the same authority and log, and meanwhile requests fail; no source
address is used twice. `folder` must be searchable by the uid of the sandboxes; all but the bundle in it is private.
"""

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import megatron_klong
from megatron_klong.processes import end_with_parent
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.gate import Gate
from megatron_klong.sandbox.egress.records import Counts, EgressRequest, Policies, read_counts, read_requests
from megatron_klong.sandbox.egress.rules import Blacklist
from megatron_klong.sandbox.egress.trust import ENVIRONMENT, files_inside, upstream_authorities
from megatron_klong.sandbox.network import SandboxNetwork
from megatron_klong.sandbox.results import SandboxUnavailable

type State = Literal["running", "restarting", "failed", "closed"]

_READY_SECONDS = 60.0
_STOP_SECONDS = 5.0
_FIRST_SOURCE = ipaddress.IPv4Address("127.64.0.1")
_LONG_ENOUGH_SECONDS = 60.0  # a proxy that ran so long did not die of its start
_MOST_DEATHS = 6  # in a row, each sooner than that

logger = logging.getLogger(__name__)


class SandboxEgress:
    """The way out of one sandbox. Made by `EgressProxy.open`; `close` it when nothing runs in the sandbox any more."""

    def __init__(self, *, network: SandboxNetwork, gate: Gate, proxy: "EgressProxy", source: str, label: str) -> None:
        self.network = network
        self.label = label
        self.source = source
        self._gate = gate
        self._proxy = proxy

    @property
    def environment(self) -> Mapping[str, str]:
        """What each command's environment must hold."""
        return ENVIRONMENT

    @property
    def files(self) -> dict[str, Path]:
        """Path in the sandbox -> file to bind there, read-only, after the system's own."""
        return files_inside(self._proxy.bundle)

    def files_for(self, image: Path) -> dict[str, Path]:
        """The same for a sandbox that shows an unpacked image instead of the host's system."""
        return files_inside(self._proxy.bundle, image)

    @property
    def counts(self) -> Counts:
        """Requests so far by verdict."""
        return read_counts(self._log)

    @property
    def refused(self) -> int:
        """Requests so far that were refused for whatever reason; `counts.forbidden`: because the task forbids them."""
        return self.counts.refused

    def requests(self) -> list[EgressRequest]:
        """The requests so far, as many as the log has room for; also after `close`."""
        return read_requests(self._log)

    async def close(self) -> None:
        """Cut its connections and let go of the namespace. May be called again."""
        self._proxy.forget(self)
        try:
            await self._gate.close()
        finally:
            self.network.close()

    @property
    def _log(self) -> Path:
        return self._proxy.folder / "requests" / f"{self.source}.jsonl"


class EgressProxy:
    """The proxy of this process. Made by `start`, in the thread of the event loop; `close` ends it."""

    def __init__(self, config: EgressConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.state: State = "restarting"
        self.restarts = 0
        self.reason = ""  # why it failed
        self._policies = Policies(folder / "policies")
        self._sources = itertools.count(int(_FIRST_SOURCE))
        self._open: dict[str, SandboxEgress] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None
        self._ready = asyncio.Event()
        self._supervising: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: EgressConfig, folder: Path) -> "EgressProxy":
        """Start it in a folder of its own. SandboxUnavailable, with the reason."""
        if config.mode == "off":
            raise ValueError('mode "off" needs no proxy')
        proxy = cls(config, folder)
        try:
            _make_folders(folder, config)
            await proxy._launch()
            _make_bundle(folder)
            proxy._supervising = asyncio.get_running_loop().create_task(proxy._supervise())
        except (OSError, ValueError) as error:
            raise SandboxUnavailable(f"the network proxy cannot be started: {error}") from error
        finally:
            if proxy._supervising is None:
                await proxy.close()
        return proxy

    @property
    def bundle(self) -> Path:
        """The authorities that sandboxes trust."""
        return self.folder / "trust" / "ca-certificates.pem"

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        return self._process.pid if self._process is not None and self.state == "running" else None

    @property
    def port(self) -> int | None:
        """On loopback, while it runs. Who connects from no sandbox's source address is dropped."""
        return self._port

    async def open(self, blacklist: Blacklist, label: str) -> SandboxEgress:
        """A network for one sandbox. SandboxUnavailable."""
        if self.state == "restarting":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), _READY_SECONDS)
        if self.state != "running":
            raise SandboxUnavailable(f"the network proxy is {self.state}: {self.reason or 'see its log'}")
        source = str(ipaddress.IPv4Address(next(self._sources)))
        network = SandboxNetwork.create()
        try:
            self._policies.write(source, blacklist)
        except OSError as error:
            network.close()
            raise SandboxUnavailable(f"the network's policy cannot be written: {error}") from error
        gate = Gate(
            network.listener,
            source=source,
            proxy_port=lambda: self.port,
            connections=self.config.connections,
        )
        egress = SandboxEgress(network=network, gate=gate, proxy=self, source=source, label=label)
        self._open[source] = egress
        return egress

    def forget(self, egress: SandboxEgress) -> None:
        """Take its policy away."""
        self._policies.remove(egress.source)
        self._open.pop(egress.source, None)

    async def close(self) -> None:
        """End the proxy and what is open. May be called again."""
        self.state = "closed"
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)
        for egress in tuple(self._open.values()):
            await egress.close()
        self._stop()

    async def _supervise(self) -> None:
        """Start the proxy again whenever it dies, unless it never lives long."""
        deaths = 0
        while True:
            started = time.monotonic()
            await self._died()
            deaths = 1 if time.monotonic() - started > _LONG_ENOUGH_SECONDS else deaths + 1
            self.state, self._port = "restarting", None
            self._ready.clear()
            logger.error("the network proxy died; see %s", self.folder / "proxy.log")
            await asyncio.sleep(0.1 * 2**deaths)
            try:
                if deaths > _MOST_DEATHS:
                    raise OSError(f"it died {deaths} times in a row")
                await self._launch()
            except OSError as error:
                self.state, self.reason = "failed", str(error)
                self._ready.set()
                logger.error("the network proxy is gone, and all requests fail: %s", error)
                return
            self.restarts += 1

    async def _launch(self) -> None:
        with (self.folder / "proxy.err").open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_klong.sandbox.egress.program", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd="/",
                env=_environment(),  # of the runner's own as little as can be: it holds secrets
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
        assert self._process.stdout is not None, "it is a pipe"
        reading = asyncio.get_running_loop().run_in_executor(None, self._process.stdout.readline)
        done, _ = await asyncio.wait([reading], timeout=_READY_SECONDS)
        if not done:
            self._stop()  # which ends the reading too
        line = (await reading).strip()
        self._process.stdout.close()
        if not line.isdigit():
            self._stop()
            text = (self.folder / "proxy.err").read_text(errors="replace").strip()
            raise OSError(text.rpartition("\n")[2] or "it does not answer")
        self._port = int(line)
        self.state = "running"
        self._ready.set()

    async def _died(self) -> None:
        assert self._process is not None, "launched before it is supervised"
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        pidfd = os.pidfd_open(self._process.pid)
        loop.add_reader(pidfd, gone.set)
        try:
            await gone.wait()
            self._process.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)

    def _stop(self) -> None:
        self._port = None
        if self._process is not None:
            self._process.kill()  # it keeps nothing that is not written
            self._process.wait(_STOP_SECONDS)


def _make_folders(folder: Path, config: EgressConfig) -> None:
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    folder.chmod(0o711)
    for name, mode in (("ca", 0o700), ("policies", 0o700), ("requests", 0o700), ("trust", 0o755)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(mode)
    authorities = upstream_authorities(None if config.upstream_ca is None else Path(config.upstream_ca))
    for name, content in (("upstream-ca.pem", authorities), ("config.json", config.model_dump_json().encode())):
        file = folder / name
        file.touch(mode=0o600)
        file.write_bytes(content)


def _make_bundle(folder: Path) -> None:
    bundle = folder / "trust" / "ca-certificates.pem"
    own = (folder / "ca" / "mitmproxy-ca-cert.pem").read_bytes()
    bundle.write_bytes((folder / "upstream-ca.pem").read_bytes() + b"\n" + own)
    bundle.chmod(0o644)


def _environment() -> dict[str, str]:
    package = Path(megatron_klong.__file__).parent.parent
    # few arenas: it looks names up in many threads, each of which would reserve memory of its own
    return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(package), "MALLOC_ARENA_MAX": "2"}
