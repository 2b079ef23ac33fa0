"""How commands, sandboxes and their runners end: everything inside dies, and nothing is left.

Nothing is faked but, in the last tests, a bwrap that does not work.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import time
import tracemalloc
from pathlib import Path

import anyio
import pytest

from megatron_klong.sandbox.bubblewrap import (
    Bubblewrap,
    CommandResult,
    CommandTimeout,
    OutputLimitExceeded,
    SandboxUnavailable,
)
from megatron_klong.sandbox.limits import MIB, SandboxLimits
from tests.unit.sandbox.machine import (
    alive,
    arguments,
    in_sandbox,
    own_children,
    processes,
    runner,
    runner_directories,
    soon,
)

STUBBORN = {
    "ignores_signals": "trap '' TERM INT HUP; while :; do sleep {mark}; done",
    "daemon_holding_stdout": "setsid sleep {mark} & sleep {mark}",
    "double_fork": "(setsid sh -c 'sleep {mark} & sleep {mark} &' &) ; sleep {mark}",
    "stopped": "sleep {mark} & kill -STOP $! ; kill -STOP $$",
}


@pytest.mark.parametrize("script", STUBBORN.values(), ids=STUBBORN.keys())
@pytest.mark.parametrize("end", ["timeout", "asyncio_cancel", "anyio_scope", "close"])
def test_everything_dies_at_once_however_the_command_is_ended(script: str, end: str, mark: str) -> None:
    async def test(box: Bubblewrap) -> float:
        before = own_children()  # of other tests
        command = ["bash", "-c", "echo partial; " + script.format(mark=mark)]
        if end == "timeout":
            started = time.monotonic() + 1
            with pytest.raises(CommandTimeout) as timeout:
                await box.run(command, timeout_seconds=1)
            assert timeout.value.stdout == b"partial\n"
        elif end == "anyio_scope":
            started = time.monotonic() + 0.3
            with anyio.move_on_after(0.3) as scope:
                await box.run(command)
            assert scope.cancelled_caught
        else:
            task = asyncio.create_task(box.run(command))
            await asyncio.sleep(0.3)
            started = time.monotonic()
            if end == "close":
                await box.close()
                with pytest.raises(SandboxUnavailable, match="closed"):
                    await task
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert alive(mark) == []
        assert own_children() == before
        return time.monotonic() - started

    assert in_sandbox(test) < 1.0


def test_what_a_command_leaves_running_is_dead_when_it_returns(mark: str) -> None:
    async def test(box: Bubblewrap) -> None:
        for script in (
            f"setsid sleep {mark} & echo done",
            f"(setsid sh -c 'sleep {mark} & sleep {mark} &' &); echo done",
        ):
            result = await box.run(["bash", "-c", script], timeout_seconds=10)
            assert alive(mark) == []
            assert (result.stdout, result.seconds < 2) == (b"done\n", True)

    in_sandbox(test)


def test_a_flood_is_stopped_in_bounded_time_and_memory() -> None:
    async def test(box: Bubblewrap) -> None:
        before = own_children()  # of other tests
        for script, stream in [
            ("yes", "stdout"),
            ("yes >&2", "stderr"),
            ("trap '' TERM PIPE; yes & yes", "stdout"),
        ]:
            started = time.monotonic()
            with pytest.raises(OutputLimitExceeded) as flood:
                await box.run(["sh", "-c", script])
            assert time.monotonic() - started < 3
            assert (flood.value.stream, flood.value.limit_bytes) == (stream, 4 * MIB)
            assert flood.value.partial == b"y\n" * (2 * MIB)
        assert own_children() == before
        # exactly at the limit is no flood
        assert len((await box.run(["head", "-c", str(4 * MIB), "/dev/zero"])).stdout) == 4 * MIB

    tracemalloc.start()
    in_sandbox(test, SandboxLimits(output_bytes=4 * MIB))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * MIB  # of gigabytes: the buffer, its copy in the error, what that is compared with


def test_large_input_and_output_do_not_wait_for_each_other() -> None:
    async def test(box: Bubblewrap) -> None:
        contents = os.urandom(MIB) * 20
        result = await box.run(["tee", "/dev/stderr"], input=contents, output_bytes=20 * MIB, timeout_seconds=30)
        assert result.stdout == result.stderr == contents
        assert (await box.run(["true"], input=contents)).returncode == 0  # it reads none of it
        await box.write_file("big", contents)
        assert await box.read_file("big") == contents

    in_sandbox(test)


# --- many at once ---------------------------------------------------------------------------------


def test_a_fork_bomb_stays_in_its_sandbox(mark: str) -> None:
    async def main() -> None:
        bomb = await Bubblewrap.create(limits=SandboxLimits(processes=60))
        other = await Bubblewrap.create(limits=SandboxLimits(processes=60))
        async with bomb, other:
            script = f"f() {{ sleep {mark} & f & f & wait; }}; f"
            running = asyncio.create_task(bomb.run(["bash", "-c", script], timeout_seconds=1.5))
            while len(alive(mark)) < 20:
                await asyncio.sleep(0.02)
            for _ in range(5):
                result = await other.run(
                    ["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 0.01 & done; wait; echo ok"]
                )
                assert (result.returncode, result.stdout) == (0, b"ok\n")
                assert len(alive(mark)) <= 60
            with pytest.raises(TimeoutError):
                await running

    asyncio.run(main())


def test_twenty_sandboxes_at_once_each_count_their_own_processes(mark: str) -> None:
    # 20 sandboxes * 25 processes = 500, far over the 40 that each may have
    async def one(number: int) -> CommandResult:
        limits = SandboxLimits(processes=40)
        async with await Bubblewrap.create(limits=limits, label=f"n{number}") as box:
            await box.write_file("me", str(number).encode())
            script = f"for i in $(seq 25); do sleep {mark} & done; sleep 0.5; jobs -r | wc -l; cat me"
            return await box.run(["bash", "-c", script], timeout_seconds=20)

    async def main() -> list[CommandResult]:
        return await asyncio.gather(*(one(number) for number in range(20)))

    results = asyncio.run(main())
    assert [result.stdout.split() for result in results] == [[b"25", str(n).encode()] for n in range(20)]


def test_hundreds_of_commands_leave_no_descriptor_and_no_child() -> None:
    async def test(box: Bubblewrap) -> None:
        children = own_children()  # of other tests
        await box.run(["true"])
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(10):
            await asyncio.gather(*(box.run(["cat"], input=b"x") for _ in range(10)))
            tasks = [asyncio.create_task(box.run(["sleep", "60"])) for _ in range(5)]
            await asyncio.sleep(0.002 * _)  # cancelled at every stage of the set-up
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for _ in range(500):  # the files may just be counted, which takes a descriptor or two
            if sorted(os.listdir("/proc/self/fd")) == before:
                break
            await asyncio.sleep(0.01)
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert own_children() == children

    in_sandbox(test)


# --- the end of a sandbox, and of its runner ------------------------------------------------------


def test_close_removes_whatever_the_agent_made_and_may_be_repeated() -> None:
    async def main() -> None:
        box = await Bubblewrap.create()
        deep = "p=$(printf 'directory-of-24-letters/%.0s' {1..160}); mkdir -p $p; cd $p; mkdir -p $p"
        assert (await box.run(["bash", "-c", deep])).returncode == 0
        await box.run(["sh", "-c", "mkdir -p locked/in; chmod 0 locked/in locked; ln -s / root; chmod 0 /home"])
        await box.close()
        await box.close()
        assert not box._place.directory.exists()
        with pytest.raises(SandboxUnavailable, match="closed"):
            await box.run(["true"])

    asyncio.run(main())


def test_close_finishes_though_its_task_is_cancelled() -> None:
    async def main() -> None:
        box = await Bubblewrap.create()
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with box:
                await box.run(["true"])
        assert scope.cancelled_caught
        assert not box._place.directory.exists()

    asyncio.run(main())


def test_a_killed_runner_leaves_no_process_and_the_next_removes_its_files(temporary: dict[str, str], mark: str) -> None:
    program = f"""
box = await Bubblewrap.create()
command = ["bash", "-c", "trap '' TERM; setsid sleep {mark} & sleep {mark}"]
await asyncio.gather(*(box.run(command) for _ in range(3)))"""
    process = runner(program, temporary)
    assert soon(lambda: len(alive(mark)) >= 6, 20)
    process.kill()
    process.communicate()
    assert soon(lambda: alive(mark) == [], 3)
    assert [path.name.split("-")[0] for path in runner_directories(temporary)] == [str(process.pid)]
    successor = runner("await (await Bubblewrap.create()).close()", temporary)
    assert successor.communicate() == ("", "")
    assert runner_directories(temporary) == []


def test_a_runner_killed_while_sandboxes_start_leaves_no_command_running(temporary: dict[str, str], mark: str) -> None:
    program = f"""
box = await Bubblewrap.create()
print("ready", flush=True)
while True:
    commands = [asyncio.create_task(box.run(["sleep", "{mark}"])) for _ in range(4)]
    await asyncio.wait(commands, timeout=0.001)"""
    for delay in (0.0, 0.004, 0.008, 0.016, 0.03):
        process = runner(program, temporary)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
    time.sleep(0.2)  # what was about to start a program has started it, and has had time to see that it is alone
    assert soon(lambda: alive(mark) == [], 10)
    runner("await (await Bubblewrap.create()).close()", temporary).communicate()
    assert [pid for pid in processes() if temporary["TMPDIR"].encode() in arguments(pid)] == []


def test_a_bwrap_that_waits_for_a_dead_runner_is_killed_with_its_files(temporary: dict[str, str]) -> None:
    # Microseconds are too short to hit: a shell of that name plays it, for a runner with an impossible pid.
    stale = Path(temporary["TMPDIR"]) / f"klong-sandboxes-{os.geteuid()}" / f"{2**22 + 1}-1"
    (stale / "box").mkdir(parents=True)
    stale.parent.chmod(0o711)
    program = shutil.copy(os.path.realpath("/bin/sh"), Path(temporary["TMPDIR"]) / "bwrap")
    waiting = subprocess.Popen([program, "-c", "read word", "sh", f"{stale}/box/home"], stdin=subprocess.PIPE)
    assert runner("await (await Bubblewrap.create()).close()", temporary).communicate() == ("", "")
    assert waiting.wait(5) == -signal.SIGKILL
    waiting.communicate()
    assert not stale.exists()


def test_a_runner_that_forgets_to_close_cleans_up_at_exit_and_its_forks_do_not(
    temporary: dict[str, str],
) -> None:
    program = """
box = await Bubblewrap.create()
await box.write_file("x", b"x")
if os.fork() == 0:
    atexit._run_exitfuncs()
    os._exit(0)
os.wait()
assert await box.read_file("x") == b"x"
raise SystemExit("forgot")"""
    assert runner(program, temporary).communicate()[1] == "forgot\n"
    assert runner_directories(temporary) == []


# --- when there is no bubblewrap ------------------------------------------------------------------


def fake_bwrap(script: str, environment: dict[str, str]) -> dict[str, str]:
    """A PATH on which the system's programs come after a bwrap of ours."""
    programs = Path(environment["TMPDIR"]) / "bin"
    programs.mkdir()
    (programs / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "bwrap").chmod(0o755)
    return {**environment, "PATH": f"{programs}:/usr/bin:/bin"}


PROBE = """
bubblewrap.PROBE_SECONDS = 0.5
for _ in range(2):
    try:
        await Bubblewrap.create()
    except bubblewrap.SandboxUnavailable as error:
        print(error)"""


def test_without_bubblewrap_the_message_says_what_to_install(temporary: dict[str, str]) -> None:
    environment = {**temporary, "PATH": "/nonexistent"}
    output, errors = runner(PROBE, environment).communicate()
    assert output.count("bwrap is not on the PATH: install it (apt-get install bubblewrap") == 2, errors


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'bwrap: No permissions to creating new namespace' >&2; exit 1", "unprivileged_userns_clone=1"),
        ("exec sleep 60", "killed after 0.5 seconds"),
        ("exec true", "bwrap ended with 0"),
    ],
    ids=["refused", "hangs", "does_nothing"],
)
def test_a_bubblewrap_that_does_not_work_is_told_with_its_cure(
    script: str, told: str, temporary: dict[str, str]
) -> None:
    output, errors = runner(PROBE, fake_bwrap(script, temporary)).communicate()
    assert output.count(told) == 2, errors
    assert runner_directories(temporary) == []


def test_a_first_try_that_fails_does_not_lock_out_the_next(temporary: dict[str, str]) -> None:
    program = """
from megatron_klong.sandbox import directories
make = directories._make_etc
def refuse(etc): raise OSError(28, "No space left on device")
directories._make_etc = refuse
for _ in range(2):
    try:
        directories.runner_directory()
    except OSError as error:
        print(error)
directories._make_etc = make
await (await Bubblewrap.create()).close()"""
    output, errors = runner(program, temporary).communicate()
    assert output.count("No space left") == 2, errors
    assert errors == ""


def test_a_directory_of_another_user_is_refused(temporary: dict[str, str]) -> None:
    base = Path(temporary["TMPDIR"]) / f"klong-sandboxes-{os.geteuid()}"
    base.mkdir(mode=0o777)
    base.chmod(0o777)
    output, errors = runner(PROBE, temporary).communicate()
    assert output.count("not a directory that only this user can write") == 2, errors
