"""What is inside a sandbox. Nothing is faked: each test runs real bubblewrap and attacks one property."""

import asyncio
import io
import os
import shutil
import socket
import tarfile
import tempfile
from pathlib import Path

import pytest

from megatron_klong.sandbox.bubblewrap import (
    Bubblewrap,
    OutputLimitExceeded,
)
from megatron_klong.sandbox.directories import outside_uid
from megatron_klong.sandbox.limits import GIB, MIB, SandboxLimits
from tests.conftest import REPOSITORY
from tests.unit.sandbox.machine import (
    alive,
    in_sandbox,
    shell,
)

# --- files ----------------------------------------------------------------------------------------


def test_files_last_from_command_to_command_byte_for_byte() -> None:
    async def test(box: Bubblewrap) -> None:
        contents = bytes(range(256)) + b"\r\n\n"
        await box.write_file("new/parent/data.bin", contents)
        await box.write_file("/tmp/empty", b"")
        result = await box.run(["sh", "-c", "cat new/parent/data.bin; ls /tmp; pwd >&2"])
        assert (result.stdout, result.stderr) == (contents + b"empty\n", b"/home\n")
        await box.run(["sh", "-c", "printf short > /home/new/parent/data.bin"])
        assert await box.read_file("new/parent/data.bin") == b"short"
        assert await box.read_file("/tmp/empty") == b""

    in_sandbox(test)


def test_file_errors_are_the_ones_that_open_would_raise() -> None:
    async def test(box: Bubblewrap) -> None:
        await box.run(["sh", "-c", "mkdir d; touch locked; chmod 0 locked; mkfifo pipe; echo x > f"])
        for error, path in [
            (FileNotFoundError, "absent"),
            (IsADirectoryError, "d"),
            (PermissionError, "locked"),
            (NotADirectoryError, "f/g"),
            (OSError, "pipe"),
        ]:
            with pytest.raises(error, match=path):
                await box.read_file(path)
        for error, path in [
            (IsADirectoryError, "d"),
            (PermissionError, "locked"),
            (PermissionError, "/usr/x"),
        ]:
            with pytest.raises(error, match=path):
                await box.write_file(path, b"x")
        await box.write_file("large", b"x" * 1000)
        assert len(await box.read_file("large")) == 1000
        with pytest.raises(OutputLimitExceeded):
            await box.read_file("large", limit_bytes=999)

    in_sandbox(test)


def test_archives_keep_content_modes_and_links() -> None:
    async def test(box: Bubblewrap) -> None:
        await box.run(["sh", "-c", "mkdir -p a/b; echo hi > a/b/f; chmod 755 a/b/f; ln -s b/f a/link; mkdir -m 0 a/no"])
        tar = await box.read_archive("a", limit_bytes=MIB)
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            members = {member.name: member for member in archive}
        assert {"./b/f", "./link"} <= set(members)
        assert members["./b/f"].mode == 0o755
        await box.write_archive("copy/here", tar)
        result = await box.run(["sh", "-c", "cat copy/here/link; readlink copy/here/link; test -x copy/here/b/f"])
        assert (result.returncode, result.stdout) == (0, b"hi\nb/f\n")
        with pytest.raises(FileNotFoundError):
            await box.read_archive("absent", limit_bytes=MIB)
        with pytest.raises(OutputLimitExceeded):
            await box.read_archive("a", limit_bytes=1000)

    in_sandbox(test)


def test_planted_links_lead_to_nothing_of_the_host() -> None:
    host = Path(tempfile.mkdtemp(dir="/tmp"))
    secret = host / "secret"
    secret.write_text("untouched")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"))
        tar.addfile(tarfile.TarInfo(f"{host}/escaped"))
        tar.addfile(tarfile.TarInfo("secret"))

    async def test(box: Bubblewrap) -> None:
        await box.run(["sh", "-c", f"ln -s {secret} file; ln -s {host} dir; ln -s /etc/shadow shadow; ln -s / root"])
        for path in ("file", "dir/secret", "shadow", f"root{secret}"):
            with pytest.raises(FileNotFoundError):
                await box.read_file(path)
        for path in ("file", "dir/new"):
            with pytest.raises(OSError, match=path):
                await box.write_file(path, b"taken over")
        with pytest.raises(OSError, match="dir"):
            await box.write_archive("dir", archive.getvalue())
        with pytest.raises(OSError, match="escaped"):
            await box.write_archive("safe", archive.getvalue())

    in_sandbox(test)
    assert [path.name for path in host.iterdir()] == ["secret"]
    assert secret.read_text() == "untouched"
    shutil.rmtree(host)


# --- what is inside -------------------------------------------------------------------------------


def test_nothing_of_the_runners_environment_or_descriptors_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with tempfile.TemporaryFile() as inheritable:
        os.set_inheritable(inheritable.fileno(), True)
        result = shell("env | sort; ls /proc/self/fd | tr '\\n' ' '; grep -c hf_secret /proc/*/environ")
    lines = result.stdout.decode().splitlines()
    assert [line.partition("=")[0] for line in lines[:6]] == ["HOME", "LANG", "PATH", "PWD", "SHLVL", "_"]
    assert lines[6].startswith("0 1 2 3 ")  # 3: the directory that ls reads
    assert "hf_secret" not in result.stdout.decode()


def test_env_and_cwd_are_given_to_the_command() -> None:
    async def test(box: Bubblewrap) -> None:
        await box.write_file("sub/x", b"")
        env = {"NAME": "two words", "PATH": "/nowhere"}
        result = await box.run(["/bin/sh", "-c", "echo $NAME:$PATH:$PWD; /bin/ls"], cwd="sub", env=env)
        assert result.stdout == b"two words:/nowhere:/home/sub\nx\n"

    in_sandbox(test)


def test_no_network_not_even_the_hosts_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        result = shell(f"for to in 127.0.0.1/{port} 192.0.2.1/80; do true <>/dev/tcp/$to; done; cat /proc/net/dev")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert b"Connection refused" in result.stderr
    assert b"Network is unreachable" in result.stderr
    devices = result.stdout.decode().splitlines()[2:]
    assert [device.split(":")[0].strip() for device in devices] == ["lo"]


def test_host_files_are_absent_and_the_system_is_read_only() -> None:
    secrets = ["/root", "/etc/shadow", "/var/log", "/sys", "/opt", "/proc/1/root/root", str(REPOSITORY)]
    found = shell(f"for path in {' '.join(secrets)}; do ls -d $path; done").stdout.decode().split()
    assert found == []
    result = shell("for d in / /usr /usr/bin /etc /dev /var; do touch $d/x && echo $d; done; echo x > /etc/passwd")
    assert result.stdout == b""
    assert result.stderr.count(b"Read-only file system") == 7, result.stderr


def test_only_its_own_processes_are_visible_and_killable() -> None:
    result = shell("ls /proc | grep -c '^[0-9]'; readlink /proc/1/exe; sleep 9 & kill -9 1; kill -9 -1; wait; echo $?")
    assert int(result.stdout.split()[0]) <= 5
    assert Path(result.stdout.split()[1].decode()).name in ("dash", "bash", "sh", "busybox")
    assert result.stdout.split()[2:] == [b"0"], "process 1 is out of its reach, and all the rest was its own"


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_no_privilege_inside_or_outside() -> None:
    async def test(box: Bubblewrap) -> None:
        result = await box.run(
            ["sh", "-c", "id -u; grep -E 'Cap(Prm|Eff|Bnd)|NoNewPrivs' /proc/self/status; touch mine"]
        )
        uid, *status = result.stdout.decode().split()
        assert uid == "1000"
        assert status[1::2] == ["0" * 16, "0" * 16, "0" * 16, "1"]
        owner = (box._place.directory / "home" / "mine").stat().st_uid
        assert owner == outside_uid() != 0
        for forbidden in ("unshare -U true", "mount -t tmpfs x /home", "chroot / true", "hostname x"):
            assert (await box.run(["sh", "-c", forbidden])).returncode != 0, forbidden
        running = asyncio.create_task(box.run(["sleep", "77.5"]))
        while not any(name_of(pid) == "sleep" for pid in alive("77.5")):  # before it, root becomes another user
            await asyncio.sleep(0.01)
        pids = alive("77.5")
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in pids} == {outside_uid()}
        running.cancel()
        await asyncio.wait([running])

    in_sandbox(test)


# --- how a command ends ---------------------------------------------------------------------------


def test_ends_are_told_as_a_shell_tells_them() -> None:
    async def test(box: Bubblewrap) -> None:
        for command, returncode, stderr in [
            (["sh", "-c", "exit 3"], 3, b""),
            (["sh", "-c", "kill -9 $$"], 137, b""),
            (["absent"], 127, b"absent: not found"),
            (["/etc/passwd"], 126, b"Permission denied"),
            (["echo", "x" * 200_000], 126, b"Argument list too long"),
            (["echo", "\0"], 126, b"NUL"),
            (["exit"], 127, b"exit: not found"),  # a program, never a builtin of the wrapper
        ]:
            result = await box.run(command)
            assert (result.returncode, result.stdout) == (returncode, b""), command
            assert stderr in result.stderr, command
        assert (await box.run(["pwd"], cwd="absent")).returncode == 126
        assert (await box.run(["sh", "-c", "echo hi > /dev/stdout; cat /dev/stdin >&2"], input=b"in")).stderr == b"in"
        with pytest.raises(ValueError, match="empty"):
            await box.run([])

    in_sandbox(test)


def test_limits_hold_for_memory_files_and_cpu() -> None:
    limits = SandboxLimits(memory_bytes=256 * MIB, file_bytes=MIB, open_files=20, cpu_seconds=1)
    greedy = shell("head -c 300M /dev/zero | tail > /dev/null", limits)
    assert greedy.out_of_memory or b"memory" in greedy.stderr  # by a control group, or by the process's own limit
    assert shell("head -c 2M /dev/zero > file", limits).returncode == 153  # SIGXFSZ
    assert shell("ulimit -n", limits).stdout == b"20\n"
    assert shell("while :; do :; done", limits).returncode == 137
    shared = SandboxLimits(file_bytes=GIB, shared_memory_bytes=MIB)
    assert b"No space left" in shell("head -c 2M /dev/zero > /dev/shm/x", shared).stderr
    with pytest.raises(ValueError, match="memory_bytes"):
        SandboxLimits(memory_bytes=MIB)
