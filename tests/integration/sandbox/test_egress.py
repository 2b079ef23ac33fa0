"""The way out of a sandbox, with real parts: mitmproxy, bubblewrap, curl, git, pip. The internet is on loopback."""

import http.client
import os
import shutil
from collections.abc import Iterator

import pytest

from megatron_klong.sandbox.bubblewrap import Bubblewrap
from megatron_klong.sandbox.egress.proxy import SandboxEgress
from megatron_klong.sandbox.egress.rules import Blacklist
from tests.integration.sandbox.egress_parts import AUTHORITY_NAME, inside, python_inside, status
from tests.integration.sandbox.egress_world import FORBIDDEN, World, running_world

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
    egress: SandboxEgress, world: World, arguments: str
) -> None:
    assert status(egress, arguments) == "403"
    assert [seen for seen in world.internet.seen if "repo" in seen.lower() and "redirect" not in seen] == []
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


def test_addresses_are_refused_in_every_spelling(egress: SandboxEgress, world: World) -> None:
    spellings = ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "0"]
    spellings += ["8.8.8.8", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "[fd00::1]"]
    targets = [f"{spelling}:443" for spelling in spellings] + [f"127.0.0.1:{world.internet.plain}"]
    found = connect_statuses(egress, targets)
    assert found.keys() == set(targets)
    assert set(found.values()) <= {"403", "400"}
    assert status(egress, f"--noproxy '' http://127.0.0.1:{world.internet.plain}/") == "403"
    assert world.internet.seen == []


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


def test_each_sandbox_has_its_own_rules(egress: SandboxEgress, world: World) -> None:
    other = world.loop.run(
        world.proxy.open(Blacklist.parse("https://github.com/owner/other\nindex.example.org"), "other")
    )
    try:
        wanted = ["https://github.com/owner/repo", "https://github.com/owner/other", "https://index.example.org/"]
        assert [status(egress, url) for url in wanted] == ["403", "200", "200"]
        assert [status(other, url) for url in wanted] == ["200", "403", "403"]
        assert egress.refused == 1
        assert other.counts.forbidden == 2
    finally:
        world.loop.run(other.close())


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


def test_who_is_no_sandbox_gets_nothing(world: World, egress: SandboxEgress) -> None:
    out = inside(egress, "curl -sS http://github.com/owner/other")
    assert out.startswith("origin")
    assert world.proxy.port is not None
    client = http.client.HTTPConnection("127.0.0.1", world.proxy.port, timeout=20)
    client.request("GET", "http://github.com/owner/other")
    with pytest.raises((http.client.HTTPException, OSError)):
        client.getresponse()


def test_files_are_private_but_for_the_bundle(world: World) -> None:
    open_to_all = [
        path.relative_to(world.proxy.folder).parts[0]
        for path in world.proxy.folder.rglob("*")
        if path.is_file()
        and all(part.stat().st_mode & 0o001 for part in path.parents if world.proxy.folder in (part, *part.parents))
        and path.stat().st_mode & 0o004
    ]
    assert set(open_to_all) <= {"trust", "proxy.log", "proxy.err"}
    assert os.stat(world.proxy.folder / "ca").st_mode & 0o077 == 0


def test_the_sandbox_of_episodes_has_this_network(egress: SandboxEgress, world: World) -> None:
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

    cloned, fetched, refused = world.loop.run(run())
    assert cloned == "This is owner/other.\n"
    assert fetched == "origin index.example.org/\n"
    assert refused.startswith("Refused by the rules")
    assert egress.counts.forbidden == 1
