"""The quickstart as a user runs it: nothing is faked but the large model, for which scripted teachers stand in."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.quickstart.config import QuickstartConfig
from examples.quickstart.folder import Run
from examples.quickstart.run import CONFIG
from examples.quickstart.training import rl_config
from megatron_klong.config import load_config
from megatron_klong.data.shard import Shard
from megatron_klong.sandbox.bubblewrap import SandboxUnavailable, check_available
from megatron_klong.trajectory.episode import read_episode
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.replay import replay
from megatron_klong.trajectory.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> None:
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def command(runs: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "examples.quickstart", "--runs_folder", str(runs), *flags]


def run(runs: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(runs, *flags), cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )


SMALL = ("--tasks.long_train_turns", "[]", "--tasks.long_heldout_turns", "[]", "--demonstrations.count", "20")


def test_the_settings_of_its_episodes_reach_rl_whole(tmp_path: Path) -> None:
    changed = (
        "--episode.bubblewrap.processes",
        "77",
        "--episode.context.keep_tokens",
        "99",
        "--episode.reading",
        "off",
    )
    config = load_config(QuickstartConfig, [CONFIG], ["--runs_folder", str(tmp_path), *changed])
    given = rl_config(Run.start(config)).episode
    assert (given.bubblewrap.processes, given.context.keep_tokens, given.reading) == (77, 99, "off")
    assert given == config.episode.model_copy(update={"turn_limit": config.evaluation.turn_limit})


@pytest.mark.long
def test_the_data_side(tmp_path: Path) -> None:
    lengths = ("--tasks.train_turns", "[12, 60]", "--tasks.heldout_turns", "[10, 20, 40]")
    made = run(tmp_path, "--until", "data", *SMALL, *lengths)
    assert made.returncode == 0, made.stdout + made.stderr
    folder = tmp_path / "latest"

    records = [read_episode(file) for file in sorted((folder / "records").iterdir())]
    scores = {model: [r.score for r in records if r.model == model] for model in ("oracle", "imperfect", "idle")}
    assert [len(found) for found in scores.values()] == [5, 5, 3]
    assert set(scores["oracle"]) == {1.0}
    assert all(score is not None and 0 < score < 1 for score in scores["imperfect"])
    assert set(scores["idle"]) == {0.0}

    renderer = GlmRenderer(load_tokenizer(folder / "tokenizer"))
    replays = [replay(record, renderer) for record in records]
    assert all(result.agrees for result in replays)
    assert sum(result.turns for result in replays) == sum(len(record.turns) for record in records) > 280

    shard = Shard(folder / "shards" / "sft")
    counts = shard.manifest["counts"]
    assert counts["documents"] == 2  # of two training tasks by two teachers, what was perfect; nothing held out
    assert {document["task"][:5] for document in shard.documents} == {"train"}
    assert sum(int(shard.window(n).loss_mask.sum()) for n in range(len(shard))) == counts["trainable_tokens"]

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stock = IndexedDataset(str(folder / "shards" / "sft"), multimodal=True)
    assert all((stock[n][0] == shard.index.tokens(range(n, n + 1))).all() for n in range(len(stock)))
    assert all(stock[n][1] == shard.index.modes[n] for n in range(len(stock)))

    assert "live context = splitter's windows" in made.stdout
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert (folder / "config.toml").is_file()


@pytest.mark.long
def test_without_the_pinned_reading_the_oracle_fails_and_the_run_says_so(tmp_path: Path) -> None:
    made = run(
        tmp_path,
        *(
            "--until",
            "data",
            *SMALL,
            "--tasks.train_turns",
            "[10]",
            "--tasks.heldout_turns",
            "[80]",
            "--episode.context.pin",
            "task",
        ),
        *("--episode.context.max_tokens", "1600", "--episode.context.prefix_cap_tokens", "1200"),
        *("--teachers.idle_plays", "false"),
    )
    assert made.returncode == 1
    assert "/oracle/1 scored 0." in made.stderr


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path) -> None:
    made = run(tmp_path / "runs", "--dry-run")
    assert made.returncode == 0, made.stderr
    assert "train_turns = [" in made.stdout
    assert "episodes" in made.stdout
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A TMPDIR of its own whose parents the sandbox's user may pass, which pytest's folders do not let it."""
    folder = Path(tempfile.mkdtemp(prefix="quickstart-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _processes_that_know(text: str) -> list[str]:
    """Living processes with `text` in their command line or environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            known = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text.encode() in known and state != "Z" and int(folder.name) != os.getpid():
            found.append(f"{folder.name} {state} {known[:200]!r}")
    return found


@pytest.mark.parametrize("seconds", [1.5, 6.0, 11.0])
def test_interrupted_at_any_moment_it_leaves_nothing(tmp_path: Path, scratch: Path, seconds: float) -> None:
    environment = {**os.environ, "TMPDIR": str(scratch)}
    started = subprocess.Popen(
        command(tmp_path / "runs"),
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    assert started.poll() is None
    assert _processes_that_know(str(scratch))
    os.killpg(started.pid, signal.SIGINT)  # what a terminal does
    printed, _ = started.communicate(timeout=30)
    # To a shell both are 130: CPython ends by the signal itself if it struck inside exec(), as in an import.
    assert started.returncode in (130, -signal.SIGINT), printed
    assert "interrupted: nothing is left running" in printed
    assert "Traceback" not in printed
    deadline = time.monotonic() + 5
    while (left := _processes_that_know(str(scratch))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert str(scratch) not in Path("/proc/mounts").read_text()
    assert [path for path in scratch.rglob("*") if "klong" in path.name and path.is_dir() and any(path.iterdir())] == []


@pytest.mark.long
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_it_trains_it_leaves_nothing(
    tmp_path: Path, scratch: Path, signal_number: signal.Signals
) -> None:
    quick = ("--tasks.train_turns", "[10]", "--tasks.heldout_turns", "[10]", "--teachers.idle_plays", "false")
    started = subprocess.Popen(
        command(tmp_path / "runs", *SMALL, *quick),
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    assert any(line.startswith("sft ...") for line in started.stdout)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("*/sft/metrics.jsonl")):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(_processes_that_know(str(scratch))) >= 4  # itself, the launcher, two processes that train
    os.killpg(started.pid, signal_number)
    started.communicate(timeout=60)
    deadline = time.monotonic() + 15
    while (left := _processes_that_know(str(scratch))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def test_killed_with_sigkill_its_workers_and_sandboxes_end_too(tmp_path: Path, scratch: Path) -> None:
    started = subprocess.Popen(
        command(tmp_path / "runs"),
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(_processes_that_know(str(scratch))) < 4:  # itself, the teachers, two workers
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started.kill()
    started.wait()
    deadline = time.monotonic() + 10
    while (left := _processes_that_know(str(scratch))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def test_without_bubblewrap_nothing_runs_and_the_cure_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    made = subprocess.run(
        command(tmp_path / "runs"),
        cwd=REPOSITORY,
        env={**os.environ, "PATH": str(empty)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert made.returncode == 1
    assert "bubblewrap" in made.stderr
    assert "install" in made.stderr
    assert not (tmp_path / "runs").exists()
