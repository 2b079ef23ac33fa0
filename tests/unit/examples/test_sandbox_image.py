"""The image recipe: one list, two formats that do the same, a lock that fits, a smoke test that finds faults."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from examples.sandbox_image import generate
from examples.sandbox_image.generate import HERE, RecipeError, check_lock, read_apt, read_lock, recipes
from examples.sandbox_image.import_all import normalized, read_packages

PACKAGES = read_packages(HERE / "packages.txt")
LOCK = read_lock(HERE / "constraints.txt")
DOCKERFILE, DEFINITION = (HERE / "Dockerfile").read_text(), (HERE / "sandbox.def").read_text()


def docker_scripts() -> list[str]:
    """The body of each RUN."""
    return re.findall(r"^RUN ((?:.*\\\n)*.*\n)", DOCKERFILE, re.MULTILINE)


def section(name: str) -> str:
    """A section of the Apptainer definition."""
    found = re.search(rf"^%{name}\n((?:    .*\n)+)", DEFINITION, re.MULTILINE)
    assert found, name
    return found.group(1)


def words(script: str) -> list[str]:
    """A script's commands, each with single spaces, in order."""
    joined = re.sub(r"&& *\\\n", "\n", script).replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, to be changed."""
    folder = tmp_path / "image"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(generate, "HERE", folder)
    return folder


def test_the_list_has_over_eighty_packages_each_once() -> None:
    names = [package.name for package in PACKAGES]
    assert 85 <= len(names) <= 110
    assert len(set(names)) == len(names)
    apt = read_apt(HERE / "apt.txt")
    assert len(set(apt)) == len(apt)


def test_every_package_has_an_exact_pin_that_the_lock_holds() -> None:
    check_lock(PACKAGES, LOCK)
    assert len(LOCK) > len(PACKAGES)


def test_the_lock_has_the_cuda_libraries_of_one_generation() -> None:
    # nvidia-nccl-cu12 and -cu13 write the same file, and torch then loads whichever came last
    assert {match for name in LOCK for match in re.findall(r"-cu(\d+)$", name)} == {"13"}


def test_module_names_are_those_of_the_packages_installed_here() -> None:
    provided = {
        (normalized(package), module) for module, packages in packages_distributions().items() for package in packages
    }
    here = {package for package, _ in provided}
    wrong = [p for p in PACKAGES if p.name in here and (p.name, p.module.split(".")[0]) not in provided]
    assert not wrong
    assert len(here & {p.name for p in PACKAGES}) > 10
    assert all(package.module.isidentifier() for package in PACKAGES)


def test_the_committed_recipes_are_up_to_date() -> None:
    assert generate.main(["--check"]) == 0
    assert recipes() == {"Dockerfile": DOCKERFILE, "sandbox.def": DEFINITION}


def test_a_stale_recipe_is_told_and_written_anew(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "apt.txt").write_text((copied / "apt.txt").read_text() + "gdb\n")
    assert generate.main(["--check"]) == 1
    assert re.findall(r"(\S+) is stale", capsys.readouterr().out) == [
        str(copied / "Dockerfile"),
        str(copied / "sandbox.def"),
    ]
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert "gdb" in (copied / "Dockerfile").read_text()


def test_a_pin_that_the_lock_does_not_hold_is_an_error(copied: Path) -> None:
    file = copied / "packages.txt"
    file.write_text(file.read_text() + "left-pad==1.0\n")
    with pytest.raises(RecipeError, match=r"left-pad==1\.0, constraints\.txt nothing: run generate\.py --lock"):
        recipes()
    file.write_text(file.read_text().replace("left-pad==1.0", "left-pad"))
    with pytest.raises(ValueError, match=r"packages\.txt:\d+: 'left-pad' is not of the form"):
        recipes()


def test_both_formats_run_the_same_commands_on_the_same_files() -> None:
    in_docker = [command for script in docker_scripts() for command in words(script)]
    in_apptainer = words(section("post")) + words(section("test"))
    assert in_apptainer[:2] == ["set -eu", 'TORCH_INDEX="{{ TORCH_INDEX }}"']
    assert in_docker == in_apptainer[2:]
    copied = re.search(r"^COPY (.*) (\S+)/$", DOCKERFILE, re.MULTILINE)
    assert copied
    assert section("files").split() == [word for name in copied[1].split() for word in (name, f"{copied[2]}/{name}")]
    assert all((HERE / name).is_file() for name in copied[1].split())


def test_the_agent_is_uid_1000_at_home_in_home_and_sees_what_it_can_import() -> None:
    commands = [command for script in docker_scripts() for command in words(script)]
    assert "useradd --uid 1000 --gid 1000 --home-dir /home --no-create-home --shell /bin/bash agent" in commands
    assert commands[-1] == "python3 /opt/sandbox/import_all.py"
    assert DOCKERFILE.index("USER agent") < DOCKERFILE.index("RUN python3 /opt/sandbox/import_all.py")


@pytest.mark.parametrize("script", [*docker_scripts(), section("post"), section("test"), section("runscript")])
def test_shell_parts_pass_shellcheck(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    made = subprocess.run(["shellcheck", "--shell=sh", "-"], input=script, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout


def test_the_smoke_test_names_what_does_not_import_and_outlives_a_crash(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text("import os\nos.abort()\n")
    (tmp_path / "list.txt").write_text(
        "# a list\npytest==9.0\n\npyyaml==6.0  # import yaml\ncrashing==1\nmissing-one==1.0\n"
    )
    made = subprocess.run(
        [sys.executable, str(HERE / "import_all.py"), str(tmp_path / "list.txt")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 1, made.stderr
    assert made.stdout.splitlines() == [
        "crashing: import crashing: killed by signal 6",
        "missing-one: import missing_one: ModuleNotFoundError: No module named 'missing_one'",
        "2 of 4 packages import",
    ]
