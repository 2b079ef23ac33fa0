"""The filter of system calls: each kind of rule met by a real call inside a sandbox, and what must go on working."""

import asyncio
import errno
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klong.sandbox.bubblewrap import Bubblewrap
from megatron_klong.sandbox.seccomp import filter_program
from tests.unit.sandbox.machine import runner, shell

# (call, number on x86_64, arguments, errno it must give; 0: it must succeed)
CALLS: list[tuple[str, int, list[int], int]] = [
    ("unshare_user", 272, [0x10000000], errno.EPERM),
    ("setns", 308, [0, 0], errno.EPERM),
    ("mount", 165, [0, 0, 0, 0, 0], errno.EPERM),
    ("umount2", 166, [0, 0], errno.EPERM),
    ("chroot", 161, [0], errno.EPERM),
    ("pivot_root", 155, [0, 0], errno.EPERM),
    ("fsopen", 430, [0, 0], errno.EPERM),
    ("open_tree", 428, [0, 0, 0], errno.EPERM),
    ("keyctl", 250, [0, 0, 0], errno.EPERM),
    ("add_key", 248, [0, 0, 0, 0, 0], errno.EPERM),
    ("bpf", 321, [0, 0, 0], errno.EPERM),
    ("perf_event_open", 298, [0, 0, 0, 0, 0], errno.EPERM),
    ("userfaultfd", 323, [0], errno.EPERM),
    ("io_uring_setup", 425, [1, 0], errno.ENOSYS),
    ("clone3", 435, [0, 0], errno.ENOSYS),
    ("clone_newuser", 56, [0x10000000 | 17, 0, 0, 0, 0], errno.EPERM),
    ("clone_newns", 56, [0x20000 | 17, 0, 0, 0, 0], errno.EPERM),
    ("process_vm_readv", 310, [1, 0, 0, 0, 0, 0], errno.ENOSYS),
    ("fallocate", 285, [1, 0, 0, 1], errno.EOPNOTSUPP),
    ("init_module", 175, [0, 0, 0], errno.EPERM),
    ("kexec_load", 246, [0, 0, 0, 0], errno.EPERM),
    ("reboot", 169, [0, 0, 0, 0], errno.EPERM),
    ("swapon", 167, [0, 0], errno.EPERM),
    ("acct", 163, [0], errno.EPERM),
    ("quotactl", 179, [0, 0, 0, 0], errno.EPERM),
    ("sethostname", 170, [0, 0], errno.EPERM),
    ("open_by_handle_at", 304, [0, 0, 0], errno.EPERM),
    ("modify_ldt", 154, [0, 0, 0], errno.EPERM),
    ("iopl", 172, [3], errno.EPERM),
    ("socket_vsock", 41, [40, 1, 0], errno.EAFNOSUPPORT),
    ("socket_alg", 41, [38, 5, 0], errno.EAFNOSUPPORT),
    ("socket_packet", 41, [17, 3, 0], errno.EAFNOSUPPORT),
    ("socket_above_32_bits", 41, [(1 << 32) | 40, 1, 0], errno.EAFNOSUPPORT),
    ("socket_ax25", 41, [3, 2, 0], errno.EAFNOSUPPORT),
    ("socket_netfilter", 41, [16, 3, 12], errno.EPROTONOSUPPORT),
    ("socket_raw", 41, [2, 3, 1], errno.EPERM),
    ("socket_raw_cloexec", 41, [10, 3 | 0o2000000, 58], errno.EPERM),
    ("tiocsti", 16, [0, 0x5412, 0], errno.EPERM),
    ("tiocsti_above_32_bits", 16, [0, (1 << 32) | 0x5412, 0], errno.EPERM),
    ("tioclinux", 16, [0, 0x541C, 0], errno.EPERM),
    ("personality_read_implies_exec", 135, [0x0400000], errno.EPERM),
    ("personality_32bit", 135, [8], errno.EPERM),
    ("personality_none", 135, [0], 0),
    ("socket_unix", 41, [1, 1, 0], 0),
    ("socket_inet", 41, [2, 1, 0], 0),
    ("socket_route", 41, [16, 3 | 0o2000000, 0], 0),
    ("getpid", 39, [], 0),
]

PROGRAM = """
import ctypes, json, sys
libc = ctypes.CDLL(None, use_errno=True)
found = {}
for name, number, arguments, _ in json.load(sys.stdin):
    ctypes.set_errno(0)
    result = libc.syscall(*(ctypes.c_long(value) for value in (number, *arguments)))
    found[name] = ctypes.get_errno() if result == -1 else 0
json.dump(found, sys.stdout)
"""

only_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of calls are x86_64's")


@only_x86
def test_each_call_is_refused_as_written_and_what_programs_need_is_not() -> None:
    async def main() -> dict[str, int]:
        async with await Bubblewrap.create() as box:
            result = await box.run(["python3", "-c", PROGRAM], input=json.dumps(CALLS).encode(), timeout_seconds=20)
            assert result.returncode == 0, result
            found: dict[str, int] = json.loads(result.stdout)
            return found

    assert asyncio.run(main()) == {name: expected for name, _, _, expected in CALLS}


@only_x86
def test_other_instruction_sets_are_no_way_around(tmp_path: Path) -> None:
    x32 = "import ctypes; print(ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 | 39)))"
    assert shell(f"python3 -c '{x32}'").returncode == 128 + 31, "killed by SIGSYS"
    # mov eax, 20 (getpid on i386); int 0x80; mov edi, eax; mov eax, 60 (exit on x86_64); syscall
    code = "b814000000cd8089c7b83c0000000f05"
    i386 = (
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        f'page.write(bytes.fromhex("{code}"))\n'
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n"
    )
    assert shell(f"python3 -c '{i386}'").returncode == 128 + 31
    outside = subprocess.run([sys.executable, "-c", i386], cwd=tmp_path, check=False)
    assert outside.returncode >= 0, "outside the same program runs, if this kernel knows 32-bit calls"


@pytest.mark.parametrize("program", ["strace", "gdb"])
def test_debuggers_work_on_what_they_start(program: str) -> None:
    command = {"strace": "strace -f sh -c 'true; true'", "gdb": "gdb -batch -ex run -ex bt true"}[program]
    result = shell(f"command -v {program} >/dev/null || exit 77; {command} 2>&1")
    if result.returncode == 77:
        pytest.skip(f"{program} is not installed")
    wanted = {"strace": b"exited with 0", "gdb": b"exited normally"}[program]
    assert wanted in result.stdout, result.stdout


def test_ordinary_programs_do_not_notice() -> None:
    script = """
import concurrent.futures as futures, multiprocessing, shutil, socket, sqlite3, subprocess, tempfile, threading
if __name__ == "__main__":
    with futures.ProcessPoolExecutor(2) as pool, futures.ThreadPoolExecutor(2) as threads:
        print(sum(pool.map(abs, range(10))), sum(threads.map(abs, range(10))))
    shared = multiprocessing.Array("i", 1000)
    database = sqlite3.connect("x.db"); database.execute("create table t (x)"); database.commit()
    a, b = socket.socketpair(); a.send(b"x"); print(b.recv(1))
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname()); print(socket.getaddrinfo("localhost", 80)[0][4])
    print(subprocess.run("echo sub | cat", shell=True, capture_output=True, text=True).stdout)
"""
    result = shell(f"cat > x.py <<'E'\n{script}\nE\npython3 x.py")
    assert result.stdout.split() == [b"45", b"45", b"b'x'", b"('127.0.0.1',", b"80)", b"sub"], result


def test_the_filter_is_the_same_for_all_and_can_be_left_out() -> None:
    assert filter_program() is filter_program()

    async def main() -> None:
        async with await Bubblewrap.create(seccomp=False) as box:
            status = await box.run(["grep", "Seccomp:", "/proc/self/status"])
            assert status.stdout.split()[1] == b"0"
        async with await Bubblewrap.create() as box:
            for _ in range(3):
                status = await box.run(["grep", "Seccomp:", "/proc/self/status"])
                assert status.stdout.split()[1] == b"2"

    asyncio.run(main())


def test_without_the_library_the_message_says_what_to_do(temporary: dict[str, str]) -> None:
    program = """
import sys
sys.modules["pyseccomp"] = None
try:
    await Bubblewrap.create()
except bubblewrap.SandboxUnavailable as error:
    print(error)
await (await Bubblewrap.create(seccomp=False)).close()"""
    output, errors = runner(program, temporary).communicate()
    assert "apt-get install libseccomp2" in output, errors
    assert "seccomp=False" in output
