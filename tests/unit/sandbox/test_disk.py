"""What a sandbox's files may take: counting them, and the end of commands that write too much."""

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_klong.sandbox import disk
from megatron_klong.sandbox.bubblewrap import Bubblewrap
from megatron_klong.sandbox.directories import remove
from megatron_klong.sandbox.disk import DiskWatch, Usage, count, descendants
from megatron_klong.sandbox.limits import GIB, KIB, MIB, SandboxLimits
from tests.unit.sandbox.machine import in_sandbox

LIMITS = SandboxLimits(disk_bytes=64 * MIB, files=500, file_bytes=GIB)


@pytest.fixture
def folder() -> Iterator[Path]:
    """On the disk: blocks are not counted everywhere else."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    (folder / "home").mkdir()
    yield folder
    remove(folder)


def counted(folder: Path, *pids: int, **most: int) -> Usage:
    limits = {"most_bytes": GIB, "most_files": 100_000} | most
    return count(folder, ["home", "tmp"], pids, **limits)


def test_blocks_are_counted_once_and_links_are_not_followed(folder: Path) -> None:
    home = folder / "home"
    (home / "a").write_bytes(bytes(40 * KIB))
    (home / "again").hardlink_to(home / "a")
    (home / "sub").mkdir()
    (home / "sub" / "b").write_bytes(bytes(20 * KIB))
    (home / "out").symlink_to("/usr")
    with (home / "sparse").open("wb") as sparse:
        sparse.truncate(GIB)
    directory = (home / "sub").stat().st_blocks * 512
    assert counted(folder) == Usage(bytes=60 * KIB + directory, files=6)
    assert counted(folder, most_files=3).files == 4
    assert 10 * KIB < counted(folder, most_bytes=10 * KIB).bytes < 60 * KIB


def test_where_a_count_is_led_astray_the_rest_is_counted_and_that_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "home" / "sub").mkdir()
    (folder / "tmp").mkdir()
    (folder / "tmp" / "hidden").write_bytes(bytes(40 * KIB))
    assert counted(folder).complete
    opened = disk._open_directory
    monkeypatch.setattr(disk, "_open_directory", lambda name, parent: None if name == ".." else opened(name, parent))
    found = counted(folder)
    assert (found.complete, found.files) == (False, 2)
    assert found.bytes >= 40 * KIB


class Watched:
    """A watch with a limit of 100 bytes and 100 files, on a file system and files that the test makes up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = (1000, 1000)
        self.held = Usage(bytes=0, files=0)
        self.counts = 0
        monkeypatch.setattr(disk, "free", lambda path: self.free)
        monkeypatch.setattr(disk, "count", self._count)
        self.watch = DiskWatch(Path("/x"), ["home"], most_bytes=100, most_files=100)

    def _count(self, *ignored: object, **limits: int) -> Usage:
        self.counts += 1
        return self.held

    def exceeded(self) -> bool:
        return asyncio.run(self.watch.exceeded(lambda: ()))

    def before_command(self) -> None:
        asyncio.run(self.watch.before_command(lambda: ()))


def test_what_cannot_be_counted_is_taken_for_as_much_as_the_file_system_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.free, watched.held = (940, 1000), Usage(bytes=10, files=1, complete=False)
    assert not watched.exceeded()
    assert not watched.watch.full
    watched.free = (880, 1000)
    watched.before_command()
    assert (watched.watch.full, watched.watch.usage.bytes) == (True, 120)
    assert watched.exceeded(), "a command that was begun meanwhile allows nothing more"
    watched.held = Usage(bytes=10, files=1)
    assert not watched.exceeded()
    assert not watched.watch.full
    watched.held, watched.free = Usage(bytes=10, files=1, complete=False), (880, 850)
    assert watched.exceeded(), "so many files were made"


def test_what_may_exceed_the_limit_is_counted_at_once_however_long_the_last_count_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(monkeypatch)
    watched.watch._count_seconds = 1000.0
    watched.free, watched.held = (920, 1000), Usage(bytes=80, files=1)
    assert (watched.exceeded(), watched.counts) == (False, 0)
    watched.free, watched.held = (890, 1000), Usage(bytes=110, files=1)
    assert (watched.exceeded(), watched.counts) == (True, 1)


def test_what_others_delete_hides_nothing_that_is_written_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.watch._count_seconds = 1.0
    watched.free = (5000, 1000)
    assert (watched.exceeded(), watched.counts) == (False, 0)
    watched.free, watched.held = (4890, 1000), Usage(bytes=110, files=1)
    assert (watched.exceeded(), watched.counts) == (True, 1)


@pytest.mark.parametrize(("counting", "age"), [(0.001, 1.0), (0.01, 5.0), (0.1, 30.0), (100.0, 400.0)])
def test_where_nothing_seems_to_be_written_it_is_counted_for_a_small_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch, counting: float, age: float
) -> None:
    watched = Watched(monkeypatch)
    watched.held = Usage(bytes=110, files=1)  # and as much was deleted by others
    watched.watch._count_seconds = counting
    now = watched.watch._counted_at + age * 0.99
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert (watched.exceeded(), watched.counts) == (False, 0)
    now += age * 0.02
    assert (watched.exceeded(), watched.counts) == (True, 1)


def test_processes_of_any_depth_are_found() -> None:
    deep = (
        "import os, time\nfor _ in range(60):\n if os.fork(): os.wait(); os._exit(0)\nprint(flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", deep], stdout=subprocess.PIPE) as top:
        assert top.stdout is not None
        top.stdout.readline()
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack()) + 40)
        try:
            found = list(descendants(top.pid))
        finally:
            sys.setrecursionlimit(limit)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
    assert len(found) == 60


def test_a_deleted_file_counts_while_it_is_open(folder: Path) -> None:
    before = counted(folder, os.getpid())  # of the test runner
    with (folder / "home" / "x").open("wb") as file, tempfile.TemporaryFile(dir="/dev/shm") as elsewhere:
        file.write(bytes(40 * KIB))
        file.flush()
        elsewhere.write(bytes(40 * KIB))
        elsewhere.flush()
        (folder / "home" / "x").unlink()
        duplicate = os.dup(file.fileno())
        now = counted(folder, os.getpid())
        assert now.bytes - before.bytes == 40 * KIB
        os.close(duplicate)
    assert counted(folder, os.getpid()).bytes == before.bytes


def test_any_depth_is_counted_with_two_descriptors(folder: Path) -> None:
    here = os.open(folder / "home", os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    before = len(os.listdir("/proc/self/fd"))
    assert counted(folder).files == 1000
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tree_that_is_moved_about_meanwhile_ends_the_count_and_leads_nowhere(folder: Path) -> None:
    async def main() -> None:
        box = await Bubblewrap.create(limits=SandboxLimits(files=10**9))
        async with box:
            script = "mkdir -p a/b/c/d e; while :; do mv a/b e/; mv e/b a/; done"
            await box.start(["sh", "-c", script], output_path="/tmp/x")
            for _ in range(300):
                found = count(box._place.directory, ["home", "tmp"], [], most_bytes=GIB, most_files=1000)
                assert found.files <= 12

    asyncio.run(main())


@pytest.mark.parametrize(
    "script",
    [
        "dd if=/dev/zero of=x bs=1M count=3000 status=none",
        "i=0; while :; do i=$((i+1)); dd if=/dev/zero of=x$i bs=1M count=8 status=none; sleep 0.01; done",
        "while :; do exec {fd}>x; rm x; dd if=/dev/zero bs=1M count=8 status=none >&$fd; sleep 0.02; done",
        "mkdir d; cd /tmp; while :; do mkdir d; cd d; dd if=/dev/zero of=y bs=1M count=8 status=none; done",
    ],
    ids=["one_file", "many_files", "deleted_files", "deep"],
)
def test_a_command_that_writes_too_much_is_killed_and_can_make_room(script: str) -> None:
    async def test(box: Bubblewrap) -> None:
        written = await box.run(["bash", "-c", f"echo told; {script}"], timeout_seconds=20)
        if written.returncode != 153:  # its one file was too large
            assert (written.returncode, written.out_of_disk) == (137, True)
            assert "may hold 64 MiB" in written.notice
            assert written.stdout == b"told\n"
        await box.run(["sh", "-c", "chmod -R u+rwx /home /tmp; rm -rf /home/* /tmp/*"])
        room = await box.run(["sh", "-c", "head -c 20M /dev/zero > x; ls x"])
        assert (room.stdout, room.returncode, room.notice) == (b"x\n", 0, "")

    in_sandbox(test, LIMITS)


def test_nothing_grows_in_a_full_sandbox_also_by_short_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(box: Bubblewrap) -> None:
        directory, deleted = box._place.directory, 0

        def used() -> int:
            return count(directory, ["home", "tmp"], [], most_bytes=GIB, most_files=1000).bytes

        # as the disk is to somebody who has it alone, but for what is deleted here: other tests delete at any time
        bytes_free, files_free = disk.free(directory)
        monkeypatch.setattr(disk, "free", lambda path: (bytes_free + deleted - used(), files_free))
        for number in range(40):
            deleted = GIB if number >= 4 else 0
            await box.run(["sh", "-c", "head -c 8M /dev/zero > $$-$(date +%N)"])
        assert used() <= 64 * MIB + 2 * 8 * MIB
        refused = await box.run(["sh", "-c", "echo x > y"])
        assert (refused.returncode, refused.notice != "") == (153, True)
        with pytest.raises(OSError, match="No space left"):
            await box.write_file("z", b"x")
        background = await box.start(["sleep", "60"], output_path="log")
        assert background.running

    in_sandbox(test, LIMITS)


def test_many_files_are_too_much_as_well() -> None:
    async def test(box: Bubblewrap) -> None:
        result = await box.run(["bash", "-c", "for i in $(seq 100000); do : > $i; done"], timeout_seconds=20)
        assert (result.returncode, result.out_of_disk) == (137, True)
        assert "in 500" in result.notice

    in_sandbox(test, LIMITS)


def test_background_commands_end_too(mark: str) -> None:
    async def test(box: Bubblewrap) -> None:
        idle = await box.start(["sleep", mark], output_path="idle")
        script = "while :; do dd if=/dev/zero of=$(date +%N) bs=1M count=8 status=none; done"
        writer = await box.start(["bash", "-c", script], output_path="log")
        await asyncio.wait_for(asyncio.gather(idle.wait(), writer.wait()), 20)
        for ended in (idle, writer):
            assert ended.returncode == 137
            assert ended.result is not None
            assert ended.result.out_of_disk

    in_sandbox(test, SandboxLimits(disk_bytes=64 * MIB))
