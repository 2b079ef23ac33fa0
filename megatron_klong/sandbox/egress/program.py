"""The proxy's process: mitmproxy with our addon and no more of its own than it needs, on a port of loopback.

    python -m megatron_klong.sandbox.egress.program FOLDER     (started by proxy.py)

Prints its port when it is ready; ends with its parent. FOLDER holds config.json and what records.py describes.
"""

import asyncio
import logging
import logging.handlers
import resource
import sys
from pathlib import Path

from mitmproxy import options
from mitmproxy.addons import disable_h2c, next_layer, proxyserver, tlsconfig
from mitmproxy.master import Master
from mitmproxy.proxy import commands, events, layer
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._events import ErrorCode, ResponseProtocolError
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Server

from megatron_klong.sandbox.egress.addon import Egress
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.records import Policies
from megatron_klong.sandbox.egress.resolving import CheckedLoop

_LOG_BYTES = 1 << 20
_MEMORY_BYTES = 4 << 30  # an endless flood of whatever kind ends here at the latest, with this process
_HEADER_BYTES = 256 << 10


class _Ready:
    """Says where the proxy listens, once it does."""

    def __init__(self, server: proxyserver.Proxyserver) -> None:
        self._server = server

    def running(self) -> None:
        addresses = self._server.listen_addrs()
        if not addresses:
            sys.exit("the proxy found no port to listen on")
        print(addresses[0][1], flush=True)


def _bound_headers(kind: type[Http1Server] | type[Http1Client]) -> None:
    """Drop connections whose header does not end. mitmproxy would collect it for ever (its own FIXME says so)."""
    read_headers = kind.read_headers

    def bounded(self: Http1Server | Http1Client, event: events.ConnectionEvent) -> layer.CommandGenerator[None]:
        if len(self.buf) > _HEADER_BYTES:
            self.state = self.done
            self.buf.maybe_extract_at_most(len(self.buf))
            yield commands.CloseConnection(self.conn)
            if isinstance(self, Http1Client) and self.stream_id is not None:
                text, code = "The header of the answer does not end.", ErrorCode.GENERIC_SERVER_ERROR
                yield ReceiveHttp(ResponseProtocolError(self.stream_id, text, code))
        else:
            yield from read_headers(self, event)  # type: ignore[arg-type]

    kind.read_headers = bounded  # type: ignore[method-assign]


async def _serve(folder: Path, config: EgressConfig, loop: CheckedLoop) -> None:
    master = Master(options.Options(), event_loop=loop)
    server = proxyserver.Proxyserver()  # type: ignore[no-untyped-call]
    egress = Egress(
        config=config,
        policies=Policies(folder / "policies"),
        requests=folder / "requests",
        resolver=loop.resolver,
    )
    addons = [egress, next_layer.NextLayer(), server, disable_h2c.DisableH2C(), tlsconfig.TlsConfig(), _Ready(server)]
    master.addons.add(*addons)  # type: ignore[no-untyped-call]
    master.options.update(  # type: ignore[no-untyped-call]
        listen_host="127.0.0.1",
        listen_port=0,
        confdir=str(folder / "ca"),
        ssl_verify_upstream_trusted_ca=str(folder / "upstream-ca.pem"),
        connection_strategy="lazy",  # nothing is sent anywhere before it was allowed
        rawtcp=False,  # in a CONNECT there is TLS or HTTP, or nothing
        upstream_cert=False,
        http3=False,
    )
    await master.run()


def main(folder: Path) -> None:
    """Serve until killed."""
    handler = logging.handlers.RotatingFileHandler(folder / "proxy.log", maxBytes=_LOG_BYTES, backupCount=1)
    logging.basicConfig(level=logging.ERROR, handlers=[handler], format="%(asctime)s %(name)s: %(message)s")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    _bound_headers(Http1Server)
    _bound_headers(Http1Client)
    config = EgressConfig.model_validate_json((folder / "config.json").read_bytes())
    loop = CheckedLoop(config)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(_serve(folder, config, loop))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
