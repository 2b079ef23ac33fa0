"""The way out of a sandbox, with real parts: mitmproxy, bubblewrap, curl, git, pip. The internet is on loopback."""

import http.client
import os
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest

from megatron_klong.sandbox.bubblewrap import Bubblewrap
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.proxy import EgressProxy, SandboxEgress
from megatron_klong.sandbox.egress.rules import Blacklist
from megatron_klong.sandbox.results import SandboxUnavailable
from tests.integration.sandbox.egress_parts import (
    AUTHORITY_NAME,
    Internet,
    Loop,
    inside,
    python_inside,
    reachable_folder,
    start_internet,
    status,
)

FORBIDDEN = "https://github.com/owner/repo"

for tool in ("bwrap", "nsenter", "setpriv", "curl", "git"):
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with reachable_folder() as found:
        yield found


@pytest.fixture(scope="module")
def internet(folder: Path) -> Internet:
    (folder / "internet").mkdir()
    return start_internet(folder / "internet")


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    found = Loop()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def proxy(folder: Path, internet: Internet, loop: Loop) -> Iterator[EgressProxy]:
    config = EgressConfig(
        mode="open",
        addresses={**internet.addresses, "service.example.org:8080": f"127.0.0.1:{internet.plain}"},
        upstream_ca=str(internet.authority),
        fetchers=("mirror.example.org",),
    )
    try:
        found = loop.run(EgressProxy.start(config, folder / "egress"))
    except SandboxUnavailable as error:
        pytest.skip(f"no proxy on this machine: {error}")
    yield found
    loop.run(found.close())


@pytest.fixture
def egress(proxy: EgressProxy, loop: Loop, internet: Internet) -> Iterator[SandboxEgress]:
    """A sandbox whose task forbids one repository."""
    found = loop.run(proxy.open(Blacklist.parse(FORBIDDEN), "test"))
    internet.seen.clear()
    yield found
    loop.run(found.close())


def connect_statuses(egress: SandboxEgress, targets: list[str]) -> dict[str, str]:
    """What the proxy answers to a CONNECT, spelled exactly so."""
    script = """for target in "$@"; do exec 3<>/dev/tcp/127.0.0.1/3128
    printf 'CONNECT %s HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' "$target" >&3; read -r -t 20 _ code _ <&3
    echo "$target $code"; exec 3>&-; done"""
    quoted = " ".join(f"'{target}'" for target in targets)
    out = inside(egress, f"f() {{ {script}; }}; f {quoted}")
    return dict(line.rsplit(" ", 1) for line in out.splitlines())


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_other_repositories_of_a_host_with_rules_are_reached(egress: SandboxEgress, scheme: str) -> None:
    assert inside(egress, f"curl -sS {scheme}://github.com/owner/other") == "origin github.com/owner/other\n"
    assert egress.refused == 0


@pytest.mark.parametrize(
    "arguments",
    [
        "https://github.com/owner/repo",
        "http://github.com/owner/repo",
        "https://github.com/owner/repo/tree/main",
        "'https://github.com/owner/repo.git/info/refs?service=git-upload-pack'",
        "https://GitHub.COM/OWNER/Repo",
        "https://github.com/owner/%72epo",
        "https://github.com/owner/%2572epo",
        "--path-as-is https://github.com/x/../owner/repo",
        "--path-as-is https://github.com/owner/./repo",
        "https://github.com//owner//repo",
        "'https://github.com/owner/repo;v=1/x'",
        "https://github.com./owner/repo",
        "https://www.github.com/owner/repo",
        "https://user:password@github.com/owner/repo",
        "https://github.com:443/owner/repo",
        "http://github.com:80/owner/repo",
        "--proxytunnel http://github.com/owner/repo",
        "--http1.0 https://github.com/owner/repo",
        "--http2 https://github.com/owner/repo",
        "-I https://github.com/owner/repo",
        "-d body https://github.com/owner/repo",
        "-H 'Host: index.example.org' https://github.com/owner/repo",
        "-H 'Host: github.com' http://index.example.org/owner/repo",
        "-H 'Host: github.com' https://github.com/owner/repo",
        "https://api.github.com/repos/owner/repo/contents",
        "https://raw.githubusercontent.com/owner/repo/main/README.md",
        "https://codeload.github.com/owner/repo/zip/main",
        "https://cdn.jsdelivr.net/gh/owner/repo@main/README.md",
        "https://web.archive.org/web/2024/https://github.com/owner/repo",
        "'https://mirror.example.org/get?url=https%3A%2F%2Fgithub.com%2Fowner%2Frepo'",
        "'http://index.example.org/any/https://github.com/owner/repo'",
        "-L 'https://index.example.org/redirect?to=https://github.com/owner/repo'",
        "-L 'http://index.example.org/redirect?to=https://GITHUB.com/owner/%72epo'",
    ],
)
def test_a_forbidden_repository_is_refused_however_it_is_asked_for(
    egress: SandboxEgress, internet: Internet, arguments: str
) -> None:
    assert status(egress, arguments) == "403"
    assert [seen for seen in internet.seen if "repo" in seen.lower() and "redirect" not in seen] == []
    assert egress.refused >= 1
    last = egress.requests()[-1]
    assert last.verdict == "refused"
    assert last.rule == FORBIDDEN or "Host header" in last.reason


def test_a_refusal_says_why(egress: SandboxEgress) -> None:
    out = inside(egress, "curl -s https://github.com/owner/repo")
    assert out == "Refused by the rules of the sandbox's network: the task's blacklist forbids " + FORBIDDEN + "\n"


def test_git_clones_what_is_allowed_and_nothing_else(egress: SandboxEgress) -> None:
    out = inside(egress, "git clone -q https://github.com/owner/other && cat other/README.md")
    assert out == "This is owner/other.\n"
    for command in [
        "git clone https://github.com/owner/repo",
        "git clone --depth 1 http://github.com/OWNER/repo.git x",
        "git ls-remote https://github.com/owner/other/../repo",
        "git -c url.https://github.com/.insteadOf=gh: clone gh:owner/repo",
        "git -C other submodule add https://github.com/owner/repo",
    ]:
        out = inside(
            egress, f"git clone -q https://github.com/owner/other; {command} || echo failed; find . -name README.md"
        )
        assert "error: 403" in out
        assert "failed" in out
        assert out.count("README.md") == 1
    assert {request.rule for request in egress.requests() if request.verdict == "refused"} == {FORBIDDEN}


@pytest.mark.parametrize("url", ["git@github.com:owner/repo.git", "ssh://git@ssh.github.com:443/owner/repo"])
def test_git_over_ssh_finds_no_network(egress: SandboxEgress, url: str) -> None:
    out = inside(egress, f"git clone {url} || echo failed")
    assert "failed" in out
    assert "Could not resolve" in out or "No user exists" in out or "cannot run ssh" in out


def test_git_protocol_finds_no_network(egress: SandboxEgress) -> None:
    assert "failed" in inside(egress, "git clone git://github.com/owner/repo || echo failed")


def test_pip_installs_from_an_index(egress: SandboxEgress) -> None:
    if inside(egress, "python3 -m pip --version >/dev/null 2>&1 && echo there") != "there\n":
        pytest.skip("the system's Python has no pip")
    install = "python3 -m pip install -q --no-cache-dir --disable-pip-version-check --target /tmp/x"
    out = inside(
        egress,
        f"{install} --index-url https://index.example.org/simple klongtest; cd /tmp/x; "
        "python3 -c 'import klongtest; print(klongtest.NAME)'",
    )
    assert out == "klongtest\n"
    out = inside(egress, f"{install} git+https://github.com/owner/repo || echo failed")
    assert "failed" in out
    assert egress.requests()[-1].rule == FORBIDDEN


def test_python_programs_find_proxy_and_certificates(egress: SandboxEgress) -> None:
    program = """
import urllib.request, urllib.error
for url in ("https://index.example.org/a", "https://github.com/owner/other", "https://github.com/owner/repo"):
    try:
        print(urllib.request.urlopen(url).read().decode().strip())
    except urllib.error.HTTPError as error:
        print(error.code)
try:
    from pip._vendor import requests
    print(requests.get("https://github.com/owner/other").status_code, requests.get("https://index.example.org").status_code)
    print(requests.get("https://github.com/owner/repo").status_code)
except ImportError:
    print("200 200\\n403")
"""
    expected = "origin index.example.org/a\norigin github.com/owner/other\n403\n200 200\n403\n"
    assert python_inside(egress, program) == expected


def test_only_hosts_with_path_rules_are_opened(egress: SandboxEgress) -> None:
    """A tunnel that is not opened shows the origin's own certificate."""

    def issuer(url: str) -> str:
        out = inside(egress, f"curl -sv {url} 2>&1 | grep 'issuer:'")
        return out.strip()

    assert AUTHORITY_NAME in issuer("https://index.example.org")
    assert "mitmproxy" in issuer("https://github.com/owner/other")
    paths = {request.host: request.path for request in egress.requests()}
    assert paths == {"index.example.org": None, "github.com": "/owner/other"}


def test_programs_that_know_no_variables_trust_the_systems_bundle(egress: SandboxEgress) -> None:
    keep = "env -u SSL_CERT_FILE -u CURL_CA_BUNDLE"
    assert inside(egress, f"{keep} curl -sS https://github.com/owner/other") == "origin github.com/owner/other\n"


def test_addresses_are_refused_in_every_spelling(egress: SandboxEgress, internet: Internet) -> None:
    spellings = ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "0"]
    spellings += ["8.8.8.8", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "[fd00::1]"]
    targets = [f"{spelling}:443" for spelling in spellings] + [f"127.0.0.1:{internet.plain}"]
    found = connect_statuses(egress, targets)
    assert found.keys() == set(targets)
    assert set(found.values()) <= {"403", "400"}
    assert status(egress, f"--noproxy '' http://127.0.0.1:{internet.plain}/") == "403"
    assert internet.seen == []


def test_names_that_are_not_public_are_refused(egress: SandboxEgress) -> None:
    targets = ["localhost:443", "localhost:80", "printer:443", "a..b:443", "-:443"]
    assert set(connect_statuses(egress, targets).values()) <= {"403", "400"}


def test_other_ports_are_refused(egress: SandboxEgress) -> None:
    targets = [f"github.com:{port}" for port in (22, 25, 53, 8080, 8443, 9418, 65535)] + ["ssh.github.com:22"]
    assert set(connect_statuses(egress, targets).values()) == {"403"}
    assert status(egress, "http://github.com:8080/owner/other") == "403"
    assert status(egress, "http://github.com:443/owner/other") == "403"


def test_a_service_of_the_configuration_may_have_another_port(egress: SandboxEgress) -> None:
    assert status(egress, "http://service.example.org:8080/x") == "200"
    assert status(egress, "http://service.example.org:8081/x") == "403"


@pytest.mark.parametrize("sent", ["SSH-2.0-OpenSSH_9.2\\r\\n", "\\x00\\x01\\x02\\x03", "EHLO x\\r\\n"])
def test_a_tunnel_carries_tls_and_nothing_else(egress: SandboxEgress, internet: Internet, sent: str) -> None:
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
    assert internet.seen == []


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


def test_tls_must_ask_for_the_host_of_its_tunnel(egress: SandboxEgress, internet: Internet) -> None:
    program = f"""{_HELLO}
print(hello("index.example.org", "index.example.org"))
print(hello("index.example.org", "github.com"))
print(hello("github.com", "index.example.org"))
print(hello("index.example.org", None))
print(hello("github.com", None))
print(hello("github.com", "github.com"))
"""
    assert python_inside(egress, program).split() == ["200", "closed", "closed", "closed", "closed", "403"]
    assert internet.seen == ["index.example.org/owner/repo"]
    refusals = [request for request in egress.requests() if request.method == "TLS"]
    assert len(refusals) == 4
    assert {request.verdict for request in refusals} == {"refused"}


def test_a_hidden_host_name_in_tls_is_refused(egress: SandboxEgress, loop: Loop, proxy: EgressProxy) -> None:
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
    free = loop.run(proxy.open(Blacklist(), "nothing to hide"))
    assert python_inside(free, program).split()[1] == "answered"
    loop.run(free.close())


def test_requests_inside_a_tunnel_cannot_name_another_host(egress: SandboxEgress, internet: Internet) -> None:
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
    assert internet.seen == []


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


def test_http2_cannot_name_two_hosts(egress: SandboxEgress, proxy: EgressProxy, internet: Internet) -> None:
    assert proxy.port is not None
    honest = (":authority", "github.com"), (":path", "/owner/other")
    assert http2_status(egress, proxy.port, [*honest]) == "200"
    assert http2_status(egress, proxy.port, [honest[0], (":path", "/owner/re%70o")]) == "403"
    assert http2_status(egress, proxy.port, [(":authority", "api.github.com"), honest[1]]) == "403"
    assert http2_status(egress, proxy.port, [*honest, ("host", "api.github.com")]) in ("400", "403", "closed")
    assert http2_status(egress, proxy.port, [honest[1], ("host", "api.github.com")]) in ("400", "403", "closed")
    assert internet.seen == ["github.com/owner/other"]


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


def test_nothing_leads_past_the_proxy(egress: SandboxEgress, internet: Internet) -> None:
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
for address in (("1.1.1.1", 80), ("127.0.0.1", {internet.plain}), ("10.0.0.1", 80), ("2606:4700::1111", 443)):
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
    assert internet.seen == []


def test_each_sandbox_has_its_own_rules(egress: SandboxEgress, proxy: EgressProxy, loop: Loop) -> None:
    other = loop.run(proxy.open(Blacklist.parse("https://github.com/owner/other\nindex.example.org"), "other"))
    try:
        wanted = ["https://github.com/owner/repo", "https://github.com/owner/other", "https://index.example.org/"]
        assert [status(egress, url) for url in wanted] == ["403", "200", "200"]
        assert [status(other, url) for url in wanted] == ["200", "403", "403"]
        assert egress.refused == 1
        assert other.counts.forbidden == 2
    finally:
        loop.run(other.close())


def test_every_request_is_written_down(egress: SandboxEgress) -> None:
    for arguments in ("https://index.example.org/a", "'http://github.com/owner/repo?x=1'", "https://8.8.8.8/"):
        status(egress, arguments)
    found = [(request.method, request.host, request.port, request.path) for request in egress.requests()]
    assert found == [
        ("CONNECT", "index.example.org", 443, None),
        ("GET", "github.com", 80, "/owner/repo?x=1"),
        ("CONNECT", "8.8.8.8", 443, None),
    ]
    assert [request.verdict for request in egress.requests()] == ["allowed", "refused", "refused"]
    assert [request.rule for request in egress.requests()] == [None, FORBIDDEN, None]
    assert (egress.counts.allowed, egress.counts.refused, egress.counts.forbidden) == (1, 2, 1)


def test_large_bodies_pass_through_without_being_kept(egress: SandboxEgress, proxy: EgressProxy) -> None:
    def resident_mib() -> float:
        text = Path(f"/proc/{proxy.pid}/status").read_text()
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


def test_who_is_no_sandbox_gets_nothing(proxy: EgressProxy, egress: SandboxEgress) -> None:
    out = inside(egress, "curl -sS http://github.com/owner/other")
    assert out.startswith("origin")
    assert proxy.port is not None
    client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    client.request("GET", "http://github.com/owner/other")
    with pytest.raises((http.client.HTTPException, OSError)):
        client.getresponse()


def test_files_are_private_but_for_the_bundle(proxy: EgressProxy) -> None:
    open_to_all = [
        path.relative_to(proxy.folder).parts[0]
        for path in proxy.folder.rglob("*")
        if path.is_file()
        and all(part.stat().st_mode & 0o001 for part in path.parents if proxy.folder in (part, *part.parents))
        and path.stat().st_mode & 0o004
    ]
    assert set(open_to_all) <= {"trust", "proxy.log", "proxy.err"}
    assert os.stat(proxy.folder / "ca").st_mode & 0o077 == 0


def test_the_sandbox_of_episodes_has_this_network(egress: SandboxEgress, loop: Loop) -> None:
    """`Bubblewrap` itself: network, variables and files fit, and commands share the network."""

    async def run() -> list[str]:
        async with await Bubblewrap.create(
            network=egress.network, environment=egress.environment, read_only_files=egress.files
        ) as sandbox:
            clone = ["git", "clone", "-q", "https://github.com/owner/other"]
            assert (await sandbox.run(clone, timeout_seconds=60)).returncode == 0
            scripts = [
                "cat other/README.md",
                "curl -sS https://index.example.org/",
                "curl -sS https://github.com/owner/repo",
            ]
            return [(await sandbox.run(["bash", "-c", script])).stdout.decode() for script in scripts]

    cloned, fetched, refused = loop.run(run())
    assert cloned == "This is owner/other.\n"
    assert fetched == "origin index.example.org/\n"
    assert refused.startswith("Refused by the rules")
    assert egress.counts.forbidden == 1
