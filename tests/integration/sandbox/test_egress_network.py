"""A sandbox's network namespace, made by root and by another user, with real bubblewrap in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klong.sandbox.network import PROXY_PORT, SandboxNetwork
from tests.conftest import REPOSITORY
from tests.integration.sandbox.egress_parts import UNPRIVILEGED

for tool in ("bwrap", "nsenter", "setpriv", "python3"):
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine", allow_module_level=True)

BUBBLEWRAP = ["bwrap", "--unshare-all", "--share-net", "--unshare-user", "--disable-userns", "--die-with-parent"]
BUBBLEWRAP += ["--uid", "1000", "--gid", "1000", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
BUBBLEWRAP += ["--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"]
BUBBLEWRAP += ["--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--", "/bin/sh", "-c"]

CONNECT = "import socket; print(socket.create_connection(('127.0.0.1', {port})).recv(9).decode())"
SERVE = """import socket
server = socket.create_server(("127.0.0.1", 5000))
print(flush=True)
server.accept()[0].sendall(b"hello")"""

EXERCISE = f"""
import os, shlex, socket, subprocess, sys
sys.path.insert(0, sys.argv[1])
from megatron_klong.sandbox.network import SandboxNetwork
BUBBLEWRAP = {BUBBLEWRAP!r}
ids = ["--reuid", "{UNPRIVILEGED}", "--regid", "{UNPRIVILEGED}", "--clear-groups", "--no-new-privs"]
if os.geteuid() == 0:
    BUBBLEWRAP = ["setpriv", *ids, *BUBBLEWRAP]
network = SandboxNetwork.create()
def start(script):
    command = [*network.enter(), *BUBBLEWRAP, script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
def run(script):
    return start(script).communicate(timeout=60)[0].strip()
print("interfaces", run("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '"))
print("routes", run("tail -n +2 /proc/net/route | wc -l"))
print("uid", run("id -u"))
print("capabilities", run("grep -c '^Cap...:.0000000000000000$' /proc/self/status"))
print("namespaces", run("unshare -r true 2>/dev/null && echo made || echo none"))
client = start("ip link set lo down 2>/dev/null; exec python3 -c " + shlex.quote({CONNECT.format(port=3128)!r}))
network.listener.setblocking(True)
accepted, address = network.listener.accept()
accepted.sendall(b"welcome")
print("accepted", address[0], client.communicate(timeout=60)[0].strip())
server = start("exec python3 -c " + shlex.quote({SERVE!r}))
server.stdout.readline()
print("outside", socket.socket().connect_ex(("127.0.0.1", 5000)) != 0)
print("shared", run("python3 -c " + shlex.quote({CONNECT.format(port=5000)!r})))
server.wait()
network.close()
"""
EXPECTED = {
    "interfaces": "lo",
    "routes": "0",
    "uid": "1000",
    "capabilities": "5",
    "namespaces": "none",
    "accepted": "127.0.0.1 welcome",
    "outside": "True",
    "shared": "hello",
}


def outcome(command: list[str]) -> dict[str, str]:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return dict(line.split(" ", 1) for line in ended.stdout.splitlines())


def test_commands_share_a_network_that_leads_nowhere() -> None:
    assert outcome([sys.executable, "-c", EXERCISE, str(REPOSITORY)]) == EXPECTED


@pytest.mark.skipif(os.geteuid() != 0, reason="the test above has shown it already")
def test_a_user_without_privilege_has_the_same() -> None:
    """Python and this package may lie in folders that only root can enter: the test shows them to the user."""
    python = Path(sys.base_prefix).resolve()
    show = [
        "mount -t tmpfs -o mode=755 none /mnt && mkdir /mnt/python",
        f"cp -r {REPOSITORY / 'megatron_klong'} /mnt && chmod -R a+rX /mnt/megatron_klong",
        f"mount --bind {python} /mnt/python",
    ]
    for closed in [part for part in reversed(python.parents) if not part.stat().st_mode & 0o001]:
        show.append(f"mkdir -p {closed} && mount -t tmpfs -o mode=755 none {closed}")
    show.append(f'mkdir -p {python} && mount --bind /mnt/python {python} && cd / && exec "$@"')
    ids = ["--reuid", str(UNPRIVILEGED), "--regid", str(UNPRIVILEGED), "--clear-groups"]
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        " && ".join(show),
        "sh",
        "setpriv",
        *ids,
        "env",
        "PYTHONDONTWRITEBYTECODE=1",
    ]
    assert outcome([*command, str(python / "bin/python3"), "-c", EXERCISE, "/mnt"]) == EXPECTED


def test_closing_leaves_no_descriptor_and_may_be_repeated() -> None:
    SandboxNetwork.create().close()
    before = len(os.listdir("/proc/self/fd"))
    networks = [SandboxNetwork.create() for _ in range(20)]
    ports = {network.listener.getsockname()[1] for network in networks}
    assert ports == {PROXY_PORT}
    assert len({os.readlink(network.enter()[-2].partition("=")[2]) for network in networks}) == 20
    for network in networks:
        network.close()
        network.close()
        assert network.closed
        with pytest.raises(RuntimeError, match="closed"):
            network.enter()
    assert len(os.listdir("/proc/self/fd")) == before
