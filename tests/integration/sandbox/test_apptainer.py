"""The Apptainer provider: its exact command lines, and whole episodes through a stand-in of that name.

What this cannot show is that Apptainer does what its arguments ask for. The stand-in is `apptainer_stand_in.py`.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash
from inspect_ai.util import SandboxEnvironmentSpec

from megatron_klong.sandbox import apptainer
from megatron_klong.sandbox.apptainer import Apptainer, ApptainerBackend, ApptainerTools
from megatron_klong.sandbox.backend import SandboxSpec
from megatron_klong.sandbox.config import ApptainerConfig, BubblewrapConfig
from megatron_klong.sandbox.first_process import STARTED
from megatron_klong.sandbox.limits import GIB, MIB, SandboxLimits
from megatron_klong.sandbox.place import Place
from megatron_klong.sandbox.results import SandboxUnavailable
from tests.integration.sandbox.test_provider import evaluate, sandbox_directories, tool_outputs
from tests.unit.sandbox.machine import alive

TOOLS = ApptainerTools(apptainer="/opt/bin/apptainer", setpriv="/usr/bin/setpriv", limits=True)
IMAGE = Path("/images/agent.sif")


@pytest.fixture
def image(temporary: dict[str, str]) -> Path:
    """What the stand-in takes for an image."""
    folder = Path(temporary["TMPDIR"]) / "image"
    folder.mkdir(mode=0o755)
    (folder / "hello").write_text("of the image\n")
    Path(temporary["TMPDIR"]).chmod(0o755)
    return folder


@pytest.fixture
def stand_in(temporary: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with an `apptainer` on it, for a user who seems not to be root."""
    programs = Path(temporary["TMPDIR"]) / "bin"
    programs.mkdir()
    source = Path(__file__).with_name("apptainer_stand_in.py").read_text()
    (programs / "apptainer").write_text(f"#!{sys.executable}\n{source}")
    (programs / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(apptainer, "is_root", lambda: False)
    monkeypatch.setattr(apptainer, "_found", {})
    return programs


def words(spec: SandboxSpec, **options: bool) -> list[str]:
    place = Place(directory=Path("/tmp/runner/box"), group=None)
    backend = ApptainerBackend(tools=TOOLS, place=place, spec=spec, **options)
    with backend.launch(["/bin/sh", "-c", "script"], {"A": "1,2", "HOME": "/home"}) as launch:
        assert launch.descriptors == ()
        return [argument.decode() for argument in launch.argv]


def test_the_command_line_is_exactly_this() -> None:
    assert words(SandboxSpec(image=IMAGE, limits=SandboxLimits(memory_bytes=GIB, processes=100, cpus=1.5))) == [
        *("/usr/bin/setpriv", "--pdeathsig", "KILL", "--no-new-privs"),
        *("/opt/bin/apptainer", "--silent", "exec"),
        *("--userns", "--containall", "--no-home", "--cleanenv", "--no-eval", "--no-init", "--no-privs"),
        *("--no-mount", "sys,hostfs,bind-paths", "--hostname", "sandbox"),
        *("--net", "--network", "none"),
        *("--memory", "1073741824", "--memory-swap", "1073741824", "--pids-limit", "100", "--cpus", "1.5"),
        *("--bind", "/tmp/runner/box/home:/home:rw", "--bind", "/tmp/runner/box/tmp:/tmp:rw"),
        *("--bind", "/tmp/runner/box/tmp:/var/tmp:rw"),
        *("--pwd", "/", "/images/agent.sif"),
        *("/usr/bin/env", "-i", "A=1,2", "HOME=/home", "/bin/sh", "-c", "script"),
    ]


def test_a_network_gpus_and_files_change_it(tmp_path: Path) -> None:
    class Network:
        def enter(self) -> list[str]:
            return ["/usr/bin/nsenter", "--net=/proc/1/fd/2", "--"]

    (tmp_path / "ca.pem").touch()
    spec = SandboxSpec(image=IMAGE, network=Network(), read_only_files={"/run/ca.pem": tmp_path / "ca.pem"})
    argv = words(spec, gpus=True)
    assert argv[:4] == ["/usr/bin/nsenter", "--net=/proc/1/fd/2", "--", "/usr/bin/setpriv"]
    assert "--net" not in argv
    assert "--nv" in argv
    assert f"{tmp_path}/ca.pem:/run/ca.pem:ro" in argv
    (tmp_path / "a,b").touch()
    with pytest.raises(ValueError, match="takes no path with"):
        words(SandboxSpec(image=IMAGE, read_only_files={"/x": tmp_path / "a,b"}))


def test_limits_are_asked_of_apptainer_only_where_there_are_no_groups_of_ours() -> None:
    spec = SandboxSpec(image=IMAGE)
    assert "--memory" in words(spec)
    without = ApptainerTools(apptainer="/opt/bin/apptainer", setpriv="/usr/bin/setpriv", limits=False)
    backend = ApptainerBackend(tools=without, place=Place(directory=Path("/tmp/x"), group=None), spec=spec)
    assert b"--memory" not in backend._fixed


def in_sandbox(image: Path, test: Callable[[Apptainer], Awaitable[Any]], **options: Any) -> None:
    async def main() -> None:
        async with await Apptainer.create(image=image, **options) as box:
            await test(box)
        assert not box._place.directory.exists()

    asyncio.run(main())


@pytest.mark.usefixtures("stand_in")
def test_commands_files_variables_and_background_commands(image: Path, mark: str) -> None:
    async def test(box: Apptainer) -> None:
        result = await box.run(["sh", "-c", "cat /image/hello; echo $A; ls /root /work; pwd"], cwd="/tmp")
        assert result.stdout.splitlines() == [b"of the image", b"one,two", b"/tmp"]
        names = [line.partition(b"=")[0] for line in (await box.run(["env"])).stdout.splitlines()]
        assert sorted(names) == [b"A", b"HOME", b"LANG", b"PATH", b"PWD"]
        await box.write_file("a/b", b"\0content\n")
        assert await box.read_file("/home/a/b") == b"\0content\n"
        with pytest.raises(FileNotFoundError):
            await box.read_file("absent")
        tar = await box.read_archive("a", limit_bytes=MIB)
        await box.write_archive("copy", tar)
        assert await box.read_file("copy/b") == b"\0content\n"
        background = await box.start(["sleep", mark], output_path="log")
        left = await box.run(["sh", "-c", f"setsid sleep {mark}9 & exit 3"])
        assert (left.returncode, alive(f"{mark}9")) == (3, [])
        with pytest.raises(TimeoutError):
            await box.run(["sleep", f"{mark}8"], timeout_seconds=0.5)
        assert alive(f"{mark}8") == []
        assert background.running
        assert "apptainer" in box.login()

    in_sandbox(image, test, environment={"A": "one,two"})


@pytest.mark.usefixtures("stand_in")
def test_limits_hold(image: Path) -> None:
    async def test(box: Apptainer) -> None:
        script = "i=0; while :; do i=$((i+1)); dd if=/dev/zero of=x$i bs=1M count=8 status=none; sleep 0.01; done"
        assert (await box.run(["sh", "-c", script], timeout_seconds=30)).out_of_disk
        if box._place.memory_is_limited:
            hungry = await box.run(["python3", "-c", "bytearray(300 << 20)"])
            assert (hungry.returncode, hungry.out_of_memory) == (137, True)

    in_sandbox(image, test, limits=SandboxLimits(disk_bytes=64 * MIB, memory_bytes=128 * MIB))


@pytest.mark.usefixtures("stand_in")
def test_an_evaluation_runs_in_it(image: Path, tmp_path: Path) -> None:
    spec = SandboxEnvironmentSpec("apptainer", ApptainerConfig(image=image, processes=33, environment={"A": "b"}))
    task = Task(dataset=[Sample("?")], solver=[use_tools(bash()), generate()], sandbox=spec)
    log = evaluate(task, ["cat /image/hello; ulimit -u; echo $A > kept", "cat kept"], tmp_path)
    assert tool_outputs(log) == ["of the image\n33\n", "b\n"]
    assert log.eval.sandbox is not None
    assert log.eval.sandbox.config == spec.config
    assert sandbox_directories() == []


def test_what_is_missing_is_told_before_a_sample_starts(
    image: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def why(path: Path) -> str:
        apptainer._found.clear()
        with pytest.raises(SandboxUnavailable) as error:
            await Apptainer.create(image=path)
        return str(error.value)

    assert "apptainer build" in asyncio.run(why(image / "absent.sif"))
    broken = stand_in / "apptainer"
    works = broken.read_text()
    broken.write_text("#!/bin/sh\necho 'FATAL:   while extracting image: no squashfuse' >&2\nexit 255\n")
    assert "no squashfuse" in asyncio.run(why(image))
    broken.write_text(works)
    monkeypatch.setattr(apptainer, "is_root", lambda: True)
    assert "run as another user" in asyncio.run(why(image))
    monkeypatch.setattr(apptainer, "is_root", lambda: False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "module load apptainer" in asyncio.run(why(image))
    monkeypatch.undo()
    for config in (None, BubblewrapConfig()):
        task = Task(dataset=[Sample("?")], sandbox=SandboxEnvironmentSpec("apptainer", config))
        with pytest.raises(PrerequisiteError, match="takes an ApptainerConfig with an image"):
            evaluate(task, [], tmp_path)


def test_the_stand_in_refuses_what_apptainer_would_not_know(stand_in: Path, image: Path) -> None:
    async def main() -> None:
        tools = ApptainerTools(
            apptainer=str(stand_in / "apptainer"), setpriv=shutil.which("setpriv") or "", limits=False
        )
        async with await Apptainer._create(tools, SandboxSpec(image=image), "x") as box:
            backend = box._backend
            assert isinstance(backend, ApptainerBackend)
            backend._fixed.insert(backend._fixed.index(b"--userns"), b"--no-such-thing")
            with pytest.raises(SandboxUnavailable, match="unknown flag: --no-such-thing"):
                await box.run(["true"])
        assert STARTED == b"\0"

    asyncio.run(main())
