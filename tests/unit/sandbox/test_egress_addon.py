"""The addon when something goes wrong in itself: mitmproxy logs an exception of a hook and goes on, so each refuses."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mitmproxy.connection import Server
from mitmproxy.http import Headers
from mitmproxy.test import tflow

from megatron_klong.sandbox.egress.addon import Egress
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.records import EgressRequest, Policies, RequestLog, read_requests
from megatron_klong.sandbox.egress.resolving import AddressInfo, Resolver
from megatron_klong.sandbox.egress.rules import Blacklist

SOURCE = "127.64.0.1"


async def broken(host: str, port: int) -> list[AddressInfo]:
    raise ZeroDivisionError


@pytest.fixture
def egress(tmp_path: Path) -> Egress:
    config = EgressConfig(mode="open")
    policies = Policies(tmp_path)
    policies.write(SOURCE, Blacklist(["owner/repo"]))
    return Egress(config=config, policies=policies, requests=tmp_path, resolver=Resolver(config, broken))


def flow_to(host: str, *, known_to: Egress | None = None) -> Any:
    flow = tflow.tflow()
    flow.request.host, flow.request.port = host, 80
    flow.client_conn.peername = (SOURCE, 1)
    flow.client_conn.error = None
    if known_to is not None:
        known_to.client_connected(flow.client_conn)
        assert flow.client_conn.error is None
    return flow


def test_a_check_that_fails_refuses(egress: Egress, tmp_path: Path) -> None:
    for hook in (egress.http_connect, egress.requestheaders):
        flow = flow_to("example.org", known_to=egress)
        asyncio.run(hook(flow))
        assert flow.response is not None
        assert flow.response.status_code == 403
    assert [found.reason for found in read_requests(tmp_path / f"{SOURCE}.jsonl")] == [
        "the check of this request failed"
    ] * 2


def test_a_log_that_cannot_be_written_changes_no_verdict(egress: Egress, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RequestLog, request: EgressRequest) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RequestLog, "add", full)
    flow = flow_to("github.com", known_to=egress)
    flow.request.path = "/owner/repo"
    asyncio.run(egress.requestheaders(flow))
    assert flow.response.status_code == 403
    server, hello = Server(address=("example.org", 443)), SimpleNamespace(sni="example.com", extensions=[])
    data = SimpleNamespace(
        context=SimpleNamespace(client=flow.client_conn, server=server), client_hello=hello, ignore_connection=False
    )
    egress.tls_clienthello(data)  # type: ignore[arg-type]
    assert server.error is not None


@pytest.mark.parametrize(
    ("method", "header", "refused"),
    [
        ("POST", (), True),
        ("GET", (b"content-length", b"9"), True),
        ("GET", (b"transfer-encoding", b"chunked"), True),
        ("GET", (b"content-length", b"0"), False),
        ("HEAD", (), False),
    ],
)
def test_what_could_tell_a_fetcher_its_url_in_a_body_is_refused(
    egress: Egress, tmp_path: Path, method: str, header: tuple[bytes, bytes] | tuple[()], refused: bool
) -> None:
    flow = flow_to("r.jina.ai", known_to=egress)
    flow.request.method, flow.request.headers = method, Headers([header] if header else [])
    asyncio.run(egress.requestheaders(flow))
    [found] = read_requests(tmp_path / f"{SOURCE}.jsonl")
    assert ("a body" in found.reason) is refused  # else it is the resolver that fails


def test_an_unknown_client_gets_nothing_from_any_hook(egress: Egress) -> None:
    for hook in (egress.http_connect, egress.requestheaders):
        flow = flow_to("example.org")
        asyncio.run(hook(flow))
        assert flow.error is not None
    server = Server(address=("example.org", 443))
    with pytest.raises(KeyError):
        asyncio.run(egress.server_connect(SimpleNamespace(client=flow.client_conn, server=server)))  # type: ignore[arg-type]
    assert server.error is not None
    server = Server(address=("example.org", 443))
    hello = SimpleNamespace(context=SimpleNamespace(client=flow.client_conn, server=server), ignore_connection=False)
    with pytest.raises(KeyError):
        egress.tls_clienthello(hello)  # type: ignore[arg-type]
    assert hello.ignore_connection
    assert server.error is not None


def test_a_client_whose_policy_cannot_be_read_is_dropped(egress: Egress, tmp_path: Path) -> None:
    (tmp_path / f"{SOURCE}.json").write_text("{")
    flow = flow_to("example.org")
    with pytest.raises(ValueError, match="Expecting"):
        egress.client_connected(flow.client_conn)
    assert flow.client_conn.error is not None


def test_the_last_gate_knows_the_same_rules(egress: Egress) -> None:
    client = flow_to("x", known_to=egress).client_conn
    for address, allowed in [
        (("example.org", 443), True),
        (("example.org", 22), False),
        (("127.0.0.1", 80), False),
        (("localhost", 80), False),
    ]:
        server = Server(address=address)
        asyncio.run(egress.server_connect(SimpleNamespace(client=client, server=server)))  # type: ignore[arg-type]
        assert (server.error is None) is allowed


def test_files_are_open_while_a_check_runs_though_its_client_is_gone(egress: Egress, tmp_path: Path) -> None:
    async def main() -> None:
        asked = asyncio.Event()

        async def slow(host: str, port: int) -> list[AddressInfo]:
            await asked.wait()
            raise ZeroDivisionError

        egress._resolver = Resolver(EgressConfig(mode="open"), slow)
        flow = flow_to("example.org", known_to=egress)
        deciding = asyncio.create_task(egress.requestheaders(flow))
        await asyncio.sleep(0)
        egress.client_disconnected(flow.client_conn)
        again = flow_to("x", known_to=egress).client_conn
        egress.client_disconnected(again)
        assert SOURCE in egress._logs
        asked.set()
        await deciding
        assert egress._logs == {}

    asyncio.run(main())
    assert len(read_requests(tmp_path / f"{SOURCE}.jsonl")) == 1


def test_files_are_closed_with_the_last_connection(egress: Egress) -> None:
    first, second = (flow_to("x", known_to=egress).client_conn for _ in range(2))
    egress.client_disconnected(first)
    assert SOURCE in egress._logs
    egress.client_disconnected(second)
    assert egress._logs == {}
