"""Whole episodes: a teacher behind HTTP works in a real sandbox, and its submission is graded in fresh ones.

Played here by a few lines in place of the agent scaffold: the loop and the tool read_file_chunk. The teacher
server, the sandboxes, the program `run`, the shell commands and the judge are real.
"""

import asyncio
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.longhaul.experiment import Experiment, run_program, score
from examples.longhaul.generate import generate_task
from examples.longhaul.serve_teachers import Options, serving
from examples.longhaul.simulated import PROMPT, file_chunk, play
from examples.longhaul.teachers import imperfect, oracle
from megatron_klong.judge.grading import grade_submission
from megatron_klong.judge.rubric import GradedNode
from megatron_klong.sandbox.bubblewrap import Bubblewrap, check_available
from megatron_klong.sandbox.results import SandboxUnavailable

PREFIX, RECENT_TURNS = 3, 2  # messages of task and reading that stay; turns that stay after them


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> None:
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(Options(error_rate=0.4)) as url:
        yield url


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("tasks")
    for turns in (10, 20, 60):
        generate_task(root, task_id=f"t{turns}", seed=2, turns=turns)
    return {turns: root / f"papers/t{turns}" for turns in (10, 20, 60)}


def workspace(task: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(task / "workspace", arcname=".")
    return buffer.getvalue()


def submission(task: Path, files: Mapping[str, str | None], links: Mapping[str, str] | None = None) -> bytes:
    """The workspace of a task with files added; None leaves a file out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(task / "workspace/run", arcname="run")
        for name, text in files.items():
            if text is not None:
                member = tarfile.TarInfo(name)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


async def play_in_sandbox(url: str, model: str, task: Path, **fields: Any) -> tuple[list[str], bytes]:
    """One episode; (the commands run, the submission). The teacher sees a truncated context."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": PROMPT}]
    commands: list[str] = []
    async with httpx.AsyncClient() as client, await Bubblewrap.create(label="episode") as box:
        await box.write_archive("submission", workspace(task))
        while True:
            seen = [*messages[:PREFIX], *messages[max(PREFIX, len(messages) - 2 * RECENT_TURNS) :]]
            body = {"model": model, "messages": seen, **fields}
            answer = (await client.post(f"{url}/chat/completions", json=body)).json()["choices"][0]["message"]
            messages.append(answer)
            if not answer.get("tool_calls"):
                break
            call = answer["tool_calls"][0]
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "submit":
                break
            if call["function"]["name"] == "bash":
                commands.append(arguments["cmd"])
                done = await box.run(["bash", "-c", arguments["cmd"]], cwd="submission", timeout_seconds=30)
                result = (done.stdout + done.stderr).decode() or "(no output)"
            else:
                paper = (task / "paper.md").read_text()
                result = file_chunk(paper, arguments["start_line"], arguments["max_lines"])
            content = f"{result}\n[paper read]\n[time left: 1h 52m]"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        return commands, await box.read_archive("submission", limit_bytes=10**6)


def grade(task: Path, archive: bytes) -> GradedNode:
    return asyncio.run(grade_submission(task, archive))


def failed(graded: GradedNode) -> list[str]:
    return [leaf.requirements for leaf in graded.leaves().values() if not leaf.score]


@pytest.mark.parametrize("turns", [10, 20, 60])
def test_the_oracles_submission_is_perfect(url: str, tasks: dict[int, Path], turns: int) -> None:
    commands, archive = asyncio.run(play_in_sandbox(url, "oracle", tasks[turns]))
    simulated = play(tasks[turns], oracle())
    assert len(commands) == turns - 2  # all but reading and submitting
    assert commands == [
        json.loads(call["function"]["arguments"])["cmd"]
        for message in simulated.messages
        for call in message.get("tool_calls", [])
        if call["function"]["name"] == "bash"
    ]
    graded = grade(tasks[turns], archive)
    assert (graded.score, failed(graded)) == (1.0, [])
    assert all(leaf.valid_score for leaf in graded.leaves().values())


@pytest.mark.parametrize("turns", [10, 20, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_imperfect_submissions_score_between(url: str, tasks: dict[int, Path], turns: int, seed: int) -> None:
    _, archive = asyncio.run(play_in_sandbox(url, "imperfect", tasks[turns], seed=seed))
    graded = grade(tasks[turns], archive)
    assert 0 < graded.score < 1
    expected = play(tasks[turns], imperfect(error_rate=0.4, seed=seed)).files
    assert graded == grade(tasks[turns], submission(tasks[turns], expected))


@pytest.mark.parametrize("turns", [10, 20])
def test_even_only_mistakes_score_above_zero(tasks: dict[int, Path], turns: int) -> None:
    files = play(tasks[turns], imperfect(error_rate=1, seed=0)).files
    drafted = 0.1 if files["report.md"].split()[-1].isdigit() else 0.0
    assert grade(tasks[turns], submission(tasks[turns], files)).score == pytest.approx(0.2 + drafted)  # reproduction


def test_idle_and_empty_submissions_score_zero(url: str, tasks: dict[int, Path]) -> None:
    commands, archive = asyncio.run(play_in_sandbox(url, "idle", tasks[20]))
    assert commands == []
    for nothing in (archive, submission(tasks[20], {}), b""):
        graded = grade(tasks[20], nothing)
        assert (graded.score, len(failed(graded))) == (0.0, 11)


# Task of 20 turns: weights 1 : 3 : 1 and 7 experiments, so script 0.1 + 0.1, each experiment 0.6/7, report 0.1 + 0.1.
EXPERIMENT = 0.6 / 7


@pytest.fixture(scope="module")
def perfect(tasks: dict[int, Path]) -> dict[str, str]:
    return dict(play(tasks[20], oracle()).files)


@pytest.fixture(scope="module")
def facts(tasks: dict[int, Path]) -> dict[str, Any]:
    return json.loads((tasks[20] / "longhaul.json").read_text())  # type: ignore[no-any-return]


def check(task: Path, files: Mapping[str, str | None], lost: float, num_failed: int) -> None:
    graded = grade(task, submission(task, files))
    assert graded.score == pytest.approx(1 - lost, abs=1e-12)
    assert len(failed(graded)) == num_failed


def test_a_changed_number_costs_one_experiment(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    lines = perfect["results.txt"].splitlines()
    name, number = lines[2].rsplit(" ", 1)
    lines[2] = f"{name} {10 + (int(number) - 10 + 1) % 25}"
    check(tasks[20], {**perfect, "results.txt": "\n".join(lines)}, EXPERIMENT, 1)


def test_a_deleted_line_costs_one_experiment(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    lines = perfect["results.txt"].splitlines(keepends=True)
    check(tasks[20], {**perfect, "results.txt": "".join(lines[:-1])}, EXPERIMENT, 1)
    check(tasks[20], {**perfect, "results.txt": None}, 7 * EXPERIMENT, 7)


def test_a_wrong_setting_costs_one_experiment(
    tasks: dict[int, Path], perfect: dict[str, str], facts: dict[str, Any]
) -> None:
    one, other = facts["experiments"][0], facts["experiments"][1]
    wrong = Experiment(**{**one, "setting": other["setting"]})
    first = f"{wrong.method} {wrong.dataset} {score(facts['salt'], wrong)}\n"
    rest = perfect["results.txt"].partition("\n")[2]
    assert first not in perfect["results.txt"]
    check(tasks[20], {**perfect, "results.txt": first + rest}, EXPERIMENT, 1)


def test_the_last_line_of_an_experiment_counts(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    name, number = perfect["results.txt"].splitlines()[0].rsplit(" ", 1)
    every = "".join(f"{name} {guess}\n" for guess in range(10, 100))
    corrected = f"{name} 11\n" + perfect["results.txt"]
    assert number != "99"
    check(tasks[20], {**perfect, "results.txt": perfect["results.txt"] + every}, EXPERIMENT, 1)
    check(tasks[20], {**perfect, "results.txt": corrected}, 0, 0)


def test_a_missing_or_idle_script_costs_its_leaf(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    for script in (None, "", "./run\n", "exit 1\n"):
        check(tasks[20], {**perfect, "reproduce.sh": script}, 0.2, 2)


def test_a_script_that_runs_another_experiment_costs_half(
    tasks: dict[int, Path], perfect: dict[str, str], facts: dict[str, Any]
) -> None:
    other = next(e for e in facts["experiments"] if e["method"] != facts["headline"]["method"])
    script = f"./run {other['method']} {other['setting']} {other['dataset']}\n"
    check(tasks[20], {**perfect, "reproduce.sh": script}, 0.1, 1)


def test_a_script_that_prints_a_remembered_number_costs_its_leaf(
    tasks: dict[int, Path], perfect: dict[str, str]
) -> None:
    number = perfect["report.md"].split()[-1]
    check(tasks[20], {**perfect, "reproduce.sh": f"echo {number}\n"}, 0.2, 2)


def test_a_script_may_print_more_before_its_number(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    script = f"#!/bin/sh\necho working >&2\n{perfect['reproduce.sh']}"
    check(tasks[20], {**perfect, "reproduce.sh": script}, 0, 0)


def test_a_report_of_another_number_costs_its_leaf(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    start, number = perfect["report.md"].rsplit(" ", 1)
    for report in (None, "", f"{start} missing\n", number):
        check(tasks[20], {**perfect, "report.md": report}, 0.2, 2)
    other = 11 if number.strip() == "10" else 10
    check(tasks[20], {**perfect, "report.md": f"{perfect['report.md']}{start} {other}\n"}, 0.1, 1)


def test_a_changed_program_earns_nothing(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    # An agent that rewrites `run` records what its own program says; the judge asks its own.
    task, files = tasks[20], {**perfect, "run": run_program("mine")}
    check(task, files, 0, 0)  # right numbers stay right
    lines = [line.rsplit(" ", 1)[0] + " 55\n" for line in perfect["results.txt"].splitlines()]
    graded = grade(task, submission(task, {"results.txt": "".join(lines), "run": "echo score is 55\n"}))
    assert graded.score <= EXPERIMENT


def test_links_to_the_judges_files_earn_nothing(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    files = dict.fromkeys(("results.txt", "report.md"))
    for target in ("/home/judge/check.sh", "/proc/self/cmdline", "/dev/stdin"):
        links = {"results.txt": target, "report.md": target}
        graded = grade(tasks[20], submission(tasks[20], {**perfect, **files}, links))
        assert graded.score == pytest.approx(0.2)
    copied = {"data/results.txt": perfect["results.txt"], "results.txt": None}
    graded = grade(tasks[20], submission(tasks[20], {**perfect, **copied}, {"results.txt": "data/results.txt"}))
    assert graded.score == pytest.approx(0.4)  # even an honest link is no plain file


def test_a_script_that_rewrites_the_judge_spoils_no_other_leaf(tasks: dict[int, Path], perfect: dict[str, str]) -> None:
    script = (
        "for file in /home/judge/check.sh /home/judge/run; do echo 'exit 0' > $file; done\n"
        "echo lamp oak 10 > /home/submission/results.txt\necho 10\n"
    )
    check(tasks[20], {**perfect, "reproduce.sh": script}, 0.2, 2)
