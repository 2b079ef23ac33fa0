"""A network namespace of its own for each sandbox, shared by all its commands, with one way out: a listening socket.

Always (tests/integration/sandbox/test_egress_network.py):
- the namespace has a loopback interface and nothing else: no route, no name server, no other machine;
- what listens in it on 127.0.0.1:3128 is a socket of the runner, for a socket belongs for ever to the namespace it was
  made in. The runner accepts from its own event loop, and what it does with a connection is its own affair;
- the namespace is held by file descriptors alone. No process stays in it, so when they are closed, or the runner is
  killed, the kernel removes it with all that is in it;
- nothing that runs as the sandbox's uid may change the namespace.

Root makes it in about a millisecond, in a thread that ends at once. Another user needs a user namespace around it,
which only a process with one thread may make: that is this file, run as a program, which passes the descriptors back.
"""

import array
import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import cache

if __name__ != "__main__":  # as a program this file needs only the standard library
    from megatron_klong.sandbox.results import SandboxUnavailable

PROXY_HOST = "127.0.0.1"
PROXY_PORT = 3128  # inside

_BACKLOG = 128
_HELPER_SECONDS = 20.0
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """What makes a namespace: `user` is None for root, who needs no user namespace around it."""

    listener: socket.socket
    network: int
    user: int | None


class SandboxNetwork:
    """The network of one sandbox. Make it with `create`, and `close` it after the last command has ended."""

    def __init__(self, parts: _Parts) -> None:
        self._parts: _Parts | None = parts

    @classmethod
    def create(cls) -> "SandboxNetwork":
        """A namespace with nobody in it. SandboxUnavailable, with the cure."""
        try:
            return cls(_made_by_root() if os.geteuid() == 0 else _made_by_helper())
        except OSError as error:
            raise SandboxUnavailable(f"cannot make a network namespace: {error}; {_cure(error)}") from error

    @property
    def listener(self) -> socket.socket:
        """Listens inside, non-blocking; connections of the sandbox's programs are accepted from it."""
        return self._open.listener

    @property
    def closed(self) -> bool:
        return self._parts is None

    def enter(self) -> list[str]:
        """What to put in front of a command line so that it runs in here. RuntimeError once closed.

        It names descriptors of this process, so the command must be started by this process, and before `close`.
        """
        prefix = [_nsenter()]
        if self._open.user is not None:
            prefix += [f"--user=/proc/{os.getpid()}/fd/{self._open.user}", "--preserve-credentials"]
        return [*prefix, f"--net=/proc/{os.getpid()}/fd/{self._open.network}", "--"]

    def close(self) -> None:
        """Let go of it. May be called again. Its number may soon name another sandbox's: start nothing afterwards."""
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.listener.close()
            for descriptor in (parts.network, parts.user):
                if descriptor is not None:
                    os.close(descriptor)

    @property
    def _open(self) -> _Parts:
        if self._parts is None:
            raise RuntimeError("the sandbox's network is closed")
        return self._parts


@cache
def _nsenter() -> str:
    path = shutil.which("nsenter")
    if path is None:
        raise SandboxUnavailable("nsenter is not on the PATH: install util-linux")
    return os.path.abspath(path)


def _made_by_root() -> _Parts:
    made: list[_Parts] = []
    failed: list[OSError] = []

    def make() -> None:
        try:
            os.unshare(os.CLONE_NEWNET)  # of this thread alone
            made.append(_Parts(listener=_listen(), network=_namespace("net"), user=None))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=make, name="make-network")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _made_by_helper() -> _Parts:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        helper = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env={"LC_ALL": "C"},
        )
        theirs.close()
        try:
            _, errors = helper.communicate(timeout=_HELPER_SECONDS)
        except subprocess.TimeoutExpired as error:
            helper.kill()
            helper.communicate()
            raise OSError(errno.ETIMEDOUT, "its helper hangs") from error
        if helper.returncode != 0:
            text = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(errno.EPERM, text or f"its helper ended with {helper.returncode}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 3)
    listener, network, user = descriptors
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return _Parts(listener=socket.socket(fileno=listener), network=network, user=user)


def _listen() -> socket.socket:
    """In this thread's namespace: bring its loopback interface up and listen on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = array.array("B", struct.pack("16sh22x", b"lo", 0))
        fcntl.ioctl(control, _SIOCGIFFLAGS, request, True)
        (flags,) = struct.unpack_from("h", request, 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((PROXY_HOST, PROXY_PORT))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _namespace(kind: str) -> int:
    return os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def _cure(error: OSError) -> str:
    if os.geteuid() == 0:
        return "root needs CAP_SYS_ADMIN for it: in a container, docker run --cap-add SYS_ADMIN or --privileged"
    if error.errno == errno.ENOSPC:
        return "raise user.max_net_namespaces and user.max_user_namespaces with sysctl"
    return (
        "this user must be able to make user namespaces: sysctl -w kernel.unprivileged_userns_clone=1 (Debian), "
        "user.max_user_namespaces=10000, kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04)"
    )


def _be_helper(descriptor: int) -> None:
    """Make user and network namespaces and pass (listener, network, user) to the runner."""
    uid, gid = os.geteuid(), os.getegid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
    # The same ids inside as outside: to bubblewrap, which makes a user namespace of its own within, all is as without.
    for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    with socket.socket(fileno=descriptor) as runner, _listen() as listener:
        socket.send_fds(runner, [b"."], [listener.fileno(), _namespace("net"), _namespace("user")])


if __name__ == "__main__":
    _be_helper(int(sys.argv[1]))
