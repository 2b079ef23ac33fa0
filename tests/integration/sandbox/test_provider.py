"""The Inspect provider, in real evaluations. Only the model is faked: it answers from a list.

Inspect's own conformance suite runs against it too, one test per check.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task, eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import ChatMessageTool, GenerateConfig, ModelAPI, ModelOutput, get_model, modelapi
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver, use_tools
from inspect_ai.tool import bash
from inspect_ai.util import (
    OutputLimitExceededError,
    SandboxEnvironmentSpec,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandbox,
)
from inspect_ai.util._sandbox import self_check

from megatron_klong.sandbox.bubblewrap import SandboxUnavailable, check_available
from megatron_klong.sandbox.config import BubblewrapConfig
from megatron_klong.sandbox.directories import runner_directory
from megatron_klong.sandbox.limits import MIB
from megatron_klong.sandbox.provider import BubblewrapSandbox
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module", autouse=True)
def working_bubblewrap() -> None:
    """Skip everything here, with the reason, on a machine without it."""
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


def sandbox_directories() -> list[Path]:
    return [path for path in runner_directory().iterdir() if path.is_dir() and path.name != "etc"]


def in_sandbox(body: Callable[[BubblewrapSandbox], Any]) -> None:
    """Run `body` in a sandbox made and cleaned up as Inspect does it."""

    async def main() -> None:
        await BubblewrapSandbox.task_init("test", None)
        environments = await BubblewrapSandbox.sample_init("test", None, {})
        try:
            await body(environments["default"].as_type(BubblewrapSandbox))
        finally:
            await BubblewrapSandbox.sample_cleanup("test", None, environments, interrupted=True)
        assert sandbox_directories() == []

    asyncio.run(main())


CHECKS = {
    name.removeprefix("test_"): check
    for name, check in vars(self_check).items()
    if name.startswith("test_")
    and name != "test_exec_as_user"  # wants root inside, to add a user
    and "timeout_kills" not in name  # sleeps 5 seconds; tests/unit/sandbox/test_endings.py is stricter
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_inspects_own_check(check: Callable[[BubblewrapSandbox], Any]) -> None:
    in_sandbox(check)


def test_limits_and_faults_take_inspects_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(box: BubblewrapSandbox) -> None:
        result = await box.exec(["sh", "-c", r"printf '\377ok'; exit 4"])
        assert (result.success, result.returncode, result.stdout) == (False, 4, "\ufffdok")
        assert (await box.exec(["id", "-un"], user="agent")).stdout == "agent\n"
        for user in ("root", "0", "nobody"):
            with pytest.raises(SandboxUserUnsupportedError):
                await box.exec(["true"], user=user)
        with pytest.raises(OutputLimitExceededError) as flood:
            await box.exec(["yes"])
        assert flood.value.limit_str == "10 MiB"
        assert flood.value.truncated_output == "y\n" * (5 * 1024**2)
        await box.write_file("counter", "")
        with pytest.raises(TimeoutError) as timeout:  # not tried again: it may have had effects
            await box.exec(["sh", "-c", "echo x >> counter; echo so far; sleep 9"], timeout=1, timeout_retry=True)
        assert timeout.value.truncated_output == "so far\n"  # type: ignore[attr-defined]
        assert await box.read_file("counter") == "x\n"
        await box.write_file("crlf", "a\r\nb\r")
        assert await box.read_file("crlf") == "a\r\nb\r"
        await box.bubblewrap.close()
        for call in (box.exec(["true"]), box.read_file("crlf"), box.write_file("x", "y")):
            with pytest.raises(SandboxUnavailableError):
                await call

    in_sandbox(body)


# --- whole evaluations ---------------------------------------------------------------------------


@modelapi(name="scripted")
class ScriptedModel(ModelAPI):
    """Answers from a list. Not mockllm: that counts tokens with a vocabulary which it downloads."""

    def __init__(self, model_name: str, outputs: Sequence[ModelOutput] = (), **ignored: Any) -> None:
        super().__init__(model_name, config=GenerateConfig())
        self.outputs = list(outputs)

    async def generate(self, *ignored: Any, **also_ignored: Any) -> ModelOutput:
        return self.outputs.pop(0)

    async def count_text_tokens(self, text: str) -> int:
        return len(text) // 4


@scorer(metrics=[accuracy()])
def reads_answer() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value="C" if (await sandbox().read_file("answer")).strip() == target.text else "I")

    return score


def evaluate(task: Task, commands: Sequence[str], tmp_path: Path, **options: Any) -> EvalLog:
    """One evaluation by a model that calls `bash` with each command, then says that it is done."""
    outputs = [ModelOutput.for_tool_call("scripted", "bash", {"command": command}) for command in commands]
    outputs = [*outputs, ModelOutput.from_content("scripted", "done")] * len(task.dataset)
    model = get_model("scripted/model", memoize=False, outputs=outputs)
    [log] = eval(task, model=model, log_dir=str(tmp_path), display="none", max_samples=1, **options)
    return log


def tool_outputs(log: EvalLog) -> list[str]:
    assert log.samples is not None
    return [m.text for sample in log.samples for m in sample.messages if isinstance(m, ChatMessageTool)]


def test_an_evaluation_gives_each_sample_a_sandbox_of_its_own(tmp_path: Path) -> None:
    samples = [
        Sample("?", target=str(number), files={"given/n": str(number)}, setup="cp given/n /home/from_setup")
        for number in range(3)
    ]
    task = Task(dataset=samples, solver=[use_tools(bash()), generate()], scorer=reads_answer(), sandbox="bubblewrap")
    commands = ["cat from_setup > answer; ls; whoami", "touch trace; true <>/dev/tcp/127.0.0.1/22"]
    log = evaluate(task, commands, tmp_path)
    assert log.status == "success", log.error
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value == 1.0
    listing, network = tool_outputs(log)[4:6]  # of the last sample: no trace of those before it
    assert listing.split() == ["answer", "from_setup", "given", "agent"]
    assert "Connection refused" in network
    assert sandbox_directories() == []


def test_an_interrupted_sample_leaves_nothing(tmp_path: Path) -> None:
    @solver
    def runs_long() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            await sandbox().exec(["sh", "-c", "setsid sleep 61.7 & sleep 61.7"])
            return state

        return solve

    task = Task(dataset=[Sample("?")], solver=runs_long(), sandbox="bubblewrap", time_limit=1)
    log = evaluate(task, [], tmp_path)
    assert log.samples is not None
    assert log.samples[0].limit is not None
    assert log.samples[0].limit.type == "time"
    assert sandbox_directories() == []
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert [command for command in commands if b"61.7" in command.split(b"\0")] == []


def test_config_sets_the_limits_and_survives_the_log(tmp_path: Path) -> None:
    spec = SandboxEnvironmentSpec("bubblewrap", BubblewrapConfig(processes=33))
    task = Task(dataset=[Sample("?")], solver=[use_tools(bash()), generate()], sandbox=spec)
    log = evaluate(task, ["ulimit -u"], tmp_path)
    assert tool_outputs(log) == ["33\n"]
    assert log.eval.sandbox is not None
    assert log.eval.sandbox.config == BubblewrapConfig(processes=33)
    wrong = SandboxEnvironmentSpec("bubblewrap", BubblewrapConfig(processes=1))
    with pytest.raises(PrerequisiteError, match="processes is 1"):
        evaluate(Task(dataset=[Sample("?")], sandbox=wrong), [], tmp_path)


def test_what_a_limit_did_is_told_to_the_model(tmp_path: Path) -> None:
    config = BubblewrapConfig(memory_bytes=128 * MIB, disk_bytes=32 * MIB, environment={"WHO": "me"})
    task = Task(
        dataset=[Sample("?")],
        solver=[use_tools(bash()), generate()],
        sandbox=SandboxEnvironmentSpec("bubblewrap", config),
    )
    write = "for i in $(seq 1000); do head -c 4M /dev/zero > $i; sleep 0.01; done"
    commands = ["echo $WHO; python3 -c 'bytearray(1 << 30)'", write, "rm -f ?*; echo gone"]
    memory, disk, after = tool_outputs(evaluate(task, commands, tmp_path))
    assert "me" in memory
    assert "out of memory" in memory.lower()
    assert "Killed: /home and /tmp hold" in disk
    assert "gone" in after


def test_a_sandbox_is_named_after_its_task_and_sample_and_people_can_enter_it(tmp_path: Path) -> None:
    found: list[tuple[str, str]] = []

    @solver
    def looks() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            box = sandbox()
            connection = await box.connection()
            inside = subprocess.run(
                ["sh", "-c", connection.command],
                input="whoami; touch entered; grep Seccomp: /proc/self/status\n",
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            assert "entered" in (await box.exec(["ls"])).stdout, inside
            found.append((box.as_type(BubblewrapSandbox).bubblewrap._place.directory.name, inside.stdout))
            with pytest.raises(ConnectionError):
                await box.connection(user="root")
            return state

        return solve

    task = Task(name="papers", dataset=[Sample("?", id="sample-7")], solver=looks(), sandbox="bubblewrap")
    log = evaluate(task, [], tmp_path)
    assert log.status == "success", log.error
    [(name, output)] = found
    assert name.startswith("papers-sample-7-1-")
    assert output.split() == ["agent", "Seccomp:", "2"]


def test_the_network_is_closed_though_the_sandbox_cannot_be() -> None:
    closed = []

    class Broken:
        async def close(self) -> None:
            raise OSError("cannot be removed")

    class Network:
        async def close(self) -> None:
            closed.append(self)

    provided = BubblewrapSandbox(Broken(), Network())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="cannot be removed"):
        asyncio.run(provided.close())
    assert len(closed) == 1


def test_an_image_is_tried_before_a_sample_starts(tmp_path: Path) -> None:
    spec = SandboxEnvironmentSpec("bubblewrap", BubblewrapConfig(image=tmp_path))
    with pytest.raises(PrerequisiteError, match=r"bubblewrap\.image cannot be .*no /bin/sh"):
        evaluate(Task(dataset=[Sample("?")], sandbox=spec), [], tmp_path)


def test_without_bubblewrap_no_sample_starts_and_the_cure_is_told(tmp_path: Path) -> None:
    program = f"""
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
import megatron_klong.sandbox.provider
task = Task(dataset=[Sample("?")], sandbox="bubblewrap")
[log] = eval(task, model="mockllm/model", log_dir={str(tmp_path)!r})
print(log.status, log.samples)"""
    environment = {**os.environ, "PATH": "/nonexistent", "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "apt-get install bubblewrap" in " ".join(ended.stdout.split()), ended.stdout + ended.stderr
    assert "success" not in ended.stdout
