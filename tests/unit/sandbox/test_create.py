"""What `Bubblewrap.create` is given: variables, files, a network, an image."""

import asyncio
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from megatron_klong.sandbox.bubblewrap import Bubblewrap, SandboxUnavailable, check_available
from megatron_klong.sandbox.config import ApptainerConfig, BubblewrapConfig
from megatron_klong.sandbox.network import SandboxNetwork


@pytest.fixture
def open_folder(temporary: dict[str, str]) -> Path:
    """A folder of the host that the uid of a sandbox can read."""
    folder = Path(temporary["TMPDIR"])
    folder.chmod(0o755)
    return folder


def test_variables_are_those_of_every_command_and_a_commands_own_come_first() -> None:
    async def main() -> None:
        async with await Bubblewrap.create(environment={"A": "one", "B": "two", "LANG": "C"}) as box:
            result = await box.run(["sh", "-c", "echo $A $B $LANG $HOME"], env={"B": "own"})
            assert result.stdout == b"one own C /home\n"
            await box.start(["sh", "-c", "echo $A"], output_path="x")
            await box.background[0].wait()
            assert await box.read_file("x") == b"one\n"
        with pytest.raises(ValueError, match="A=B"):
            await Bubblewrap.create(environment={"A=B": "x"})

    asyncio.run(main())


def test_files_of_the_host_are_shown_and_cannot_be_changed(open_folder: Path) -> None:
    (open_folder / "ca.pem").write_text("certificate")
    (open_folder / "link.pem").symlink_to("ca.pem")

    async def main() -> None:
        files = {"/run/klong/ca.pem": open_folder / "ca.pem", "/etc/pip.conf": open_folder / "link.pem"}
        async with await Bubblewrap.create(read_only_files=files) as box:
            script = "cat /run/klong/ca.pem /etc/pip.conf; for f in /run/klong/ca.pem /etc/pip.conf; do "
            result = await box.run(["sh", "-c", script + "echo x > $f; rm -f $f; mv $f /home; done"])
            assert result.stdout == b"certificate" * 2
        for inside, outside in [
            ("relative", open_folder / "ca.pem"),
            ("/run/../usr/x", open_folder / "ca.pem"),
        ]:
            with pytest.raises(ValueError, match="inside a sandbox"):
                await Bubblewrap.create(read_only_files={inside: outside})
        with pytest.raises(ValueError, match="does not exist"):
            await Bubblewrap.create(read_only_files={"/x": open_folder / "absent"})

    asyncio.run(main())
    assert (open_folder / "ca.pem").read_text() == "certificate"


def test_a_network_is_that_of_all_commands_of_one_sandbox() -> None:
    async def main() -> None:
        network = SandboxNetwork.create()
        try:
            async with await Bubblewrap.create(network=network) as box, await Bubblewrap.create() as other:
                server = "import http.server as h; h.HTTPServer(('127.0.0.1', 8000), h.BaseHTTPRequestHandler)"
                await box.start(["python3", "-c", f"{server}.serve_forever()"], output_path="log")
                client = "for i in $(seq 100); do true <>/dev/tcp/127.0.0.1/8000 && break; sleep 0.05; done"
                reached = await box.run(["bash", "-c", f"{client}; ls /proc/net/unix; cat /proc/net/dev"])
                assert reached.stderr.count(b"refused") < 100
                assert [line.split(b":")[0].strip() for line in reached.stdout.splitlines()[3:]] == [b"lo"]
                refused = await other.run(["bash", "-c", "true <>/dev/tcp/127.0.0.1/8000"])
                assert b"Connection refused" in refused.stderr
                with socket.create_server(("127.0.0.1", 0)) as host:
                    port = host.getsockname()[1]
                    tried = await box.run(["bash", "-c", f"true <>/dev/tcp/127.0.0.1/{port}"])
                    assert b"Connection refused" in tried.stderr
        finally:
            network.close()

    asyncio.run(main())


def unpacked_image(folder: Path, *, bin: str) -> Path:
    """A root file system of a few programs; `bin`: where its /bin leads."""
    for name in ("etc", "opt", "var/tmp", "home/somebody", "usr/bin"):
        (folder / name).mkdir(parents=True)
    (folder / "bin").symlink_to(bin)
    (folder / "lib64").symlink_to("usr/lib")
    libraries = folder / "usr" / "lib"
    libraries.mkdir()
    for program in ("sh", "cat", "ls", "tee", "mkdir", "touch", "id", "rm", "tar"):
        shutil.copy(os.path.realpath(shutil.which(program) or ""), folder / "usr" / "bin" / program)
    for library in _libraries(folder / "usr" / "bin"):
        shutil.copy(os.path.realpath(library), libraries / Path(library).name)
    (folder / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (folder / "etc" / "ld.so.conf").write_text("/usr/lib\n")
    (folder / "opt" / "hello").write_text("of the image\n")
    return folder


def test_an_image_takes_the_place_of_the_hosts_system(open_folder: Path) -> None:
    folder = unpacked_image(open_folder / "image", bin="usr/bin")

    async def main() -> None:
        async with await Bubblewrap.create(image=folder) as box:
            result = await box.run(["sh", "-c", "cat /opt/hello; ls / /usr/bin; touch /opt/x; touch /usr/x"])
            lines = result.stdout.decode().split("\n")
            assert lines[0] == "of the image"
            assert {"opt", "proc", "home", "tmp"} <= set(lines)
            assert "python3" not in lines
            assert result.stderr.count(b"Read-only file system") == 2, result.stderr
            await box.write_file("/var/tmp/x", b"kept")
            assert await box.read_file("/tmp/x") == b"kept"
            assert (await box.run(["ls", "/home"])).stdout == b""
            assert b"agent" in (await box.run(["id"])).stdout
        with pytest.raises(ValueError, match="no unpacked root file system"):
            await Bubblewrap.create(image=open_folder)

    asyncio.run(main())
    assert not (folder / "opt" / "x").exists()


@pytest.mark.parametrize("bin", ["usr/bin", "/usr/bin"])
def test_links_of_an_image_lead_where_they_lead_inside(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch, bin: str
) -> None:
    folder = unpacked_image(open_folder / "image", bin=bin)
    (folder / "usr" / "bin" / "sh").rename(folder / "usr" / "bin" / "only-in-the-image")
    (folder / "usr" / "bin" / "sh").symlink_to("/bin/only-in-the-image")
    (folder / "var" / "tmp").rmdir()
    (folder / "var" / "tmp").symlink_to("/tmp")
    monkeypatch.chdir(open_folder)

    async def main() -> None:
        await check_available(image=Path("image"))
        async with await Bubblewrap.create(image=Path("image")) as box:
            await box.write_file("/var/tmp/x", b"kept")
            assert (await box.run(["sh", "-c", "cat /tmp/x"])).stdout == b"kept"

    asyncio.run(main())
    assert BubblewrapConfig(image=Path("image")).image == folder
    assert ApptainerConfig.model_validate({"image": "image"}).image == folder


def test_an_image_that_cannot_be_one_is_told_with_the_cure(open_folder: Path) -> None:
    folder = unpacked_image(open_folder / "image", bin="usr/bin")
    (folder / "usr" / "bin" / "tar").unlink()
    broken = unpacked_image(open_folder / "broken", bin="usr/bin")
    (broken / "usr" / "bin" / "sh").write_bytes(b"")
    (open_folder / "image.sif").touch()
    loop = open_folder / "loop"
    loop.mkdir()
    (loop / "bin").symlink_to("bin")
    for image, told in [
        (folder, "lacks programs that files move by: tar"),
        (broken, "sh"),
        (open_folder / "absent", "no /bin/sh"),
        (open_folder / "image.sif", "no /bin/sh"),
        (loop, "no /bin/sh"),
    ]:
        with pytest.raises(SandboxUnavailable, match=f"bubblewrap.image cannot be {image}: .*{told}.*apptainer build"):
            asyncio.run(check_available(image=image))


def _libraries(programs: Path) -> set[str]:
    """All that these programs load."""
    found = set()
    for program in programs.iterdir():
        listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        found |= {word for line in listing.splitlines() for word in line.split() if word.startswith("/")}
    return found
