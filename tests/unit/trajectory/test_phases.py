"""Phases: what tools and commands say about the work, a failing run and what follows it, windows by majority."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.trajectory.actions import Action, Turn, actions_in, turns_of
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.importers import read_transcripts
from megatron_klong.trajectory.phases import Phase, failed, turn_phases, window_phase
from megatron_klong.trajectory.schema import ToolCall, Transcript
from megatron_klong.trajectory.shell import commands
from tests.unit.trajectory.builders import assistant, bash, byte_tokenizer, tool, transcript, transcripts, user

READ, CODE, RUN = Phase.READING, Phase.CODING, Phase.RUNNING
DEBUG, WRITE, OTHER = Phase.DEBUGGING, Phase.WRITING, Phase.OTHER


def shell(command: str, printed: str = "") -> Turn:
    return Turn(actions=(Action(tool="bash", arguments={"cmd": command}),), results=printed)


def phase(turn: Turn) -> Phase:
    return turn_phases([turn])[0]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("cat paper.md", READ),
        ("cd src && sed -n '1,80p' model.py | head", READ),
        ('grep -rn "a|b; rm" src 2>/dev/null', READ),
        ("git --no-pager diff HEAD~1", READ),
        ("tail -f train.log", READ),
        ("bash -lc 'cat app/(protected)/page.tsx'", READ),
        ("x=$(cat a.txt); (cd b && ls)", READ),
        ("for f in *.py; do cat $f; done", READ),
        ("cat > train.py <<'EOF'\nimport torch\nEOF", CODE),
        ("cat <<EOF >> train.py\npytest && make\nEOF", CODE),
        ("echo 'x = 1' | tee config.py", CODE),
        ("sed -i 's/a/b/' train.py", CODE),
        ("git apply fix.patch", CODE),
        ("apply_patch <<'P'\n*** Begin Patch\n*** Update File: src/a.py\n@@\n*** End Patch\nP", CODE),
        ("python - <<'EOF'\nopen('a.py', 'w').write('x')\nEOF", CODE),
        ("cat > train.py <<'EOF'\nx\nEOF\npython train.py", CODE),
        ("python train.py --lr 1e-3 > train.log 2>&1", RUN),
        ("CUDA_VISIBLE_DEVICES=0 nohup torchrun --nproc 2 train.py &", RUN),
        ("sudo timeout 60 pytest -x | tail -5", RUN),
        ("python -c 'print(1)'", RUN),
        ("pip install -r requirements.txt", RUN),
        ("bash -lc 'make -j4'", RUN),
        ("# don't stop\n./reproduce.sh", RUN),
        ("echo 'never closed && python x.py", OTHER),
        ("cat > README.md <<'EOF'\n# Results\nEOF", WRITE),
        ("echo done >> report.tex && git commit -am report", WRITE),
        ("submit", WRITE),
        ("str_replace_editor view src/a.py", READ),
        ("str_replace_editor create src/a.py --text x", CODE),
        ("str_replace_editor create README.md --text x", WRITE),
        ("mkdir -p out && cp a b && git add .", OTHER),
        ("echo done > /dev/null", OTHER),
        ("", OTHER),
    ],
)
def test_a_shell_command_tells_its_phase(command: str, expected: Phase) -> None:
    assert phase(shell(command)) is expected


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("read_file_chunk", {"file": "/task/paper.md"}, READ),
        ("Grep", {"pattern": "x"}, READ),
        ("mcp__files__read_file", {}, READ),
        ("str_replace_editor", {"command": "view", "path": "a.py"}, READ),
        ("str_replace_editor", {"command": "create", "path": "a.py"}, CODE),
        ("Edit", {"file_path": "src/a.py"}, CODE),
        ("Write", {"file_path": "docs/README.md"}, WRITE),
        ("functions.apply_patch", {"input": "*** Begin Patch\n*** Add File: report.md\n+x"}, WRITE),
        ("shell", {"command": '["bash", "-lc", "rg -n x src"]'}, READ),
        ("shell", {"command": '["pytest", "-x"]'}, RUN),
        ("python", {"code": "import torch\nprint(torch.ones(1))"}, RUN),
        ("python", {"code": "Path('notes.md').write_text('x')"}, WRITE),
        ("python", {"code": "with open(name, 'w') as f: f.write(x)"}, CODE),
        ("submit", {"end_message": "done"}, WRITE),
        ("get_exchange_rate", {"from": "USD"}, OTHER),
    ],
)
def test_a_tool_tells_its_phase(name: str, arguments: dict[str, str], expected: Phase) -> None:
    assert phase(Turn(actions=(Action(tool=name, arguments=arguments),), results="")) is expected


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("Traceback (most recent call last):\n  File", True),
        ("step 1\nRuntimeError: CUDA out of memory", True),
        ("[Command finished with exit code 1]", True),
        ('{"output": "ok", "metadata": {"exit_code": 2}}', True),
        ("<returncode>127</returncode>", True),
        ("===== 2 failed, 3 passed in 0.1s =====", True),
        ("bash: foo: command not found", True),
        ("fatal: not a git repository", True),
        ("[Command finished with exit code 0]", False),
        ("<returncode>0</returncode>", False),
        ("5 passed, 0 failed", False),
        ("loss 0.1, mean error: 0.02", False),
        ("", False),
    ],
)
def test_a_failed_run_is_told_from_one_that_did_not_fail(printed: str, expected: bool) -> None:
    assert failed(printed) is expected


def test_fixing_is_debugging_until_a_run_does_not_fail() -> None:
    turns = [
        shell("cat > a.py <<E\nx\nE"),
        shell("python a.py", "NameError: x"),
        shell("cat a.py", "KeyError: what a file holds is no failure"),
        shell("sed -i s/x/y/ a.py"),
        shell("python a.py", "exit code 1"),
        shell("sed -i s/y/z/ a.py"),
        shell("python a.py", "exit code 0"),
        shell("cat > b.py <<E\nx\nE"),
        shell("python b.py"),
    ]
    assert turn_phases(turns) == [CODE, RUN, READ, DEBUG, DEBUG, DEBUG, DEBUG, CODE, RUN]


def test_writing_and_running_in_one_turn_is_coding_and_its_failure_counts() -> None:
    turns = [shell("cat > a.py <<E\nx\nE\npython a.py", "SyntaxError: x"), shell("sed -i s/x/y/ a.py")]
    assert turn_phases(turns) == [CODE, DEBUG]


def test_a_window_has_the_phase_of_most_of_its_turns() -> None:
    assert window_phase([READ, READ, RUN]) is READ
    assert window_phase([READ, DEBUG]) is DEBUG
    assert window_phase([OTHER, OTHER, OTHER, READ]) is READ
    assert window_phase([OTHER]) is OTHER
    assert window_phase([]) is OTHER


@pytest.mark.parametrize(
    "text",
    [
        "\n<tool_call>bash\n<arg_key>cmd</arg_key>\n<arg_value>ls -la</arg_value>\n</tool_call>",
        '<tool_call>\n{"name": "bash", "arguments": {"cmd": "ls -la"}}\n</tool_call>',
        'to=functions.bash <|constrain|>json<|message|>{"cmd": "ls -la"}<|call|>',
        "I look.\n<function=bash>\n<parameter=cmd>ls -la</parameter>\n</function>",
        "I look.\n\n<tool_call>bash\n<arg_key>cmd</arg_key>\n<arg_value>ls -la",
    ],
)
def test_calls_are_read_from_rendered_text(text: str) -> None:
    assert actions_in(text) == (Action(tool="bash", arguments={"cmd": "ls -la"}),)


def test_an_agent_without_tools_acts_in_fences() -> None:
    assert actions_in('<tool_call>{"name": "bash", "arguments": {"cmd": </tool_call>') == ()
    assert actions_in('<tool_call>{"name": 3, "arguments": {}}</tool_call>') == ()
    (bare,) = actions_in('<tool_call>{"name": "submit", "arguments": "done"}</tool_call>')
    assert bare == Action(tool="submit", arguments={})
    found = actions_in("THOUGHT: look\n\n```bash\nls -la\n```\n")
    assert found == (Action(tool="bash", arguments={"command": "ls -la\n"}),)
    assert actions_in("```mswea_bash_command\nls\n```")[0].arguments == {"command": "ls\n"}
    assert actions_in("```python\nprint(1)\n```") == ()


@given(text=st.text() | st.text(alphabet='<tool_call>{"name:}</arg_key>\n```bash\'"$(|&;#\\'))
def test_nothing_a_policy_says_raises(text: str) -> None:
    turns = [Turn(actions=actions_in(text), results=text), shell(text, text), shell(f"python - <<E\n{text}")]
    assert len(turn_phases(turns)) == 3


@given(made=transcripts(by_policy=False))
def test_rendered_text_tells_the_same_as_the_messages(made: Transcript) -> None:
    tokenizer = byte_tokenizer()
    rendered = GlmRenderer(tokenizer).transcript(made)
    for message, rendering in zip(made.messages, rendered.messages, strict=True):
        if not message.tool_calls:
            continue
        answers = [segment.ids for segment in rendering.segments if segment.kind.name == "ANSWER"]
        spelled = any("<" in value for call in message.tool_calls for value in call.arguments.values())
        if not spelled and "<" not in message.content:
            found = actions_in("".join(map(tokenizer.decode, answers)))
            assert [(one.tool, one.arguments) for one in found] == [
                (call.name, call.arguments) for call in message.tool_calls
            ]


def test_turns_hold_what_came_back() -> None:
    made = transcript(
        user("task"),
        assistant(calls=[bash("ls"), ToolCall(name="f", arguments={"n": [1]})]),
        tool("a"),
        tool("b"),
        assistant("done"),
        user("go on"),
    )
    first, second = turns_of(made.messages)
    assert [one.tool for one in first.actions] == ["bash", "f"]
    assert json.loads(first.actions[1].arguments["n"]) == [1]
    assert first.results == "a\nb"
    assert second == Turn(actions=(), results="go on")


def test_commands_are_split_as_a_shell_would() -> None:
    text = "A=1 sudo -E /usr/bin/python3 x.py 'a;b' | tee log.txt && ( cd y; echo \"z|\" > out )\n# no\nls"
    found = [(one.program, one.arguments, one.written) for one in commands(text)]
    assert found == [
        ("python3", ("x.py", "a;b"), ()),
        ("tee", ("log.txt",), ("log.txt",)),
        ("cd", ("y",), ()),
        ("echo", ("z|", ">", "out"), ("out",)),
        ("ls", (), ()),
    ]


def test_real_transcripts_have_the_phases_a_reader_finds(shared_data: Path) -> None:
    file = shared_data / "trajectories" / "openai_messages" / "swe-gym_openhands_sampled.json"
    found = [one for one in read_transcripts(file) if isinstance(one, Transcript)]
    phases = [turn_phases(turns_of(one.messages)) for one in found]
    # Read by hand: four views, a script, two runs of which the second fails, four looks, two fixes, a run that
    # passes, two replies without a call, the end.
    assert phases[0] == [*[READ] * 4, CODE, RUN, RUN, *[READ] * 4, *[DEBUG] * 3, OTHER, OTHER, WRITE]
    # The last one never gets its script to run; what it undoes afterwards is debugging too.
    assert Counter(phases[4]) == {DEBUG: 20, READ: 7, CODE: 1, RUN: 1, OTHER: 1}
