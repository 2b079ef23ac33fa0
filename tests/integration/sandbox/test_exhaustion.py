"""Attempts to use up the machine from inside a sandbox: processes, memory, disk, output. See test_escapes.py."""

import asyncio
import shutil
import tempfile

import psutil
import pytest

from megatron_klong.sandbox.bubblewrap import Bubblewrap, OutputLimitExceeded, SandboxUnavailable
from megatron_klong.sandbox.directories import PARTS, runner_cgroups
from megatron_klong.sandbox.disk import count
from megatron_klong.sandbox.limits import GIB, MIB, SandboxLimits
from tests.unit.sandbox.machine import alive, in_sandbox, shell

pytestmark = pytest.mark.usefixtures("the_host_is_as_it_was")

LIMITS = SandboxLimits(memory_bytes=256 * MIB, processes=100, disk_bytes=128 * MIB, files=2000, file_bytes=96 * MIB)


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
