"""Commands that run on: in the files of their sandbox, printing to a file there, ended by it."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_klong.sandbox.backend import Launch
from megatron_klong.sandbox.bubblewrap import Bubblewrap, SandboxUnavailable
from megatron_klong.sandbox.limits import SandboxLimits
from megatron_klong.sandbox.results import TooManyCommands
from tests.unit.sandbox.machine import alive, in_sandbox, runner, soon


def test_it_runs_on_while_others_come_and_go_and_prints_to_its_file(mark: str) -> None:
    async def test(box: Bubblewrap) -> None:
        script = f"echo started; echo told >&2; read -r line || echo nothing to read; sleep {mark}"
        server = await box.start(["sh", "-c", script], output_path="logs/server.txt", env={"X": "y"})
        assert (server.id, server.running, server.returncode) == ("background-1", True, None)
        assert server.output_path == "/home/logs/server.txt"
        assert box.background == (server,)
        while not alive(mark):
            await asyncio.sleep(0.01)
        for _ in range(3):
            await box.run(["sh", "-c", f"kill -9 -1; sleep {mark} & true"])
        assert len(alive(mark)) >= 1
        assert await box.read_file("logs/server.txt") == b"started\ntold\nnothing to read\n"
        assert server.seconds > 0
        await server.stop()
        await server.stop()
        assert (server.running, server.returncode) == (False, 137)
        assert alive(mark) == []
        assert server.seconds == server.seconds

    in_sandbox(test)


def test_its_end_is_told() -> None:
    async def test(box: Bubblewrap) -> None:
        ended = await box.start(["sh", "-c", "sleep 0.2; setsid sleep 600 & exit 3"], output_path="/tmp/a")
        assert ended.running
        assert await ended.wait() == 3
        assert ended.result is not None
        assert (await box.start(["absent"], output_path="b")).running in (True, False)
        assert await box.background[1].wait() == 127
        assert b"absent: not found" in await box.read_file("b")
        assert [command.id for command in box.background] == ["background-1", "background-2"]

    in_sandbox(test)


def test_what_cannot_be_started_is_an_error_and_leaves_nothing() -> None:
    async def test(box: Bubblewrap) -> None:
        await box.run(["sh", "-c", "mkdir d; mkfifo pipe; touch f"])
        for error, path, cwd in [
            (IsADirectoryError, "d", None),
            (OSError, "pipe", None),
            (OSError, "f/x", None),
            (OSError, "/usr/x", None),
            (OSError, "x", "absent"),
        ]:
            with pytest.raises(error):
                await box.start(["sleep", "60"], output_path=path, cwd=cwd)
        with pytest.raises(ValueError, match="empty"):
            await box.start([], output_path="x")
        with pytest.raises(OSError, match="too long"):
            await box.start(["echo", "x" * 200_000], output_path="x")
        for command, path in [(["a\0"], "x"), (["a"], "x\0")]:
            with pytest.raises(ValueError, match="NUL"):
                await box.start(command, output_path=path)
        assert box.background == ()
        assert box._running == set()

    in_sandbox(test)


def set_up_by(box: Bubblewrap, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a shell script come first in the set-up of the sandbox's commands."""
    launch = box._backend.launch

    @contextmanager
    def preceded(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Launch]:
        with launch(command, environment) as made:
            argv = [b"/bin/sh", b"-c", f'{script}; exec "$@"'.encode(), b"sh", *made.argv]
            yield Launch(argv=argv, descriptors=made.descriptors)

    monkeypatch.setattr(box._backend, "launch", preceded)


def test_what_the_set_up_prints_besides_does_not_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(box: Bubblewrap) -> None:
        set_up_by(box, "echo 'bash: warning: setlocale: cannot change locale' >&2", monkeypatch)
        server = await asyncio.wait_for(box.start(["sleep", "60"], output_path="log"), 20)
        assert server.running
        await server.stop()
        ended = await box.start(["sh", "-c", "exit 3"], output_path="log")
        assert (await ended.wait(), ended.error) == (3, None)
        with pytest.raises(PermissionError, match="/usr/x"):
            await box.start(["sleep", "60"], output_path="/usr/x")

    in_sandbox(test)


def test_a_start_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_klong.sandbox.sandbox.START_SECONDS", 0.2)

    async def test(box: Bubblewrap) -> None:
        set_up_by(box, "exec sleep 60", monkeypatch)
        with pytest.raises(TimeoutError, match=r"did not start within 0\.2 seconds"):
            await box.start(["true"], output_path="log")
        while box._running:
            await asyncio.sleep(0.01)
        assert box.background == ()

    in_sandbox(test)


def test_only_so_many_run_at_once() -> None:
    async def test(box: Bubblewrap) -> None:
        first, _ = [await box.start(["sleep", "60"], output_path="x") for _ in range(2)]
        with pytest.raises(TooManyCommands, match="2 background"):
            await box.start(["sleep", "60"], output_path="x")
        await first.stop()
        await box.start(["sleep", "60"], output_path="x")

    in_sandbox(test, SandboxLimits(background_commands=2))


def test_closing_ends_it_and_so_does_the_death_of_the_runner(mark: str, temporary: dict[str, str]) -> None:
    async def main() -> None:
        async with await Bubblewrap.create() as box:
            script = f"trap '' TERM; setsid sleep {mark} & sleep {mark}"
            started = [await box.start(["bash", "-c", script], output_path=str(n)) for n in range(3)]
            while len(alive(mark)) < 6:
                await asyncio.sleep(0.01)
        assert alive(mark) == []
        assert [(command.running, command.returncode) for command in started] == [(False, 137)] * 3
        with pytest.raises(SandboxUnavailable, match="closed"):
            await box.start(["true"], output_path="x")

    asyncio.run(main())
    program = f"""
box = await Bubblewrap.create()
await box.start(["sleep", "{mark}"], output_path="x")
print("started", flush=True)
await asyncio.sleep(60)"""
    process = runner(program, temporary)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    assert soon(lambda: alive(mark) != [], 10)
    process.kill()
    process.communicate()
    assert soon(lambda: alive(mark) == [], 3)


def test_cancelling_its_start_leaves_nothing(mark: str) -> None:
    async def test(box: Bubblewrap) -> None:
        for delay in (0.0, 0.002, 0.005, 0.01):
            starting = asyncio.create_task(box.start(["sleep", mark], output_path="x"))
            await asyncio.sleep(delay)
            starting.cancel()
            await asyncio.wait([starting])
            for command in box.background:  # it was quicker
                await command.stop()
        while box._running:
            await asyncio.sleep(0.01)
        assert alive(mark) == []

    in_sandbox(test)


def test_its_output_file_cannot_lead_out_of_the_sandbox(tmp_path: Path) -> None:
    target = tmp_path / "target"

    async def test(box: Bubblewrap) -> None:
        await box.run(["ln", "-s", str(target), "link"])
        with pytest.raises(OSError, match="link"):
            await box.start(["echo", "taken over"], output_path="link")

    in_sandbox(test)
    assert not target.exists()
