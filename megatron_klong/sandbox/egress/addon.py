"""The rules, as mitmproxy asks for them: at each step of a connection, whether it may go on.

A client is a sandbox, known by its source address. In the order in which mitmproxy calls:

    client_connected   is this a sandbox that we know?
    http_connect       host, port, mode, blacklist's hosts, public address
    tls_clienthello    the certificate asked for must be the CONNECT's host; TLS is opened only where paths decide
    requestheaders     host, port, mode, blacklist's paths, public address: plain HTTP, and HTTPS that was opened
    server_connect     once more, whatever led here, before a connection is made

Always (tests/integration/sandbox/test_egress.py): what is not allowed in so many words is refused, also when a check
itself fails: mitmproxy would log the exception and go on. Each request is one record of its sandbox's log. Bodies
pass through in pieces and are never kept.

Not seen, since TLS stays closed where no path decides: what an allowed host does for its client. In mode open an
unknown mirror or tunnelling service is reached as any other host, and a front that serves several hosts may be asked
for another inside the tunnel. Mode listed is for whoever must exclude that.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from mitmproxy import connection, http, tcp, tls
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from megatron_klong.sandbox.egress.config import HTTP_PORT, HTTPS_PORT, EgressConfig
from megatron_klong.sandbox.egress.records import EgressRequest, Outcome, Policies, RequestLog
from megatron_klong.sandbox.egress.resolving import AddressRefused, Resolver
from megatron_klong.sandbox.egress.rules import ALLOWED, Blacklist, Verdict
from megatron_klong.sandbox.egress.urls import is_ip_literal, normal_host

logger = logging.getLogger(__name__)

_REFUSED = "refused: "  # before the reason, where only mitmproxy's error text can carry it
_SMALL_BODY = 65536
_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")
_ENCRYPTED_CLIENT_HELLO = 0xFE0D
_CHECK_FAILED = Verdict(allowed=False, reason="the check of this request failed")


class _Unreachable(OSError):
    """An allowed host that cannot be reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Client:
    """A connection from a sandbox."""

    source: str
    blacklist: Blacklist
    log: RequestLog


class Egress:
    """The addon."""

    def __init__(self, *, config: EgressConfig, policies: Policies, requests: Path, resolver: Resolver) -> None:
        self._config = config
        self._policies = policies
        self._requests = requests
        self._resolver = resolver
        self._clients: dict[str, _Client] = {}  # by mitmproxy's id of the connection
        self._logs: dict[str, RequestLog] = {}  # by source address

    def client_connected(self, client: connection.Client) -> None:
        """Mitmproxy drops a client that has an error."""
        client.error = "the check of the client failed"
        source = client.peername[0]
        blacklist = self._policies.find(source, fetchers=self._config.fetchers)
        if blacklist is None:
            client.error = "unknown client"
            return
        if source not in self._logs:
            limit_bytes = int(self._config.log_mib * 2**20)
            self._logs[source] = RequestLog(self._requests / f"{source}.jsonl", limit_bytes=limit_bytes)
        self._logs[source].users += 1
        self._clients[client.id] = _Client(source=source, blacklist=blacklist, log=self._logs[source])
        client.error = None

    def client_disconnected(self, client: connection.Client) -> None:
        gone = self._clients.pop(client.id, None)
        if gone is not None:
            self._release(gone)

    async def http_connect(self, flow: http.HTTPFlow) -> None:
        await self._decide(flow, self._check_connect)

    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        await self._decide(flow, self._check_request)
        if flow.response is None:
            flow.request.stream = True

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is not None:
            flow.response.stream = True

    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        """Let the bytes pass, open them, or (by an error of the server that they would go to) refuse them."""
        data.ignore_connection = True
        data.context.server.error = f"{_REFUSED}{_CHECK_FAILED.reason}"
        client = self._clients[data.context.client.id]
        address = data.context.server.address
        host = normal_host(address[0]) if address else None
        sni = normal_host(data.client_hello.sni or "")
        reason = ""
        if host is None:
            reason = "TLS to the proxy itself is not offered"
        elif sni != host:
            reason = f"TLS asks for {sni or 'no host'}, not for the host of the CONNECT"
        elif client.blacklist and any(kind == _ENCRYPTED_CLIENT_HELLO for kind, _ in data.client_hello.extensions):
            reason = "TLS hides the host it asks for (encrypted client hello)"
        if reason:
            data.context.server.error = f"{_REFUSED}{reason}"
            self._record(client, address or ("", 0), "TLS", Verdict(allowed=False, reason=reason))
            return
        assert host is not None, "else there is a reason"
        data.context.server.error = None
        data.ignore_connection = not client.blacklist.opens(host)

    async def server_connect(self, data: ServerConnectionHookData) -> None:
        """The last gate. Names that are not public fail after it, in the event loop (resolving.py)."""
        if data.server.error is not None:
            return
        data.server.error = f"{_REFUSED}{_CHECK_FAILED.reason}"
        assert data.server.address is not None, "mitmproxy has just asked for a connection to it"
        host, port = data.server.address[:2]
        verdict = self._check_target(self._clients[data.client.id], host, port, (HTTP_PORT, HTTPS_PORT))
        data.server.error = None if verdict.allowed else f"{_REFUSED}{verdict.reason}"

    def server_connect_error(self, data: ServerConnectionHookData) -> None:
        client = self._clients.get(data.client.id)
        error = data.server.error or ""
        if client is not None and not error.startswith(_REFUSED):
            self._record(client, data.server.address or ("", 0), "TCP", ALLOWED, failure=error)

    def tcp_start(self, flow: tcp.TCPFlow) -> None:
        """Bytes of no known protocol; `rawtcp` is off, so nothing should come here."""
        flow.kill()  # type: ignore[no-untyped-call]

    async def _decide(self, flow: http.HTTPFlow, check: Callable[[_Client, http.Request], Awaitable[Verdict]]) -> None:
        """Answer the request unless it may go on, then record the verdict: it holds whatever becomes of the log."""
        client = self._clients.get(flow.client_conn.id)
        if client is None:
            flow.kill()  # type: ignore[no-untyped-call]
            return
        request = flow.request
        failure = ""
        client.log.users += 1  # the client may be gone before the check is done
        try:
            try:
                verdict = await check(client, request)
            except _Unreachable as error:
                verdict, failure = ALLOWED, str(error)
            except Exception:  # whatever it is, mitmproxy would let the request pass
                logger.exception("a check failed")
                verdict = _CHECK_FAILED
            if failure:
                _answer(flow, 502, f"The sandbox's network cannot reach it: {failure}\n")
            elif not verdict.allowed:
                _answer(flow, 403, f"Refused by the rules of the sandbox's network: {verdict.reason}\n")
            path = None if request.method == "CONNECT" else request.path
            self._record(client, (request.host, request.port), request.method, verdict, path=path, failure=failure)
        finally:
            self._release(client)

    def _release(self, client: _Client) -> None:
        client.log.users -= 1
        if not client.log.users:
            self._logs.pop(client.source).close()

    async def _check_connect(self, client: _Client, request: http.Request) -> Verdict:
        verdict = self._check_target(client, request.host, request.port, (HTTP_PORT, HTTPS_PORT))
        return await self._check_address(client, request) if verdict.allowed else verdict

    async def _check_request(self, client: _Client, request: http.Request) -> Verdict:
        port = HTTPS_PORT if request.scheme == "https" else HTTP_PORT
        verdict = self._check_target(client, request.host, request.port, (port,))
        if not verdict.allowed:
            return verdict
        host = normal_host(request.host)
        for claimed in (request.authority, *request.headers.get_all("host")):  # HTTP/2 may have both
            if claimed and normal_host(claimed) != host:
                return Verdict(allowed=False, reason=f"its Host header names another host, {claimed[:100]!r}")
        path, _, query = request.path.partition("?")
        verdict = client.blacklist.verdict(request.host, path, query, body=_may_have_body(request))
        return await self._check_address(client, request) if verdict.allowed else verdict

    def _check_target(self, client: _Client, name: str, port: int, ports: tuple[int, ...]) -> Verdict:
        host = normal_host(name)
        if host is None:
            return Verdict(allowed=False, reason=f"{name[:100]!r} is not the name of a host")
        if is_ip_literal(host):
            return Verdict(allowed=False, reason="an IP address; only names of hosts are allowed")
        configured = self._config.address(host, port) is not None
        if port not in ports and (port in (HTTP_PORT, HTTPS_PORT) or not configured):
            return Verdict(allowed=False, reason=f"port {port}; only HTTP on 80 and HTTPS on 443 are allowed")
        if "." not in host and not configured:
            return Verdict(allowed=False, reason=f"{host} is not the name of a public host")
        if not self._config.allows(host):
            return Verdict(allowed=False, reason=f"{host} is not among the hosts that are allowed")
        return client.blacklist.host_verdict(host)

    async def _check_address(self, client: _Client, request: http.Request) -> Verdict:
        """Early, for an answer that says why; the connection itself asks the same resolver."""
        try:
            await self._resolver.resolve(request.host, request.port, source=client.source)
        except AddressRefused as error:
            return Verdict(allowed=False, reason=str(error))
        except OSError as error:
            raise _Unreachable(
                f"{request.host}: {error.strerror or str(error) or 'its name was not found in time'}"
            ) from error
        return ALLOWED

    def _record(
        self,
        client: _Client,
        address: connection.Address,
        method: str,
        verdict: Verdict,
        *,
        path: str | None = None,
        failure: str = "",
    ) -> None:
        """Write a request down. That it cannot be is no reason to break off in the middle of a hook."""
        outcome: Outcome = "failed" if failure else "allowed" if verdict.allowed else "refused"
        found = EgressRequest(
            time_seconds=time.time(),
            method=method,
            host=address[0],
            port=address[1],
            path=path,
            verdict=outcome,
            rule=verdict.rule,
            reason=failure or verdict.reason,
        )
        try:
            client.log.add(found)
        except OSError:
            logger.exception("a request cannot be written down")


def _may_have_body(request: http.Request) -> bool:
    headers = request.headers
    declared = headers.get("content-length", "0").strip() != "0" or "transfer-encoding" in headers
    return declared or request.method not in _WITHOUT_BODY


def _answer(flow: http.HTTPFlow, status: int, text: str) -> None:
    """Answer in the server's place; a request with a large body is cut off, for mitmproxy would first collect it."""
    headers = flow.request.headers
    length = headers.get("content-length", "0")
    no_body = "content-length" not in headers and (flow.request.is_http11 or flow.request.method in ("GET", "HEAD"))
    small = no_body or (length.isdecimal() and int(length) <= _SMALL_BODY)
    if "transfer-encoding" in headers or not small:
        flow.kill()  # type: ignore[no-untyped-call]
        return
    flow.response = http.Response.make(status, text, {"content-type": "text/plain", "connection": "close"})
