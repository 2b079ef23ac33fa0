"""Attempts to get out of a sandbox: each is made for real, from inside.

Each asserts that the attempt failed, and a fixture that the host is as it was and the runner goes on. Nothing is
faked. tests/unit/sandbox/test_seccomp.py tries the system calls one by one, test_exhaustion.py to use up the machine,
test_remains.py to stay.
"""

import asyncio
import contextlib
import io
import os
import socket
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from megatron_klong.sandbox.bubblewrap import Bubblewrap, CommandResult, OutputLimitExceeded
from megatron_klong.sandbox.directories import outside_uid, runner_directory
from megatron_klong.sandbox.limits import MIB, SandboxLimits
from tests.unit.sandbox.machine import in_sandbox, shell

pytestmark = pytest.mark.usefixtures("the_host_is_as_it_was")

LIMITS = SandboxLimits(memory_bytes=256 * MIB, processes=100, disk_bytes=128 * MIB, files=2000, file_bytes=96 * MIB)
SECRET = "klong-secret-of-the-host"


def python(program: str, limits: SandboxLimits = LIMITS, seconds: float = 30) -> CommandResult:
    """A Python program in a fresh sandbox."""
    return in_sandbox(lambda box: box.run(["python3", "-c", program], timeout_seconds=seconds), limits)


# --- reading what is not its own ------------------------------------------------------------------


def test_the_hosts_files_environment_and_other_sandboxes_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLONG_TEST_TOKEN", SECRET)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        (Path(folder) / "secret").write_text(SECRET)
        Path(folder).chmod(0o755)

        async def main() -> bytes:
            async with await Bubblewrap.create() as other, await Bubblewrap.create() as box:
                await other.write_file("secret", SECRET.encode())
                away = " ".join([folder, str(other._place.directory), str(runner_directory()), "/root", "/etc/shadow"])
                script = f"""
exec 2>&1
for path in {away}; do cat $path $path/* $path/home/* /proc/1/root$path /proc/self/root/../..$path; done
cat /proc/*/environ /proc/*/cmdline | tr '\\0' '\\n'
for pid in $(seq 1 40); do cat /proc/$pid/root/etc/shadow /proc/$pid/cwd/secret; ls /proc/$pid/fd; done
cat /proc/self/mountinfo /proc/mounts | grep -o '/root[^ ]*'
cat /proc/kcore /dev/mem /dev/kmem /proc/kallsyms /proc/kmsg | head -c 1000 | od -c | head
ls -laR /proc/1/fd /proc/1/map_files; cat /dev/sda /dev/vda /dev/nvme0n1 | head -c 100; dmesg"""
                found = await box.run(["bash", "-c", script], timeout_seconds=30)
                return found.stdout

        found = asyncio.run(main())
    assert SECRET.encode() not in found
    with contextlib.suppress(OSError):
        for line in Path("/etc/shadow").read_bytes().splitlines():
            assert line not in found
    assert found.count(b"No such file or directory") > 20


def test_planted_links_and_devices_lead_nowhere_when_files_are_moved(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text(SECRET)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, kind, target in [
            ("out", tarfile.SYMTYPE, str(tmp_path)),
            ("out/planted", tarfile.REGTYPE, ""),
            ("hard", tarfile.LNKTYPE, str(victim)),
            ("device", tarfile.BLKTYPE, ""),
            ("../../planted", tarfile.REGTYPE, ""),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        setuid = tarfile.TarInfo("setuid")
        setuid.mode, setuid.uid = 0o6755, 0
        tar.addfile(setuid)

    async def test(box: Bubblewrap) -> None:
        script = f"""ln -s {victim} soft; ln -s {tmp_path} dir; ln -s /proc/1/root root; ln -s /proc/self/environ env
ln -s /etc/shadow shadow; ln {victim} hard; ln /etc/passwd hard2; mknod block b 8 0; mknod char c 1 1"""
        await box.run(["sh", "-c", script])
        for name in ("soft", "dir/victim", "root/root", f"root{victim}", "shadow", "hard", "block", "char"):
            with pytest.raises(OSError, match=name):
                await box.read_file(name)
        assert SECRET.encode() not in await box.read_file("env")
        for name in ("soft", "dir/new", "hard2"):
            with contextlib.suppress(OSError):
                await box.write_file(name, b"taken over")
        with pytest.raises(OSError, match="x"):
            await box.write_archive("x", archive.getvalue())
        packed = await box.read_archive(".", limit_bytes=MIB)
        assert SECRET.encode() not in packed
        with tarfile.open(fileobj=io.BytesIO(packed)) as back:
            assert not [member for member in back if member.isdev()]

    in_sandbox(test)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == SECRET


def test_fifos_and_endless_files_do_not_hold_a_transfer() -> None:
    async def test(box: Bubblewrap) -> None:
        await box.run(["sh", "-c", "mkfifo fifo; mkdir d; mkfifo d/fifo; ln -s fifo link; ln -s /dev/zero zero"])
        started = time.monotonic()
        for name in ("fifo", "link"):
            with pytest.raises(OSError, match=name):
                await box.read_file(name)
            with pytest.raises(OSError, match=name):
                await box.write_file(name, b"x")
        with pytest.raises(OutputLimitExceeded):
            await box.read_file("zero", limit_bytes=MIB)
        assert len(await box.read_archive("d", limit_bytes=MIB)) > 0
        assert time.monotonic() - started < 10

    in_sandbox(test)


# --- signals and privileges -----------------------------------------------------------------------


def test_nothing_of_the_host_can_be_signalled(mark: str) -> None:
    bystander = subprocess.Popen(["sleep", mark], user=outside_uid() if os.geteuid() == 0 else None)
    try:
        program = f"""
import os, signal
for pid in [{bystander.pid}, {os.getpid()}, {os.getppid()}, *range(2, 400), -{os.getpgrp()}, -1, 0]:
    if pid == os.getpid() or pid == 0:
        continue
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
print("alone")
os.kill(1, signal.SIGKILL)
os.kill(0, signal.SIGSTOP)"""
        shell(f"python3 -c '{program}' & wait", LIMITS)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_no_program_gives_privileges() -> None:
    script = """exec 2>&1
for tool in "su -c id" "sudo -n id" "mount -t tmpfs x /tmp" "unshare -Ur id" "unshare -m id" "nsenter -t 1 -a id"; do
    $tool && echo GAINED $tool; done
cp /bin/sh shell; chmod 6755 shell; ls -l shell; ./shell -p -c 'id -u; id -ru'
find / -xdev -perm -4000 2>/dev/null | head -3
echo 1 > /proc/sys/kernel/panic; echo x > /proc/sysrq-trigger; echo core > /proc/sys/kernel/core_pattern
echo 0 > /proc/sys/net/ipv4/ip_forward; echo -1000 > /proc/self/oom_score_adj && echo GAINED oom
echo '0 0 1' > /proc/self/uid_map && echo GAINED uid_map
mkdir -p /sys/fs/cgroup; mount -t cgroup2 none /home; ls /sys/fs/cgroup
chroot / id; hostname taken; date -s 2000-01-01; nice -n -5 true; renice -n -20 $$; ionice -c1 true
mknod /home/dev b 8 0; mknod /dev/x c 1 3; cat /dev/tty; python3 -c 'import os; os.setuid(0)'"""
    found = shell(script, LIMITS).stdout.decode()
    assert "GAINED" not in found
    assert "uid=0" not in found
    assert "\n0\n" not in found
    assert Path("/proc/sys/kernel/core_pattern").read_text() != "core taken\n"


def test_tracing_reaches_only_its_own() -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in [*range(1, 200), *range(%d, %d)]:
    if pid != os.getpid() and libc.ptrace(0x4206, pid, 0, 0) == 0:  # PTRACE_SEIZE: attach without stopping it
        print("attached", pid, open(f"/proc/{pid}/comm").read().strip())
""" % (os.getpid() - 20, os.getpid() + 20)  # noqa: UP031  # braces of the program
    attached = [line.split() for line in python(program).stdout.decode().splitlines()]
    assert all(pid == "1" for _, pid, _ in attached), "at most the shell that started it, which is as unprivileged"


# --- the network ----------------------------------------------------------------------------------


def test_no_service_of_the_host_or_the_network_can_be_reached(tmp_path: Path) -> None:
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0klong-{os.getpid()}")
    abstract.listen()
    named = socket.socket(socket.AF_UNIX)
    named.bind(f"/tmp/klong-{os.getpid()}.sock")
    named.listen()
    Path(f"/tmp/klong-{os.getpid()}.sock").chmod(0o777)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    tcp = socket.create_server(("0.0.0.0", 0))
    host = socket.gethostbyname(socket.gethostname())
    program = f"""
import socket, struct
def attempt(name, work):
    try:
        print(name, "REACHED", work())
    except OSError as error:
        print(name, error.errno)
for address in ("127.0.0.1", {host!r}, "10.0.0.1", "192.0.2.1", "169.254.169.254"):
    attempt("tcp", lambda: socket.create_connection((address, {tcp.getsockname()[1]}), 2))
for address in ("::1", "fe80::1"):
    attempt("tcp6", lambda: socket.create_connection((address, {tcp.getsockname()[1]}), 2))
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0klong-{os.getpid()}"))
attempt("named", lambda: socket.socket(socket.AF_UNIX).connect("/tmp/klong-{os.getpid()}.sock"))
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {udp.getsockname()[1]}))
attempt("dns", lambda: socket.getaddrinfo("example.com", 80))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt("packet", lambda: socket.socket(17, socket.SOCK_RAW, 3))
attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM).connect((2, 1)))
attempt("address", lambda: __import__("fcntl").ioctl(socket.socket(), 0x8916, struct.pack("16s16s", b"lo", b"")))
"""
    try:
        found = python(program)
        assert b"REACHED" not in found.stdout, found.stdout
        assert found.stdout.count(b"\n") == 14, found
        for listener in (abstract, named, tcp, udp):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.recv(1) if listener is udp else listener.accept()
    finally:
        for listener in (abstract, named, tcp, udp):
            listener.close()
        Path(f"/tmp/klong-{os.getpid()}.sock").unlink()
