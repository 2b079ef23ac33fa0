"""The way out of a sandbox, to whoever speaks its protocols by hand: TLS, HTTP/1, HTTP/2, websockets, raw bytes."""

import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest

from megatron_klong.sandbox.egress.proxy import SandboxEgress
from megatron_klong.sandbox.egress.rules import Blacklist
from tests.integration.sandbox.egress_parts import inside, python_inside, status
from tests.integration.sandbox.egress_world import World, running_world

for tool in ("bwrap", "nsenter", "setpriv", "curl", "git"):
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running_world() as found:
        yield found


@pytest.fixture
def egress(world: World) -> Iterator[SandboxEgress]:
    with world.sandbox() as found:
        yield found


@pytest.mark.parametrize("sent", ["SSH-2.0-OpenSSH_9.2\\r\\n", "\\x00\\x01\\x02\\x03", "EHLO x\\r\\n"])
def test_a_tunnel_carries_tls_and_nothing_else(egress: SandboxEgress, world: World, sent: str) -> None:
    program = f"""
import socket
s = socket.create_connection(("127.0.0.1", 3128))
s.sendall(b"CONNECT ssh.github.com:443 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
print(s.recv(1000).split()[1].decode())
s.sendall(b"{sent}")
s.settimeout(10)
s.shutdown(socket.SHUT_WR)
answer = b""
while data := s.recv(1000):
    answer += data
print(answer[:12].decode())
"""
    out = python_inside(egress, program)
    assert out.startswith("200\n")
    assert out[4:].strip() in ("", "HTTP/1.1 400", "HTTP/1.1 403")
    assert world.internet.seen == []


_HELLO = """
import socket, ssl
def hello(connect, name, alpn=None):
    s = socket.create_connection(("127.0.0.1", 3128), timeout=20)
    s.sendall(f"CONNECT {connect}:443 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
    assert b" 200 " in s.recv(1000)
    context = ssl._create_unverified_context()
    try:
        tls = context.wrap_socket(s, server_hostname=name)
    except OSError as error:
        return "closed"
    tls.sendall(f"GET /owner/repo HTTP/1.1\\r\\nHost: {name}\\r\\nConnection: close\\r\\n\\r\\n".encode())
    return tls.recv(1000).split()[1].decode()
"""


def test_tls_must_ask_for_the_host_of_its_tunnel(egress: SandboxEgress, world: World) -> None:
    program = f"""{_HELLO}
print(hello("index.example.org", "index.example.org"))
print(hello("index.example.org", "github.com"))
print(hello("github.com", "index.example.org"))
print(hello("index.example.org", None))
print(hello("github.com", None))
print(hello("github.com", "github.com"))
"""
    assert python_inside(egress, program).split() == ["200", "closed", "closed", "closed", "closed", "403"]
    assert world.internet.seen == ["index.example.org/owner/repo"]
    refusals = [request for request in egress.requests() if request.method == "TLS"]
    assert len(refusals) == 4
    assert {request.verdict for request in refusals} == {"refused"}


def test_a_hidden_host_name_in_tls_is_refused(egress: SandboxEgress, world: World) -> None:
    """Encrypted client hello: what stands in the open need not be the host that is asked for."""
    program = """
import os, socket
def sized(content, length): return len(content).to_bytes(length, "big") + content
def extension(kind, content): return kind.to_bytes(2, "big") + sized(content, 2)
name = b"index.example.org"
extensions = extension(0, sized(b"\\0" + sized(name, 2), 2)) + extension(10, sized(b"\\0\\x17", 2))
extensions += extension(13, sized(b"\\4\\3", 2)) + extension(11, sized(b"\\0", 1))
for more in (b"", extension(0xFE0D, b"\\0" + os.urandom(100))):
    body = b"\\3\\3" + os.urandom(32) + sized(b"", 1) + sized(b"\\xc0\\x2f\\xc0\\x2b", 2) + sized(b"\\0", 1)
    body += sized(extensions + more, 2)
    record = b"\\x16\\3\\1" + sized(b"\\1" + sized(body, 3), 2)
    s = socket.create_connection(("127.0.0.1", 3128), timeout=20)
    s.sendall(b"CONNECT index.example.org:443 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    s.recv(1000)
    s.sendall(record)
    print("answered" if s.recv(10)[:1] == b"\\x16" else "closed")
"""
    assert python_inside(egress, program).split() == ["answered", "closed"]
    free = world.loop.run(world.proxy.open(Blacklist(), "nothing to hide"))
    assert python_inside(free, program).split()[1] == "answered"
    world.loop.run(free.close())


def test_requests_inside_a_tunnel_cannot_name_another_host(egress: SandboxEgress, world: World) -> None:
    program = """
import socket, ssl
def ask(*lines):
    s = socket.create_connection(("127.0.0.1", 3128), timeout=20)
    s.sendall(b"CONNECT github.com:443 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    s.recv(1000)
    tls = ssl._create_unverified_context().wrap_socket(s, server_hostname="github.com")
    tls.sendall(("\\r\\n".join(lines) + "\\r\\n\\r\\n").encode())
    answer = tls.recv(1000).split()
    return answer[1].decode() if answer else "closed"
print(ask("GET https://api.github.com/repos/owner/repo HTTP/1.1", "Host: github.com"))
print(ask("GET /owner/other HTTP/1.1", "Host: index.example.org"))
print(ask("GET /owner/other HTTP/1.1", "Host: github.com", "Host: index.example.org"))
print(ask("CONNECT index.example.org:443 HTTP/1.1", "Host: index.example.org"))
print(ask("POST /owner/repo HTTP/1.1", "Host: github.com", "Content-Length: 9999999"))
print(ask("POST /owner/repo HTTP/1.1", "Host: github.com", "Transfer-Encoding: chunked"))
print(ask("GET /owner/other HTTP/1.1", "Host: github.com", "Content-Length: 1", "Transfer-Encoding: chunked"))
"""
    answers = python_inside(egress, program).split()
    assert answers[:3] == ["403", "403", "403"]
    assert set(answers[3:]) <= {"400", "403", "502", "closed"}
    assert world.internet.seen == []


def http2_status(egress: SandboxEgress, port: int, headers: list[tuple[str, str]]) -> str:
    """What the proxy answers to a request in HTTP/2 that comes from the sandbox's source address."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(egress.source, 0))
    with raw:
        raw.sendall(b"CONNECT github.com:443 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in raw.recv(1000)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(raw, server_hostname="github.com") as tls:
            assert tls.selected_alpn_protocol() == "h2"
            connection = h2.connection.H2Connection(h2.config.H2Configuration(validate_outbound_headers=False))
            connection.initiate_connection()
            connection.send_headers(1, [(":method", "GET"), (":scheme", "https"), *headers], end_stream=True)
            tls.sendall(connection.data_to_send())
            while data := tls.recv(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        return dict(event.headers or [])[b":status"].decode()
                tls.sendall(connection.data_to_send())
    return "closed"


def test_http2_cannot_name_two_hosts(egress: SandboxEgress, world: World) -> None:
    assert world.proxy.port is not None
    honest = (":authority", "github.com"), (":path", "/owner/other")
    assert http2_status(egress, world.proxy.port, [*honest]) == "200"
    assert http2_status(egress, world.proxy.port, [honest[0], (":path", "/owner/re%70o")]) == "403"
    assert http2_status(egress, world.proxy.port, [(":authority", "api.github.com"), honest[1]]) == "403"
    assert http2_status(egress, world.proxy.port, [*honest, ("host", "api.github.com")]) in ("400", "403", "closed")
    assert http2_status(egress, world.proxy.port, [honest[1], ("host", "api.github.com")]) in ("400", "403", "closed")
    assert world.internet.seen == ["github.com/owner/other"]


def test_websockets_obey_the_same_rules(egress: SandboxEgress) -> None:
    program = """
import socket, ssl
for path in ("/owner/other", "/owner/repo"):
    s = socket.create_connection(("127.0.0.1", 3128), timeout=20)
    s.sendall(b"CONNECT github.com:443 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    s.recv(1000)
    tls = ssl._create_unverified_context().wrap_socket(s, server_hostname="github.com")
    tls.sendall(f"GET {path} HTTP/1.1\\r\\nHost: github.com\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\nSec-WebSocket-Version: 13\\r\\n\\r\\n".encode())
    answer = tls.recv(1000).split()[1].decode()
    print(answer)
    if answer == "101":
        tls.sendall(b"\\x81\\x82\\0\\0\\0\\0hi")
        print(tls.recv(100)[2:].decode())
"""
    assert python_inside(egress, program).split() == ["101", "hi", "403"]


def test_nothing_leads_past_the_proxy(egress: SandboxEgress, world: World) -> None:
    program = f"""
import socket
def attempt(kind, address, data=None):
    s = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, kind)
    s.settimeout(3)
    try:
        s.connect(address)
        s.send(b"x")
        return "sent"
    except OSError as error:
        return error.__class__.__name__
for address in (("1.1.1.1", 80), ("127.0.0.1", {world.internet.plain}), ("10.0.0.1", 80), ("2606:4700::1111", 443)):
    print(attempt(socket.SOCK_STREAM, address))
for address in (("8.8.8.8", 53), ("2001:4860:4860::8888", 53)):
    print(attempt(socket.SOCK_DGRAM, address))
try:
    print(socket.getaddrinfo("github.com", 443))
except OSError as error:
    print("gaierror")
try:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    print("raw")
except OSError as error:
    print(error.__class__.__name__)
"""
    found = python_inside(egress, program).split()
    refused = {"OSError", "ConnectionRefusedError", "gaierror", "PermissionError", "TimeoutError"}
    assert len(found) == 8
    assert set(found) <= refused
    assert world.internet.seen == []


def test_large_bodies_pass_through_without_being_kept(egress: SandboxEgress, world: World) -> None:
    def resident_mib() -> float:
        text = Path(f"/proc/{world.proxy.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024

    status(egress, "https://github.com/large?1")
    before = resident_mib()
    out = inside(egress, "curl -sS https://github.com/large?1600 | wc -c")  # 100 MiB
    assert int(out) == 1600 * 65536
    out = inside(
        egress,
        "head -c 60000000 /dev/zero | curl -sS -H Expect: -T - -X POST -H 'Content-Length: 60000000' "
        "-H Transfer-Encoding: https://github.com/owner/other",
    )
    assert out == "received 60000000\n"
    assert resident_mib() - before < 40


def test_headers_that_do_not_end_are_cut_off(egress: SandboxEgress) -> None:
    program = """
import socket
s = socket.create_connection(("127.0.0.1", 3128), timeout=20)
sent = 0
try:
    s.sendall(b"GET http://github.com/ HTTP/1.1\\r\\nX: ")
    while sent < 1 << 28:
        sent += s.send(b"x" * 65536)
    print("all sent")
except OSError:
    print("cut off")
"""
    assert python_inside(egress, program) == "cut off\n"
    assert status(egress, "https://github.com/endless-header") == "502"
