"""Failure categories: what the ending decides, when the end of an episode was spent on dependencies, and when not."""

from pathlib import Path

import pytest

from megatron_klong.agent.ending import Ending
from megatron_klong.agent.failures import Failure, FailureCategory, decisive_fault, explain_failure, failure_category
from megatron_klong.trajectory.episode import EpisodeRecord, MessageRecord
from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.schema import Message, ToolCall, Transcript
from tests.unit.trajectory.builders import assistant, bash, tool, user

AGENT, CONTEXT, DEPENDENCY = FailureCategory.AGENT, FailureCategory.CONTEXT, FailureCategory.DEPENDENCY
ENGINE, SANDBOX = FailureCategory.ENGINE, FailureCategory.SANDBOX

NO_EINOPS = (
    "Traceback (most recent call last):\n"
    '  File "/home/submission/train.py", line 3, in <module>\n'
    "    import einops\n"
    "ModuleNotFoundError: No module named 'einops'\n[exit code 1]"
)
NO_PIP = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('Failed to "
    "establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/einops/\n"
    "ERROR: Could not find a version that satisfies the requirement einops (from versions: none)\n"
    "ERROR: No matching distribution found for einops\n[exit code 1]"
)
TRAIN, INSTALL = "python train.py", "pip install einops"
MISSING = [(TRAIN, NO_EINOPS), (INSTALL, NO_PIP), (TRAIN, NO_EINOPS)]


def messages(*runs: tuple[str | ToolCall, str]) -> list[Message]:
    """Message 0 is the task; call and result of run n are messages 2n + 1 and 2n + 2."""
    told = [user("replicate the paper")]
    for call, printed in runs:
        told += [assistant(calls=[bash(call) if isinstance(call, str) else call]), tool(printed)]
    return told


def record(
    *runs: tuple[str | ToolCall, str],
    ending: str = Ending.FINISHED,
    score: float | None = 0.0,
    error: str | None = None,
) -> EpisodeRecord:
    return EpisodeRecord(
        task="rice",
        model="policy",
        epoch=1,
        ending=ending,
        error=error,
        score=score,
        seconds=1.0,
        windows=1,
        messages=[MessageRecord.of(message) for message in messages(*runs)],
        tools=[],
        turns=[],
        context=None,
        tokenizer_sha256=None,
        log="log.eval",
        sample="1",
    )


def last_thing(*runs: tuple[str | ToolCall, str]) -> str | None:
    fault = decisive_fault(messages(*runs))
    return fault.thing if fault else None


@pytest.mark.parametrize(
    ("ending", "score", "expected"),
    [
        (Ending.ENGINE_FAILED, None, ENGINE),
        (Ending.SANDBOX_FAILED, None, SANDBOX),
        (Ending.CONTEXT_ERROR, 0.9, CONTEXT),
        (Ending.FINISHED, 0.01, None),
        (Ending.FINISHED, 0.0, AGENT),
        (Ending.FINISHED, None, AGENT),
        (Ending.TIMED_OUT, 0.9, AGENT),
        (Ending.AGENT_FAILED, None, AGENT),
        (Ending.SUSPENDED, None, None),
    ],
)
def test_the_ending_decides_and_then_the_score(
    ending: Ending, score: float | None, expected: FailureCategory | None
) -> None:
    assert failure_category(record((TRAIN, "loss 0.1"), ending=ending, score=score)) is expected


@pytest.mark.parametrize("ending", [Ending.ENGINE_FAILED, Ending.SANDBOX_FAILED, Ending.CONTEXT_ERROR])
def test_a_deciding_ending_wins_over_missing_packages_and_shows_its_error(ending: Ending) -> None:
    failure = explain_failure(record(*MISSING, ending=ending, error="gone"))
    assert failure is not None
    assert (failure.category is DEPENDENCY, failure.message, failure.excerpt) == (False, None, "gone")


def test_every_ending_has_an_answer_and_an_unknown_one_is_an_error() -> None:
    for ending in Ending:
        failure_category(record(ending=ending))
    with pytest.raises(ValueError, match="odd"):
        failure_category(record(ending="odd"))


def test_low_score_is_a_parameter() -> None:
    half = record((TRAIN, "loss 0.1"), score=0.5)
    assert failure_category(half) is None
    assert failure_category(half, low_score=0.5) is AGENT


def test_an_end_spent_on_a_package_that_never_came_is_a_dependency() -> None:
    assert explain_failure(record(*MISSING)) == Failure(
        category=DEPENDENCY, message=6, excerpt="ModuleNotFoundError: No module named 'einops'"
    )
    assert failure_category(record(*MISSING, ending=Ending.TIMED_OUT, score=0.4)) is DEPENDENCY
    assert failure_category(record(*MISSING, score=0.4)) is None


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (INSTALL, "Collecting einops\nSuccessfully installed einops-0.8.2 numpy-2.3.5"),
        (INSTALL, "Requirement already satisfied: einops in /usr/local/lib/python3.12/site-packages (0.8.2)"),
        ("pip install -q einops", "(no output)"),
        (TRAIN, "loss 0.1"),
        ("python -c 'import einops; print(1)'", "1"),
        ("python - <<'EOF'\nfrom einops import rearrange\nEOF", "(no output)"),
        ("apt-get install -y python3-x", "Setting up einops:amd64 (0.8.2-1) ..."),
        ("uv pip install einops", "Installed 1 package in 4ms\n + einops==0.8.2"),
    ],
)
def test_a_later_success_of_the_same_thing_mends_it(command: str, printed: str) -> None:
    assert last_thing(*MISSING, (command, printed)) is None


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("cat > train.py <<'EOF'\nimport einops\nEOF", "(no output)"),  # written, not run
        ("echo einops >> requirements.txt", "(no output)"),
        ("python -c 'import numpy'", "(no output)"),
        ("pip install rich", "Successfully installed rich-15.0.0"),
        ("grep -rn einops .", "./train.py:3:import einops"),
    ],
)
def test_what_mentions_the_thing_without_using_it_mends_nothing(command: str, printed: str) -> None:
    assert last_thing(*MISSING, (command, printed)) == "einops"


def test_a_module_is_mended_by_the_package_that_provides_it() -> None:
    missing = "ModuleNotFoundError: No module named 'cv2'"
    refused = ("pip install opencv-python", "ERROR: No matching distribution found for opencv-python")
    runs = [(TRAIN, missing), refused, (TRAIN, missing)]
    assert last_thing(*runs) == "cv2"
    assert last_thing(*runs, ("pip install opencv-python", "Successfully installed opencv-python-4.14.0.94")) is None


@pytest.mark.parametrize(
    ("command", "printed", "thing"),
    [
        ("pip install flash_attn", "  ERROR: Failed building wheel for flash_attn\n[exit code 1]", "flash-attn"),
        ("nvcc --version", "bash: line 1: nvcc: command not found\n[exit code 127]", "nvcc"),
        ("nvcc --version", "sandbox: 1: exec: nvcc: not found\n[exit code 127]", "nvcc"),
        ("bash run.sh", "run.sh: line 3: cmake: command not found\n[exit code 127]", "cmake"),
        ("apt-get install -y cmake", "E: Unable to locate package cmake\n[exit code 100]", "cmake"),
        (
            "apt-get update",
            "E: Could not open lock file /var/lib/apt/lists/lock (13)\n[exit code 100]",
            "install",
        ),
        ("apt-get update", "W: Failed to fetch http://x Temporary failure resolving 'x'\n[exit code 100]", "network"),
        ("uv pip install rich", "error: Tunnel connection failed: 403 Forbidden\n[exit code 2]", "network"),
        ("python -m pip install rich", "ProxyError('Cannot connect to proxy.')\n[exit code 1]", "network"),
        (TRAIN, "RuntimeError: The NVIDIA driver on your system is too old\n[exit code 1]", "cuda"),
        (TRAIN, "AssertionError: Torch not compiled with CUDA enabled\n[exit code 1]", "cuda"),
        (TRAIN, "ImportError: libGL.so.1: cannot open shared object file: No such file", "libgl"),
        (TRAIN, "ImportError: cannot import name 'x' from 'a' (/l/site-packages/a/__init__.py)", "a"),
        (TRAIN, "ImportError: /l/site-packages/b/_c.so: undefined symbol: _ZN3c10", "b"),
        ("python -m pytest", "/usr/bin/python: No module named pytest\n[exit code 1]", "pytest"),
        ("pytest", "E   ModuleNotFoundError: No module named 'rich'\n1 error in 0.1s", "rich"),
    ],
)
def test_faults_are_known_by_what_programs_print(command: str, printed: str, thing: str) -> None:
    assert last_thing((command, printed), (command, printed)) == thing


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("cat a.py", "try:\n    import einops\nexcept ImportError:\n    raise ModuleNotFoundError('einops')"),
        ("sed -n 1,9p log.md", "12: ModuleNotFoundError: No module named 'einops'"),
        ("python src/run.py", "ModuleNotFoundError: No module named 'src'\n[exit code 1]"),  # its own folder
        ("python run.py", "ImportError: cannot import name 'f' from 'model' (/home/submission/model.py)"),
        ("import numpy as np", "bash: line 1: import: command not found\n[exit code 127]"),
        ("print(1)", "bash: line 1: print: command not found\n[exit code 127]"),
        (TRAIN, "UserWarning: CUDA initialization: Found no NVIDIA driver on your system.\nloss 0.1"),
        ("curl https://x/data.zip", "curl: (6) Could not resolve host: x\n[exit code 6]"),  # no install
        ("git clone https://x/y", "fatal: unable to access 'https://x/y/': Could not resolve host: x"),
        (TRAIN, "torch.OutOfMemoryError: CUDA out of memory\n[exit code 1]"),
        (TRAIN, "FileNotFoundError: config.yaml not found\n[exit code 1]"),
    ],
)
def test_prose_own_modules_and_warnings_are_no_faults(command: str, printed: str) -> None:
    assert last_thing((command, printed), (command, printed)) is None


def test_one_fault_is_not_an_end_spent_on_it() -> None:
    assert failure_category(record((TRAIN, NO_EINOPS))) is AGENT


def test_only_the_end_counts() -> None:
    def work(number: int) -> tuple[str, str]:
        return f"python step_{number}.py", "loss 0.1"

    assert failure_category(record(*MISSING, *(work(number) for number in range(6)))) is AGENT
    assert failure_category(record(*(work(number) for number in range(40)), *MISSING)) is AGENT  # 3 of the last 11
    assert failure_category(record(*(work(number) for number in range(30)), *MISSING)) is DEPENDENCY  # 3 of 8


def test_results_find_their_calls_by_id_when_they_come_out_of_order() -> None:
    def call(identifier: str, command: str) -> ToolCall:
        return ToolCall(name="bash", arguments={"cmd": command}, id=identifier)

    def both(first: str, second: str) -> list[Message]:
        calls = assistant(calls=[call("a", "pip install rich"), call("b", "curl x")])
        refused = "ECONNREFUSED\n[exit code 1]"
        return [calls, Message(role=tool("").role, content=refused, tool_call_id=first), *messages(("ls", second))[1:]]

    assert decisive_fault(both("a", "x") * 2) is not None
    assert decisive_fault(both("b", "x") * 2) is None


def test_code_of_the_python_tool_counts_as_python() -> None:
    def python(code: str) -> ToolCall:
        return ToolCall(name="python", arguments={"code": code})

    faults = [(python("import einops"), NO_EINOPS), (python("import einops as e"), NO_EINOPS)]
    assert last_thing(*faults) == "einops"
    assert last_thing(*faults, (python("import numpy\nimport einops\nprint(1)"), "1")) is None


def test_no_real_transcript_is_called_a_dependency(shared_data: Path) -> None:
    """All were read: their faults are one or two missing programs that the agent went on without."""
    read = 0
    for folder in ("trajectories", "paperbench/runs"):
        for file in transcript_files(shared_data / folder):
            for transcript in read_transcripts(file):
                if isinstance(transcript, Transcript):
                    read += 1
                    assert decisive_fault(transcript.messages) is None, (file, transcript.id)
    assert read > 10
