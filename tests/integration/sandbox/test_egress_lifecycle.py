"""The proxy of sandboxes from its start to its end, whoever is killed when; and its modes and bounds."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_klong.sandbox.egress import proxy as proxy_module
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.proxy import EgressProxy, SandboxEgress
from megatron_klong.sandbox.egress.rules import Blacklist
from megatron_klong.sandbox.results import SandboxUnavailable
from tests.conftest import REPOSITORY
from tests.integration.sandbox.egress_parts import (
    Internet,
    Loop,
    inside,
    reachable_folder,
    runner_command,
    runs,
    sandbox_command,
    soon,
    start_internet,
    status,
)

for tool in ("bwrap", "nsenter", "setpriv", "curl", "git"):
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine", allow_module_level=True)

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


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
    """Mode listed, with narrow bounds."""
    hosts = ("index.example.org", "github.com")
    config = EgressConfig(
        mode="listed",
        allow=hosts,
        addresses={name: target for name, target in internet.addresses.items() if name.partition(":")[0] in hosts},
        upstream_ca=str(internet.authority),
        connections=2,
        log_mib=0.001,
    )
    found = loop.run(EgressProxy.start(config, folder / "egress"))
    yield found
    loop.run(found.close())


@pytest.fixture
def egress(proxy: EgressProxy, loop: Loop) -> Iterator[SandboxEgress]:
    found = loop.run(proxy.open(Blacklist.parse("owner/repo"), "test"))
    yield found
    loop.run(found.close())


def test_listed_mode_reaches_listed_hosts_and_the_blacklist_still_holds(egress: SandboxEgress) -> None:
    assert status(egress, "https://index.example.org/simple/") == "200"
    assert status(egress, "https://github.com/owner/other") == "200"
    assert status(egress, "https://github.com/owner/repo") == "403"
    assert status(egress, "https://files.example.org/") == "403"
    assert "example.com is not among the hosts that are allowed" in inside(egress, "curl -s http://example.com/")


def test_a_full_log_still_counts(egress: SandboxEgress, proxy: EgressProxy) -> None:
    urls = " ".join(f"http://example.com/{number}" for number in range(30))
    inside(egress, f"curl -s {urls}")
    assert egress.refused == 30
    assert egress.counts.unlogged == 30 - len(egress.requests()) > 0
    assert (proxy.folder / "requests" / f"{egress.source}.jsonl").stat().st_size <= 0.001 * 2**20


def test_connections_beyond_the_bound_wait_for_a_free_place(egress: SandboxEgress) -> None:
    script = """exec 3<>/dev/tcp/127.0.0.1/3128 4<>/dev/tcp/127.0.0.1/3128
    curl -s -m 2 http://index.example.org/ || echo waits
    exec 3>&-
    curl -s -m 20 http://index.example.org/"""
    assert inside(egress, script) == "waits\norigin index.example.org/\n"


def test_nothing_is_left_of_a_closed_sandbox(proxy: EgressProxy, loop: Loop) -> None:
    egress = loop.run(proxy.open(Blacklist(), "closed"))
    script = "curl -s http://index.example.org/; read _; curl -s -m 5 http://index.example.org/ || echo unreachable"
    left = subprocess.Popen(sandbox_command(egress, script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert left.stdout is not None
    assert left.stdout.readline() == "origin index.example.org/\n"
    loop.run(egress.close())
    loop.run(egress.close())
    assert left.communicate("\n", timeout=20)[0] == "unreachable\n"
    assert not (proxy.folder / "policies" / f"{egress.source}.json").exists()
    assert [request.host for request in egress.requests()] == ["index.example.org"]
    with pytest.raises(RuntimeError, match="closed"):
        egress.network.enter()


def test_closing_cuts_what_is_being_sent(proxy: EgressProxy, loop: Loop) -> None:
    egress = loop.run(proxy.open(Blacklist(), "cut"))
    command = sandbox_command(egress, "curl -sS --limit-rate 200k http://index.example.org/large?1000; echo $?")
    left = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert left.stdout is not None
    assert len(left.stdout.read(65536)) == 65536
    loop.run(egress.close())
    assert left.communicate(timeout=20)[0].endswith(b"18\n")  # curl's "partial file"


def test_source_addresses_are_never_used_twice(proxy: EgressProxy, loop: Loop) -> None:
    sources = set()
    for _ in range(3):
        egress = loop.run(proxy.open(Blacklist(), "again"))
        sources.add(egress.source)
        loop.run(egress.close())
    assert len(sources) == 3


def test_a_killed_proxy_lets_nothing_pass_and_comes_back(
    proxy: EgressProxy, loop: Loop, egress: SandboxEgress, internet: Internet
) -> None:
    assert status(egress, "https://github.com/owner/repo") == "403"
    before, refused, pid = proxy.restarts, egress.refused, proxy.pid
    internet.seen.clear()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert soon(lambda: proxy.state == "restarting")
    assert proxy.pid is None
    out = inside(egress, "curl -s -m 5 http://github.com/owner/repo; curl -sS -m 5 https://github.com/owner/repo 2>&1")
    assert "its proxy does not run" in out
    assert "503" in out
    assert internet.seen == []
    another = loop.run(proxy.open(Blacklist(), "waits for it"))
    loop.run(another.close())
    assert proxy.state == "running"
    assert proxy.restarts == before + 1
    assert status(egress, "https://github.com/owner/other") == "200"
    assert status(egress, "https://github.com/owner/repo") == "403"
    assert egress.refused == refused + 1


def test_a_proxy_that_keeps_dying_is_given_up(folder: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "_MOST_DEATHS", 0)
    dying = loop.run(EgressProxy.start(EgressConfig(mode="open"), folder / "dying"))
    egress = loop.run(dying.open(Blacklist(), "early"))
    assert dying.pid is not None
    os.kill(dying.pid, signal.SIGKILL)
    assert soon(lambda: dying.state == "failed")
    assert "died 1 times" in dying.reason
    assert status(egress, "http://index.example.org/") == "503"
    with pytest.raises(SandboxUnavailable, match="failed: it died"):
        loop.run(dying.open(Blacklist(), "late"))
    loop.run(dying.close())
    loop.run(dying.close())
    assert dying.state == "closed"


def test_a_start_that_fails_says_why(folder: Path, loop: Loop, tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("nothing")
    for authority, reason in ((empty, "holds no certificate"), (tmp_path / "absent.pem", "No such file")):
        config = EgressConfig(mode="open", upstream_ca=str(authority))
        with pytest.raises(SandboxUnavailable, match=reason):
            loop.run(EgressProxy.start(config, folder / "failing"))
    with pytest.raises(ValueError, match="needs no proxy"):
        loop.run(EgressProxy.start(EgressConfig(), folder / "off"))


def test_a_killed_runner_leaves_nothing(folder: Path) -> None:
    program = f"""
proxy = await EgressProxy.start(EgressConfig(mode="open"), Path({str(folder)!r}) / "killed")
egress = await proxy.open(Blacklist(), "killed")
sleeper = subprocess.Popen(sandbox_command(egress, "echo ready; sleep 600"), stdout=subprocess.PIPE)
sleeper.stdout.readline()
print(proxy.pid, sleeper.pid, os.readlink(f"/proc/{{sleeper.pid}}/ns/net"), flush=True)
await asyncio.sleep(600)
"""
    runner = subprocess.Popen(runner_command(program), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    proxy_pid, sleeper_pid, namespace = runner.stdout.readline().split()
    assert runs(int(proxy_pid))
    assert namespace != os.readlink("/proc/self/ns/net")
    runner.kill()
    runner.wait()
    assert soon(lambda: not runs(int(proxy_pid)) and not runs(int(sleeper_pid)))
    assert namespace not in _namespaces()


def _namespaces() -> set[str]:
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                found.add(os.readlink(process / "ns" / "net"))
            except OSError:
                continue
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can show the proxy another /etc/hosts")
def test_names_with_private_addresses_are_refused(folder: Path) -> None:
    """The machine's own services and the network's, whatever name they are given."""
    addresses = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
    addresses += ["224.0.0.1", "::1", "fd00::1", "fe80::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
    names = {f"name{number}.example.org": address for number, address in enumerate(addresses)}
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    program = f"""
proxy = await EgressProxy.start(EgressConfig(mode="open"), Path({str(folder)!r}) / "private")
egress = await proxy.open(Blacklist(), "private")
urls = [f"{{scheme}}://{{name}}/" for name in {list(names)!r} for scheme in ("http", "https")]
curl = 'curl -s -m 20 -o /dev/null -w "%{{http_code}} %{{http_connect}} "'
script = "; ".join(f"{{curl}} {{url}}" for url in urls)
print(await asyncio.to_thread(inside, egress, script))
print(*{{request.reason.rpartition(", ")[2] for request in egress.requests()}})
await egress.close()
await proxy.close()
"""
    listener = socket.create_server(("127.0.0.1", 80)) if _port_is_free(80) else None
    command = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
    try:
        ended = subprocess.run(
            [*command, *runner_command(program)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    finally:
        if listener is not None:
            listener.close()
    codes, reasons = ended.stdout.splitlines()
    assert codes.split() == ["403", "000", "000", "403"] * len(names)
    assert reasons == "which is not public"


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
