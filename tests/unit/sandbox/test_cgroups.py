"""Control groups: v1 for real where they can be written, v2 against a folder that stands in for its file system.

What the folder cannot show: that the kernel keeps these limits. It shows which files are written, in which order.
"""

import asyncio
import logging
import os
import subprocess
from pathlib import Path

import pytest

from megatron_klong.sandbox import cgroups
from megatron_klong.sandbox.bubblewrap import Bubblewrap, CommandResult, SandboxUnavailable
from megatron_klong.sandbox.cgroups import Cgroups, CgroupsUnavailable
from megatron_klong.sandbox.limits import GIB, MIB, SandboxLimits
from tests.unit.sandbox.machine import alive, in_sandbox, runner, runner_directories, shell, soon

LIMITS = SandboxLimits(memory_bytes=128 * MIB, processes=30, cpus=0.5)


@pytest.fixture(scope="module")
def writable() -> None:
    """Skip, with the reason, where no control group can be made."""
    try:
        assert cgroups.find(f"{os.getpid()}-probe").remove()
    except CgroupsUnavailable as error:
        pytest.skip(f"no control groups on this machine: {error}")


# --- for real -------------------------------------------------------------------------------------

pytestmark_real = pytest.mark.usefixtures("writable")


@pytestmark_real
def test_memory_is_that_of_all_processes_and_its_end_is_told() -> None:
    hold = "python3 -c 'import time; x = bytearray(60 << 20); print(len(x)); time.sleep(1)'"
    one = shell(hold, LIMITS)
    assert (one.returncode, one.out_of_memory, one.notice) == (0, False, "")
    three = shell(f"{hold} & {hold} & {hold} & wait", LIMITS)
    assert three.out_of_memory
    assert "128 MiB" in three.notice
    shared = shell(
        "head -c 300M /dev/zero > /dev/shm/x", SandboxLimits(memory_bytes=128 * MIB, shared_memory_bytes=GIB)
    )
    assert (shared.returncode, shared.out_of_memory) == (137, True)
    reserved = shell("python3 -c 'import mmap; mmap.mmap(-1, 2 << 30, flags=34)'", LIMITS)
    assert reserved.returncode == 0, "reserving is not using"


@pytestmark_real
def test_files_written_count_as_memory_only_until_they_are_on_disk() -> None:
    result = shell("head -c 400M /dev/zero > x && cat x | wc -c", LIMITS)
    assert (result.stdout, result.out_of_memory) == (b"419430400\n", False)


@pytestmark_real
def test_processes_and_cpu_time_are_those_of_the_sandbox_not_of_the_command(mark: str) -> None:
    async def test(box: Bubblewrap) -> CommandResult:
        fork = f"for i in $(seq 29); do sleep {mark} & done; wait"
        for _ in range(2):
            await box.start(["bash", "-c", fork], output_path="log")
        await asyncio.sleep(1)
        with pytest.raises(OSError, match="fork"):
            await box.start(["sleep", mark], output_path="log")
        assert box._place.group is not None
        current = box._place.group.directories["pids"] / "pids.current"
        assert int(current.read_text()) <= 30 + 2 * 17
        full = await box.run(["sh", "-c", "true & true & true & wait"])
        assert full.returncode in (2, 126)  # of the script itself, or of what was to start it
        assert b"fork" in full.stderr
        for background in box.background:
            await background.stop()
        spin = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.4: pass"
        return await box.run(["python3", "-c", spin])

    assert in_sandbox(test, LIMITS).seconds > 0.6


@pytestmark_real
def test_groups_are_named_after_the_sandbox_and_gone_with_it(temporary: dict[str, str], mark: str) -> None:
    async def main() -> None:
        box = await Bubblewrap.create(label="task sample/1")
        assert box._place.group is not None
        directories = list(box._place.group.directories.values())
        assert {directory.name for directory in directories} == {box._place.directory.name}
        assert directories[0].name.startswith("task-sample-1-")
        await box.run(["true"])
        await box.close()
        assert not any(directory.exists() for directory in directories)

    asyncio.run(main())
    program = f"""
box = await Bubblewrap.create()
print(box._place.group.directories["memory"].parent, flush=True)
await box.run(["sleep", "{mark}"])"""
    process = runner(program, temporary)
    assert process.stdout is not None
    group = Path(process.stdout.readline().strip())
    assert soon(lambda: alive(mark) != [], 20)
    process.kill()
    process.communicate()
    assert group.is_dir()
    stray = subprocess.Popen(["sleep", "600"])  # as if something had outlived the runner
    (next(group.glob("sandbox-*")) / "cgroup.procs").write_text(str(stray.pid))
    assert runner("await (await Bubblewrap.create()).close()", temporary).communicate() == ("", "")
    assert stray.wait(5) == -9
    assert not group.exists()
    assert runner_directories(temporary) == []


@pytestmark_real
def test_leaving_without_closing_removes_the_groups(temporary: dict[str, str]) -> None:
    program = """
box = await Bubblewrap.create()
if os.fork() == 0:
    atexit._run_exitfuncs()
    os._exit(0)
os.wait()
assert (await box.run(["true"])).returncode == 0
print(box._place.group.directories["memory"].parent)
raise SystemExit"""
    output, errors = runner(program, temporary).communicate()
    assert errors == ""
    assert not Path(output.strip()).exists()


def test_without_groups_single_processes_are_limited_and_that_is_said_once(
    temporary: dict[str, str],
) -> None:
    program = """
import logging
from megatron_klong.sandbox import cgroups
from megatron_klong.sandbox.limits import MIB, SandboxLimits
logging.basicConfig(level=logging.INFO)
def refuse(*ignored, **also): raise cgroups.CgroupsUnavailable("none may be written")
cgroups.find = refuse
for _ in range(2):
    async with await Bubblewrap.create(limits=SandboxLimits(memory_bytes=256 * MIB)) as box:
        print((await box.run(["sh", "-c", "ulimit -v"])).stdout)"""
    output, errors = runner(program, temporary).communicate()
    assert output == "b'262144\\n'\n" * 2, errors
    assert errors.count("none may be written") == errors.count("limits hold for single processes only") == 1


# --- v2, in a folder ------------------------------------------------------------------------------


def v2(tmp_path: Path, *, own: str = "/job", controllers: str = "cpuset cpu io memory pids") -> tuple[Path, Path]:
    """(what stands for /proc/self, the runner's own group)."""
    proc, mount = tmp_path / "proc", tmp_path / "cgroup fs"
    group = mount / own.lstrip("/")
    group.mkdir(parents=True)
    proc.mkdir()
    escaped = str(mount).replace(" ", "\\040")
    (proc / "mountinfo").write_text(
        "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 25 0:26 / {escaped} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    (proc / "cgroup").write_text(f"0::{own}\n")
    (group / "cgroup.controllers").write_text(controllers)
    (group / "cgroup.subtree_control").write_text("")
    (group / "cgroup.procs").write_text("")
    return proc, group


@pytest.fixture
def new_groups_are_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new directory of the real file system has these files from the start, and they go with it."""
    rmdir = Path.rmdir

    def remove(path: Path) -> None:
        if "cgroup fs" in str(path):
            for file in path.iterdir():
                file.unlink()
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", remove)
    mkdir = Path.mkdir

    def make(path: Path, *ignored: object, **options: bool) -> None:
        mkdir(path, **options)  # type: ignore[arg-type]
        if "cgroup fs" in str(path):
            for name in ("cgroup.controllers", "cgroup.kill", "memory.swap.max", "cgroup.procs"):
                (path / name).touch()

    monkeypatch.setattr(Path, "mkdir", make)


@pytest.mark.usefixtures("new_groups_are_v2")
def test_v2_one_group_holds_all_limits(tmp_path: Path) -> None:
    proc, own = v2(tmp_path)
    found = cgroups.find("7-8", proc=proc)
    assert found.controllers == {"memory", "pids", "cpu"}
    assert cgroups.planned("7-8", proc=proc) == [own / "klong-7-8"]
    group = found.make("box-1", LIMITS)
    directory = own / "klong-7-8" / "box-1"
    assert set(group.directories.values()) == {directory}
    contents = {file.name: file.read_text() for file in directory.iterdir() if file.read_text()}
    assert contents == {
        "memory.max": str(128 * MIB),
        "memory.swap.max": "0",
        "pids.max": str(30 + 2 * 17),
        "cpu.max": "50000 100000",
    }
    (directory / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\n")
    assert group.memory_kills() == 2
    (directory / "pids.current").write_text("61")
    assert group.full()
    group.kill()
    assert (directory / "cgroup.kill").read_text() == "1"
    assert group.join[:2] == (b"/bin/sh", b"-c")
    joined = subprocess.run([*group.join, b"echo", b"in"], capture_output=True, text=True, check=True)
    assert joined.stdout == "in\n"
    assert (directory / "cgroup.procs").read_text() == "0\n"
    unlimited = found.make("box-2", SandboxLimits())
    assert not (unlimited.directories["cpu"] / "cpu.max").exists()


@pytest.mark.usefixtures("new_groups_are_v2")
def test_v2_a_runner_that_was_moved_to_the_leaf_goes_on_beside_it(tmp_path: Path) -> None:
    proc, own = v2(tmp_path, own="/job/klong-runners")
    for name, content in (("cgroup.controllers", "memory pids cpu"), ("cgroup.subtree_control", "memory pids cpu")):
        (own.parent / name).write_text(content)
    found = cgroups.find("7-8", proc=proc)
    assert set(found.parents.values()) == {own.parent / "klong-7-8"}


@pytest.mark.usefixtures("new_groups_are_v2")
def test_v2_processes_are_moved_to_a_leaf_where_the_kernel_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, own = v2(tmp_path)
    (own / "cgroup.procs").write_text("41\n42\n")
    write, moved = Path.write_text, []

    def kernel(path: Path, content: str) -> int:
        if path == own / "cgroup.subtree_control" and (own / "cgroup.procs").read_text():
            raise OSError(16, "Device or resource busy")
        if path == own / "klong-runners" / "cgroup.procs":
            moved.append(content)
            left = [pid for pid in (own / "cgroup.procs").read_text().split() if pid != content]
            write(own / "cgroup.procs", "\n".join(left))
        return write(path, content)

    monkeypatch.setattr(Path, "write_text", kernel)
    assert cgroups.find("7-8", proc=proc).controllers == {"memory", "pids", "cpu"}
    assert moved == ["41", "42"]


@pytest.mark.usefixtures("new_groups_are_v2")
def test_v2_only_what_is_handed_down_is_used_and_the_rest_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proc, _ = v2(tmp_path, controllers="pids")
    with caplog.at_level(logging.INFO):
        assert cgroups.find("7-8", proc=proc).controllers == {"pids"}
    assert [line.split(" in ")[1].split(":")[0] for line in caplog.messages] == ["memory", "cpu"]
    proc, _ = v2(tmp_path / "none", controllers="")
    with pytest.raises(CgroupsUnavailable, match="not given this controller"):
        cgroups.find("7-8", proc=proc)


@pytest.mark.usefixtures("new_groups_are_v2")
def test_groups_that_cannot_be_joined_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, _ = v2(tmp_path)
    monkeypatch.setattr(cgroups, "_join", lambda *ignored: (b"/bin/sh", b"-c", b"echo refused >&2; exit 125"))
    with pytest.raises(CgroupsUnavailable, match="not joined: refused"):
        cgroups.find("7-8", proc=proc)


@pytest.mark.usefixtures("new_groups_are_v2")
def test_groups_that_cannot_be_set_or_removed_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*ignored: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(cgroups, "_settings", refuse)
    proc, _ = v2(tmp_path / "set")
    with pytest.raises(CgroupsUnavailable, match="busy"):
        cgroups.find("7-8", proc=proc)
    monkeypatch.setattr(cgroups, "_settings", lambda *ignored: [])
    monkeypatch.setattr(cgroups, "REMOVE_SECONDS", 0.05)
    monkeypatch.setattr(cgroups.Group, "remove", lambda self: False)
    proc, _ = v2(tmp_path / "removed")
    with pytest.raises(CgroupsUnavailable, match="not removed"):
        cgroups.find("7-8", proc=proc)


def test_without_any_hierarchy_the_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text("25 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    (tmp_path / "cgroup").write_text("")
    with pytest.raises(CgroupsUnavailable, match="no such hierarchy is mounted"):
        cgroups.find("7-8", proc=tmp_path)
    assert cgroups.planned("7-8", proc=tmp_path) == []


def test_a_containers_view_of_v1_is_taken_from_its_root(tmp_path: Path) -> None:
    for controller in ("memory", "pids", "cpu,cpuacct"):
        (tmp_path / controller).mkdir()
    mounts = [
        f"3{n} 25 0:3{n} /docker/abc {tmp_path / name} rw - cgroup cgroup rw,{name}"
        for n, name in enumerate(("memory", "pids", "cpu,cpuacct"))
    ]
    (tmp_path / "mountinfo").write_text("\n".join(mounts))
    (tmp_path / "cgroup").write_text("3:memory:/docker/abc/inner\n2:pids:/docker/abc\n1:cpu,cpuacct:/elsewhere\n")
    assert cgroups.planned("7-8", proc=tmp_path) == [
        tmp_path / "memory" / "inner" / "klong-7-8",
        tmp_path / "pids" / "klong-7-8",
        tmp_path / "cpu,cpuacct" / "klong-7-8",
    ]


@pytestmark_real
def test_a_group_that_cannot_be_made_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Cgroups, name: str, limits: SandboxLimits) -> None:
        raise OSError(28, "No space left on device")

    async def main() -> None:
        monkeypatch.setattr(Cgroups, "make", refuse)
        with pytest.raises(SandboxUnavailable, match="control group"):
            await Bubblewrap.create()
        monkeypatch.undo()
        await (await Bubblewrap.create()).close()

    asyncio.run(main())
