"""Import every package of packages.txt, each in a process of its own; exit 1 and name those that fail.

Run where the packages are: at the end of the image's build, by its Python. Standard library only.
Always: a crash or a hang of one package is a failure of that one; nothing is written outside of a temporary folder.

    python3 import_all.py [packages.txt]
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"([A-Za-z0-9][\w.-]*)(==|~=)([\w.+!]+)(?:\s+# import ([\w.]+))?")
_IMPORT_SECONDS = 300.0  # TensorFlow from a cold disk takes one minute


@dataclass(frozen=True, kw_only=True)
class Package:
    """One line of packages.txt."""

    name: str  # normalized as the package index does
    pin: str  # "==2.3.5"
    module: str


def normalized(name: str) -> str:
    """The form of a package's name in which two spellings are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_packages(file: Path) -> list[Package]:
    """The packages of a list, in its order. ValueError for a line that is no pinned package."""
    packages = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise ValueError(f"{file}:{number}: {line!r} is not of the form 'name==version  # import module'")
        name, operator, version, module = found.groups()
        package = normalized(name)
        packages.append(Package(name=package, pin=operator + version, module=module or package.replace("-", "_")))
    return packages


def fault_of_import(module: str, home: str) -> str | None:
    """What importing the module ends with, or None if it works."""
    environment = {**os.environ, "HOME": home, "MPLBACKEND": "agg", "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {_IMPORT_SECONDS:.0f} seconds"
    if done.returncode == 0:
        return None
    if done.returncode < 0:  # what was printed before a crash is beside the point
        return f"killed by signal {-done.returncode}"
    printed = done.stderr.strip().splitlines()
    return printed[-1] if printed else f"exit code {done.returncode}"


def main(arguments: list[str]) -> int:
    """Import all and print one line for each fault, then the count."""
    packages = read_packages(Path(arguments[0]) if arguments else Path(__file__).with_name("packages.txt"))
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(os.cpu_count()) as threads:
        faults = list(threads.map(lambda package: fault_of_import(package.module, home), packages))
    for package, fault in zip(packages, faults, strict=True):
        if fault is not None:
            print(f"{package.name}: import {package.module}: {fault}")
    print(f"{faults.count(None)} of {len(packages)} packages import")
    return 0 if faults.count(None) == len(packages) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
