"""Attempts to outlive a command, a sandbox or its runner, however those end. See test_escapes.py."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_klong.sandbox.bubblewrap import Bubblewrap
from tests.unit.sandbox.machine import alive, in_sandbox, runner, runner_directories, shell, soon

pytestmark = pytest.mark.usefixtures("the_host_is_as_it_was")


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
    found = shell("ulimit -c; ulimit -c unlimited; sh -c 'kill -SEGV $$'; ls -a")
    assert found.stdout.split() == [b"0", b".", b".."]


def test_a_terminal_cannot_be_written_to() -> None:
    master, slave = os.openpty()
    try:
        program = "import fcntl, sys\nfor n in (0x5412, 0x541C):\n  fcntl.ioctl(sys.stdin, n, b'x')"
        result = shell(f'tty; python3 -c "{program}"; echo x > /dev/tty; ls /dev/pts')
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
