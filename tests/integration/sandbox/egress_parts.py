"""What the tests of the network have in common: an internet on loopback, and commands in a real bubblewrap."""

import asyncio
import base64
import contextlib
import datetime
import hashlib
import http.server
import io
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from megatron_klong.sandbox.egress.proxy import SandboxEgress

UNPRIVILEGED = 64001
HOSTS = [
    "github.com",
    "www.github.com",
    "api.github.com",
    "raw.githubusercontent.com",
    "codeload.github.com",
    "ssh.github.com",
    "cdn.jsdelivr.net",
    "web.archive.org",
    "mirror.example.org",
    "index.example.org",
    "files.example.org",
]
AUTHORITY_NAME = "Test Origin Authority"
BLOCK = b"x" * 65536


def make_authority(folder: Path, hosts: list[str]) -> tuple[Path, Path]:
    """A certificate authority and a server's certificate for these hosts: (authority.pem, server.pem with its key)."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
        )

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    basic = x509.BasicConstraints(ca=True, path_length=None)
    root = certificate(AUTHORITY_NAME, AUTHORITY_NAME, root_key).add_extension(basic, critical=True)
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
    leaf = certificate(hosts[0], AUTHORITY_NAME, key).add_extension(names, critical=False)
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    authority, server = folder / "authority.pem", folder / "server.pem"
    authority.write_bytes(root.sign(root_key, hashes.SHA256()).public_bytes(pem))
    server.write_bytes(key.private_bytes(pem, *plain) + leaf.sign(root_key, hashes.SHA256()).public_bytes(pem))
    return authority, server


def make_repository(folder: Path, name: str) -> None:
    """A bare repository with one commit, owner/name below the folder."""
    work = folder / "work"
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, "init", "-q", work], check=True)
    (work / "README.md").write_text(f"This is {name}.\n")
    subprocess.run(["git", "-C", work, "add", "."], check=True)
    subprocess.run(["git", "-C", work, *identity, "commit", "-q", "-m", "first"], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", work, folder / f"{name}.git"], check=True)
    shutil.rmtree(work)


def make_wheel(name: str) -> bytes:
    """An installable package whose module says its own name."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": f"NAME = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)
    return content.getvalue()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    seen: list[str]
    repositories: Path

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").partition(":")[0].rstrip(".")
        self.server.seen.append(f"{host}{self.path}")
        path, _, query = self.path.partition("?")
        if "upgrade" in self.headers.get("Connection", "").lower():
            self._websocket()
        elif path == "/redirect":
            self.send_response(302)
            self.send_header("Location", urllib.parse.parse_qs(query)["to"][0])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path == "/endless-header":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(BLOCK)
            self.close_connection = True
        elif path.startswith("/large"):
            self._large(int(query))
        elif "git-upload-pack" in self.path or path.endswith(("/HEAD", "/info/refs")):
            self._git(path, query)
        elif path == "/simple/klongtest/":
            self._reply(b'<a href="https://files.example.org/klongtest-1.0-py3-none-any.whl">1.0</a>', "text/html")
        elif path.endswith(".whl"):
            self._reply(make_wheel("klongtest"))
        else:
            self._reply(f"origin {host}{self.path}\n".encode())

    def do_POST(self) -> None:
        if "git-upload-pack" in self.path:
            self.do_GET()
            return
        left = total = int(self.headers.get("Content-Length", "0"))
        while left:
            left -= len(self.rfile.read(min(left, 65536)))
        self.server.seen.append(self.path)
        self._reply(f"received {total}\n".encode())

    def _reply(self, content: bytes, kind: str = "text/plain") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _large(self, blocks: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(blocks * len(BLOCK)))
        self.end_headers()
        for _ in range(blocks):
            self.wfile.write(BLOCK)

    def _git(self, path: str, query: str) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        owner, name, rest = path.strip("/").split("/", 2)
        environment = {
            "GIT_PROJECT_ROOT": str(self.server.repositories),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": f"/{owner}/{name.removesuffix('.git')}.git/{rest}",
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(content)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "PATH": os.environ["PATH"],
        }
        answer = subprocess.run(
            ["git", "http-backend"], input=content, env=environment, capture_output=True, check=False
        )
        head, _, body = answer.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines() if ": " in line)
        self.send_response(int(headers.pop("Status", "200 OK").split()[0]))
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _websocket(self) -> None:
        """Accept, then send back the one short frame that comes."""
        magic = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(magic.encode()).digest()).decode())
        self.end_headers()
        _, length = self.rfile.read(2)
        mask = self.rfile.read(4)
        text = bytes(byte ^ mask[n % 4] for n, byte in enumerate(self.rfile.read(length & 127)))
        self.wfile.write(b"\x81" + bytes([len(text)]) + text)
        self.close_connection = True


@dataclass(kw_only=True)
class Internet:
    """Servers for HOSTS on loopback: the one on `plain` speaks HTTP, the one on `secure` HTTPS.

    seen: host and path of each request that arrived.
    """

    plain: int
    secure: int
    authority: Path
    seen: list[str] = field(default_factory=list)

    @property
    def addresses(self) -> dict[str, str]:
        """For the proxy's configuration."""
        plain = {f"{host}:80": f"127.0.0.1:{self.plain}" for host in HOSTS}
        return plain | {f"{host}:443": f"127.0.0.1:{self.secure}" for host in HOSTS}


def start_internet(folder: Path) -> Internet:
    """It runs until this process ends."""
    authority, certificate = make_authority(folder, HOSTS)
    repositories = folder / "repositories"
    for name in ("owner/repo", "owner/other"):
        make_repository(repositories, name)
    internet = Internet(plain=0, secure=0, authority=authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    for secure in (False, True):
        server = _Server(("127.0.0.1", 0), _Handler)
        server.seen, server.repositories = internet.seen, repositories
        if secure:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            internet.secure = server.server_port
        else:
            internet.plain = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
    return internet


class Loop:
    """An event loop in a thread of its own, as a runner has one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run[T](self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def sandbox_command(
    egress: SandboxEgress, script: str, *, network: bool = True, environment: Mapping[str, str] | None = None
) -> list[str]:
    """A bash script in a bubblewrap that shares the sandbox's network."""
    command = [*egress.network.enter()]
    if os.geteuid() == 0:
        ids = str(UNPRIVILEGED)
        command += ["setpriv", "--reuid", ids, "--regid", ids, "--clear-groups", "--no-new-privs"]
    command += ["bwrap", "--unshare-all", "--share-net", "--unshare-user", "--disable-userns", "--die-with-parent"]
    command += ["--uid", "1000", "--gid", "1000", "--new-session", "--as-pid-1", "--cap-drop", "ALL", "--clearenv"]
    command += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/run"]
    for name in ("bin", "sbin", "lib", "lib64"):
        command += ["--symlink", f"usr/{name}", f"/{name}"]
    command += ["--perms", "0755", "--dir", "/etc", "--tmpfs", "/home"]
    for name in ("alternatives", "ssl/certs", "ssl/openssl.cnf", "pki/ca-trust/extracted", "pki/tls"):
        command += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for inside, file in egress.files.items():
        command += ["--ro-bind", str(file), inside]
    variables = {"PATH": "/usr/bin:/bin", "HOME": "/home", "LANG": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0"}
    variables |= {**(egress.environment if network else {}), **(environment or {})}
    for key, value in variables.items():
        command += ["--setenv", key, value]
    return [*command, "--chdir", "/home", "bash", "-c", script]


def inside(egress: SandboxEgress, script: str, *, seconds: float = 60, **options: Any) -> str:
    """What a script in the sandbox prints, errors included."""
    command = sandbox_command(egress, script, **options)
    ended = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
    )
    return ended.stdout.decode(errors="replace")


def python_inside(egress: SandboxEgress, program: str, **options: Any) -> str:
    """What a Python program in the sandbox prints."""
    return inside(egress, f"/usr/bin/python3 - <<'END_OF_PROGRAM'\n{program}\nEND_OF_PROGRAM", **options)


def status(egress: SandboxEgress, arguments: str) -> str:
    """The status that curl gets: "200", or of the CONNECT where that was refused; "000" without an answer."""
    out = inside(egress, f"curl -s -m 20 -o /dev/null -w '%{{http_code}} %{{http_connect}}' {arguments}")
    code, connect = out.split()
    return code if code != "000" else connect


def port_is_open(port: int, source: str = "127.0.0.1") -> bool:
    with socket.socket() as client:
        client.bind((source, 0))
        return client.connect_ex(("127.0.0.1", port)) == 0


def soon(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether the condition comes true within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def reachable_folder() -> Iterator[Path]:
    """A folder that the sandbox's uid can reach."""
    folder = Path(tempfile.mkdtemp(prefix="klong-egress-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def runner_command(program: str) -> list[str]:
    """A Python process of its own that runs the body of an async function."""
    body = "\n".join(f"    {line}" for line in program.strip().splitlines())
    lines = [
        "import asyncio, os, subprocess, sys",
        "from pathlib import Path",
        "from megatron_klong.sandbox.egress.config import EgressConfig",
        "from megatron_klong.sandbox.egress.proxy import EgressProxy",
        "from megatron_klong.sandbox.egress.rules import Blacklist",
        "from tests.integration.sandbox.egress_parts import inside, sandbox_command, status",
        f"async def main():\n{body}",
        "asyncio.run(main())",
    ]
    return [sys.executable, "-c", "\n".join(lines)]
