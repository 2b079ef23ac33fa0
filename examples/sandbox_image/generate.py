"""Write Dockerfile and sandbox.def from packages.txt, constraints.txt and apt.txt, or say that they are stale.

Always: both recipes run the same commands on the same files, so the images differ in format only; a package without a
place in the lock, or with another version there, is an error.

    python -m examples.sandbox_image.generate           write both
    python -m examples.sandbox_image.generate --check   exit 1 if a committed file differs
    python -m examples.sandbox_image.generate --lock    resolve packages.txt anew into constraints.txt; needs the index
"""

import argparse
import json
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

from examples.sandbox_image.import_all import Package, normalized, read_packages
from megatron_klong.files import write_atomically

HERE = Path(__file__).parent
BASE = "python:3.12-slim-bookworm"
PLACE = "/opt/sandbox"  # of the lists and the smoke test in the image; not under /home, which is mounted over
COPIED = ("packages.txt", "constraints.txt", "import_all.py")
UID = 1000
ENVIRONMENT = {"LANG": "C.UTF-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # comfort: bubblewrap starts without it

_HEADER = "# Written by generate.py from packages.txt, constraints.txt and apt.txt: change those, then run it.\n"
_LOCK_HEADER = "# Written by generate.py --lock: packages.txt and all it needs, for Python 3.12 on Linux x86-64.\n"
_LOCKED_FOR = ((3, 12), "Linux", "x86_64")


class RecipeError(ValueError):
    """Lists that do not fit together; the message names the file and the cure."""


def apt_commands(packages: list[str]) -> list[str]:
    """Shell commands, in order, each of which must succeed."""
    names = " \\\n        ".join(textwrap.wrap(" ".join(packages), width=100, break_on_hyphens=False))
    return [
        "export DEBIAN_FRONTEND=noninteractive",
        "apt-get update",
        f"apt-get install --yes --no-install-recommends \\\n        {names}",
        "rm -rf /var/lib/apt/lists/*",
    ]


def user_commands() -> list[str]:
    """The user `agent`, whose home is /home itself, and the folders an episode uses."""
    return [
        f"groupadd --gid {UID} agent",
        f"useradd --uid {UID} --gid {UID} --home-dir /home --no-create-home --shell /bin/bash agent",
        f"install --directory --owner={UID} --group={UID} /home /home/paper /home/submission",
    ]


def pip_commands() -> list[str]:
    """One resolution for all packages, held to the lock. An empty TORCH_INDEX changes nothing."""
    lists = f"--requirement {PLACE}/packages.txt --constraint {PLACE}/constraints.txt"
    return [
        f'PIP_EXTRA_INDEX_URL="$TORCH_INDEX" python3 -m pip install --no-cache-dir \\\n        {lists}',
        "python3 -m pip check",
    ]


def smoke_test() -> str:
    return f"python3 {PLACE}/import_all.py"


def dockerfile(apt: list[str]) -> str:
    """The Dockerfile; every RUN is plain POSIX shell, which old builders take too."""
    environment = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    parts = [
        f"ARG BASE={BASE}\nFROM ${{BASE}}\nENV {environment}\n",
        _run(apt_commands(apt)),
        _run(user_commands()),
        f"COPY {' '.join(COPIED)} {PLACE}/\nARG TORCH_INDEX=\n{_run(pip_commands())}",
        f"USER agent\nWORKDIR /home\n{_run([smoke_test()])}",
        'CMD ["bash"]\n',
    ]
    return _HEADER + "\n".join(parts)


def definition(apt: list[str]) -> str:
    """The Apptainer definition. It runs as whoever starts it, so `agent` counts only where the image is unpacked."""
    post = ["set -eu", 'TORCH_INDEX="{{ TORCH_INDEX }}"', *apt_commands(apt), *user_commands(), *pip_commands()]
    sections = {
        "arguments": [f"BASE={BASE}", "TORCH_INDEX="],
        "files": [f"{name} {PLACE}/{name}" for name in COPIED],
        "environment": [f"export {name}={value}" for name, value in ENVIRONMENT.items()],
        "post": post,
        "test": [smoke_test()],
        "runscript": ['exec "${@:-bash}"'],
    }
    parts = ["Bootstrap: docker\nFrom: {{ BASE }}\n"]
    parts += [f"%{name}\n" + "".join(f"    {line}\n" for line in lines) for name, lines in sections.items()]
    return _HEADER + "\n".join(parts)


def _run(commands: list[str]) -> str:
    return "RUN " + " && \\\n    ".join(commands) + "\n"


def read_apt(file: Path) -> list[str]:
    """The names of a list, without comments and blank lines."""
    lines = (line.strip() for line in file.read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def read_lock(file: Path) -> dict[str, str]:
    """Normalized name -> version."""
    pairs = (line.split("==") for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#"))
    return {normalized(name): version for name, version in pairs}


def check_lock(packages: list[Package], lock: dict[str, str]) -> None:
    """Raises RecipeError for the first package whose exact pin is not what the lock holds."""
    for package in packages:
        if package.pin != f"=={lock.get(package.name)}":
            found = lock.get(package.name, "nothing")
            raise RecipeError(
                f"packages.txt has {package.name}{package.pin}, constraints.txt {found}: run generate.py --lock"
            )


def resolved() -> dict[str, str]:
    """What pip would install for packages.txt, without installing it; pip 23.3 or newer reads metadata only."""
    here = (sys.version_info[:2], platform.system(), platform.machine())
    if here != _LOCKED_FOR:
        raise RecipeError(f"the lock is made for {_LOCKED_FOR} and by it, not by {here}")
    asked = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*asked, "-r", str(HERE / "packages.txt")], stdout=subprocess.PIPE, text=True, check=True)
    found = (item["metadata"] for item in json.loads(done.stdout)["install"])
    return {normalized(item["name"]): item["version"] for item in found}


def recipes() -> dict[str, str]:
    """File name -> content. Raises RecipeError, ValueError."""
    check_lock(read_packages(HERE / "packages.txt"), read_lock(HERE / "constraints.txt"))
    apt = read_apt(HERE / "apt.txt")
    return {"Dockerfile": dockerfile(apt), "sandbox.def": definition(apt)}


def main(arguments: list[str] | None = None) -> int:
    """Lock, check or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    choice.add_argument("--lock", action="store_true", help="write constraints.txt, then the recipes")
    options = parser.parse_args(arguments)
    if options.lock:
        lines = (f"{name}=={version}\n" for name, version in sorted(resolved().items()))
        write_atomically(HERE / "constraints.txt", _LOCK_HEADER + "".join(lines))
    wanted = recipes()
    if not options.check:
        for name, content in wanted.items():
            write_atomically(HERE / name, content)
        return 0
    stale = [name for name, content in wanted.items() if (HERE / name).read_text("utf-8") != content]
    for name in stale:
        print(f"{HERE / name} is stale: run python -m examples.sandbox_image.generate")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
