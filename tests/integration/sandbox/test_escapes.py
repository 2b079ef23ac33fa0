"""Attempts to get out of a sandbox, to use up the machine, or to stay: each is made for real, from inside.

Each asserts that the attempt failed, and the module's fixtures that the host is as it was and the runner goes on.
Nothing is faked. tests/unit/sandbox/test_seccomp.py tries the system calls one by one.
"""

import asyncio
import contextlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_klong.sandbox.bubblewrap import (
    Bubblewrap,
    CommandResult,
    OutputLimitExceeded,
    SandboxUnavailable,
    check_available,
)
from megatron_klong.sandbox.cgroups import Cgroups
from megatron_klong.sandbox.directories import PARTS, outside_uid, runner_cgroups, runner_directory
from megatron_klong.sandbox.disk import count
from megatron_klong.sandbox.limits import GIB, MIB, SandboxLimits
from tests.unit.sandbox.machine import alive, in_sandbox, own_children, runner, runner_directories, shell, soon

LIMITS = SandboxLimits(memory_bytes=256 * MIB, processes=100, disk_bytes=128 * MIB, files=2000, file_bytes=96 * MIB)
SECRET = "klong-secret-of-the-host"


@pytest.fixture(scope="module", autouse=True)
def working_bubblewrap() -> None:
    """Skip everything here, with the reason, on a machine without it."""
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.fixture(autouse=True)
def the_host_is_as_it_was() -> Iterator[None]:
    """No process, mount, directory, control group or descriptor more than before; and a sandbox still works."""
    before = traces()
    yield
    assert soon(lambda: traces() == before, 3), (traces(), before)
    assert shell("echo still here").stdout == b"still here\n"


def traces() -> dict[str, object]:
    """What an escape would have changed."""
    groups = runner_cgroups()
    return {
        "children": own_children(),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "sandboxes": sorted(path.name for path in runner_directory().iterdir()),
        "groups": [] if groups is None else _names(groups),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "passwd": Path("/etc/passwd").read_bytes(),
        "hostname": socket.gethostname(),
        "processes_of_its_user": [process.pid for process in psutil.process_iter() if _is_agents(process)],
    }


def _names(groups: Cgroups) -> list[str]:
    return sorted(entry.name for parent in groups.parents.values() for entry in parent.iterdir() if entry.is_dir())


def _is_agents(process: psutil.Process) -> bool:
    """Whether a sandbox of this process runs it. The same uid serves other runners too, so look at its ancestors."""
    with contextlib.suppress(psutil.Error):
        if process.uids().real == outside_uid() and process.status() != psutil.STATUS_ZOMBIE:
            return os.getpid() in [parent.pid for parent in process.parents()] or process.ppid() == 1
    return False


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


# --- using up the machine -------------------------------------------------------------------------


def test_fork_bombs_and_threads_stay_within_their_number(mark: str) -> None:
    async def test(box: Bubblewrap) -> None:
        bombs = [
            ["bash", "-c", f"f() {{ sleep {mark} & f & f & }}; f; wait"],
            ["python3", "-c", "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"],
            ["python3", "-c", "import threading,time\nwhile 1: threading.Thread(target=time.sleep,args=(60,)).start()"],
        ]
        running = [asyncio.create_task(box.run(bomb, timeout_seconds=2)) for bomb in bombs]
        most = 0
        for _ in range(15):
            await asyncio.sleep(0.1)
            if box._place.group is not None:
                most = max(most, int((box._place.group.directories["pids"] / "pids.current").read_text()))
        assert most <= LIMITS.processes + 2 * 17
        ended = await asyncio.gather(*running, return_exceptions=True)
        assert not [end for end in ended if isinstance(end, SandboxUnavailable)], ended
        assert (await box.run(["echo", "ok"])).stdout == b"ok\n"

    in_sandbox(test, LIMITS)
    assert alive(mark) == []


@pytest.mark.parametrize(
    "script",
    [
        "python3 -c 'bytearray(1 << 30)'",
        "for i in 1 2 3 4 5 6 7 8; do python3 -c 'import time; x = bytearray(60 << 20); time.sleep(2)' & done; wait",
        "head -c 1G /dev/zero > /dev/shm/x; cat /dev/shm/x | tail -c 500M | tail > /dev/null",
        "tail /dev/zero",
    ],
    ids=["one_process", "many_processes", "shared_memory", "pipe"],
)
def test_memory_of_all_processes_is_bounded(script: str) -> None:
    result = in_sandbox(lambda box: box.run(["bash", "-c", script], timeout_seconds=30), LIMITS)
    assert runner_cgroups() is None or result.out_of_memory


def test_kernel_memory_and_tmpfs_are_bounded() -> None:
    script = """exec 2>&1
head -c 100M /dev/zero > /run/x; head -c 1M /dev/zero > /x; head -c 1M /dev/zero > /dev/x; ls -la /run
python3 -c 'import os
pipes = []
try:
    while True:
        pipes.append(os.pipe()); os.set_blocking(pipes[-1][1], False); os.write(pipes[-1][1], bytes(1 << 16))
except OSError as error:
    print("pipes", error)'"""
    started = psutil.virtual_memory().available
    found = shell(script, LIMITS).stdout
    assert b"pipes" in found or b"Killed" in found or runner_cgroups() is not None
    assert started - psutil.virtual_memory().available < 4 * GIB


@pytest.mark.parametrize(
    "script",
    [
        "while :; do dd if=/dev/zero of=$RANDOM$RANDOM bs=1M count=50 status=none; done",
        "cd /tmp; i=0; while :; do i=$((i+1)); : > $i; done",
        'python3 -c \'import os\nwhile 1: os.mkdir("d"); os.chdir("d")\'',
        "fallocate -l 90G x; truncate -s 90G y; "
        "python3 -c \"import os; os.posix_fallocate(os.open('z', 65), 0, 90 << 30)\"",
        "python3 -c 'import os\nwhile 1: os.symlink(\"x\", os.urandom(9).hex()); os.mkfifo(os.urandom(9).hex())'",
        "python3 -c 'import os\nwhile 1: open(os.urandom(20).hex(), \"wb\").write(bytes(1 << 20))'",
    ],
    ids=["dd", "inodes", "directories", "allocation", "links", "many_files"],
)
def test_disk_space_is_bounded(script: str) -> None:
    free = shutil.disk_usage(tempfile.gettempdir()).free

    async def test(box: Bubblewrap) -> None:
        result = await box.run(["bash", "-c", script], timeout_seconds=30)
        assert result.out_of_disk or result.returncode != 0, result
        held = count(box._place.directory, PARTS, [], most_bytes=4 * GIB, most_files=10**6)
        assert held.bytes < 2 * GIB

    in_sandbox(test, LIMITS)
    assert free - shutil.disk_usage(tempfile.gettempdir()).free < 2 * GIB, "given back, whoever else writes here"


def test_ten_gigabytes_of_output_cost_the_runner_nothing() -> None:
    async def test(box: Bubblewrap) -> None:
        before = psutil.Process().memory_info().rss
        for command in ("head -c 10G /dev/zero", "head -c 10G /dev/zero >&2", "yes & yes >&2"):
            with pytest.raises(OutputLimitExceeded):
                await box.run(["sh", "-c", command], timeout_seconds=60)
        assert psutil.Process().memory_info().rss - before < 200 * MIB

    in_sandbox(test, LIMITS)


def test_huge_arguments_and_variables_are_results_or_errors() -> None:
    async def test(box: Bubblewrap) -> None:
        too_long = await box.run(["echo", "x" * 10_000_000])
        assert too_long.returncode == 126
        assert (await box.run(["echo", *["word"] * 400_000])).returncode == 126
        assert (await box.run(["true"], env={"X": "x" * 131_060})).returncode in (0, 126)
        assert (await box.run(["true"], env={"X": "x" * 10_000_000})).returncode == 126
        assert (await box.run(["true"], env={f"X{n}": "x" * 1000 for n in range(5000)})).returncode == 126
        for name in ("", "A=B", "A\0"):
            with pytest.raises(ValueError, match=r"environment|NUL"):
                await box.run(["true"], env={name: "x"})
        assert (await box.run(["echo", "\ud800", "a\nb"])).returncode == 0

    in_sandbox(test, LIMITS)


def test_strange_names_and_trees_pass_through_archives_and_are_removed() -> None:
    program = """
import os
for name in (b"new\\nline", b"\\xff\\xfe", b"-rf", b"*", b" ", b"a" * 255, b"..x", b"\\x1b[2J"):
    os.makedirs(name); open(os.path.join(name, b"f"), "w").write("x")
for _ in range(600):
    os.mkdir("deep"); os.chdir("deep")
"""

    async def test(box: Bubblewrap) -> None:
        assert (await box.run(["python3", "-c", program])).returncode == 0
        packed = await box.read_archive(".", limit_bytes=20 * MIB)
        await box.write_archive("/tmp/copy", packed)
        listed = await box.run(["sh", "-c", "cd /tmp/copy && ls -Ab | wc -l"])
        assert listed.stdout == b"9\n"

    in_sandbox(test)


# --- staying --------------------------------------------------------------------------------------


def test_nothing_outlives_its_command(mark: str) -> None:
    scripts = [
        f"setsid -f sleep {mark}; (setsid sh -c 'exec >/dev/null 2>&1 </dev/null; sleep {mark}' &)",
        f"nohup sleep {mark} & disown; exec 0<&- 1>&- 2>&-; exit 0",
        f"trap '' TERM HUP INT QUIT PIPE; sleep {mark} & sleep {mark} & kill -STOP $!; exit 0",
        f"python3 -c 'import os\nfor _ in range(20):\n if os.fork(): os._exit(0)\n os.setsid()' ; sleep {mark} &",
    ]

    async def test(box: Bubblewrap) -> None:
        for script in scripts:
            started = time.monotonic()
            await box.run(["bash", "-c", script], timeout_seconds=20)
            assert alive(mark) == []
            assert time.monotonic() - started < 10

    in_sandbox(test)


def test_no_core_is_dumped() -> None:
    found = shell("ulimit -c; ulimit -c unlimited; sh -c 'kill -SEGV $$'; ls -a", LIMITS)
    assert found.stdout.split() == [b"0", b".", b".."]


def test_a_terminal_cannot_be_written_to() -> None:
    master, slave = os.openpty()
    try:
        program = "import fcntl, sys\nfor n in (0x5412, 0x541C):\n  fcntl.ioctl(sys.stdin, n, b'x')"
        result = shell(f'tty; python3 -c "{program}"; echo x > /dev/tty; ls /dev/pts', LIMITS)
        assert b"not a tty" in result.stdout
        assert b"Operation not permitted" in result.stderr
        os.set_blocking(master, False)
        with pytest.raises(BlockingIOError):
            os.read(master, 1)
    finally:
        os.close(master)
        os.close(slave)


# --- the death of the runner ----------------------------------------------------------------------

LIVELY = """
from megatron_klong.sandbox.limits import MIB, SandboxLimits
limits = SandboxLimits(memory_bytes=256 * MIB, disk_bytes=256 * MIB)
print("ready", flush=True)
async def live(number):
    while True:
        async with await Bubblewrap.create(limits=limits, label=f"n{number}") as box:
            await box.start(["bash", "-c", "trap '' TERM; setsid sleep MARK & sleep MARK"], output_path="log")
            await box.write_file("f", bytes(1000))
            await box.run(["bash", "-c", "setsid sleep MARK & mkdir -p a/b/c; true"])
await asyncio.gather(*(live(number) for number in range(4)))"""


def test_a_runner_killed_at_any_moment_leaves_nothing(temporary: dict[str, str], mark: str) -> None:
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
    chosen = random.Random(7)
    groups: set[Path] = set()
    for _ in range(5):
        process = runner(LIVELY.replace("MARK", mark), temporary)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chosen.uniform(0.0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for directory in runner_directories(temporary):
            with contextlib.suppress(FileNotFoundError):  # killed before it had any
                groups |= {Path(line) for line in (directory / "cgroups").read_text().splitlines()}
        assert soon(lambda: alive(mark) == [], 5), "no process outlives its runner"
    assert runner("await (await Bubblewrap.create()).close()", temporary).communicate() == ("", "")
    assert runner_directories(temporary) == []
    assert [group for group in groups if group.exists()] == []
    assert len(Path("/proc/self/mountinfo").read_text().splitlines()) == mounts


def test_two_runners_do_not_touch_each_other(temporary: dict[str, str], mark: str) -> None:
    first = runner(LIVELY.replace("MARK", mark), temporary)
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    for _ in range(2):
        assert runner("await (await Bubblewrap.create()).close()", temporary).communicate() == ("", "")
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    first.communicate()
    assert runner_directories(temporary) == []
    assert alive(mark) == []


def test_a_loop_that_is_closed_while_commands_run_leaves_no_traceback_and_no_process(
    temporary: dict[str, str], mark: str
) -> None:
    program = f"""
import asyncio, os, subprocess, sys
from megatron_klong.sandbox.bubblewrap import Bubblewrap
async def begin():
    box = await Bubblewrap.create()
    await box.start(["sleep", "{mark}"], output_path="log")
    running = asyncio.ensure_future(box.run(["sleep", "{mark}"]))
    await asyncio.sleep(0.3)
    return box, running
loop = asyncio.new_event_loop()
kept = loop.run_until_complete(begin())
loop.close()
if sys.argv[1:] == ["drop"]:
    del kept
if sys.argv[1:] == ["close"]:
    asyncio.run(kept[0].close())
    assert not kept[0]._place.directory.exists()
"""
    for arguments in ([], ["drop"], ["close"]):
        ended = subprocess.run(
            [sys.executable, "-c", program, *arguments], env=temporary, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0
        assert "Event loop is closed" not in ended.stderr, ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr
        assert alive(mark) == []
        assert runner_directories(temporary) == []


def test_sandboxes_made_in_threads_of_their_own_loops_all_end(mark: str) -> None:
    def one() -> None:
        asyncio.run(body())

    async def body() -> None:
        async with await Bubblewrap.create() as box:
            await box.run(["sh", "-c", f"setsid sleep {mark} & true"])

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert alive(mark) == []
