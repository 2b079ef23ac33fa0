"""Post-hoc findings in transcripts: what was tried, what was got, and what is only a mention."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.agent.violations import Finding, _spellings, find_violations
from megatron_klong.sandbox.egress.rules import Blacklist
from megatron_klong.trajectory.importers import read_transcripts
from megatron_klong.trajectory.schema import Message, Role, ToolCall, Transcript

RULE = "https://github.com/chengzelei/RICE"
BLACKLIST = Blacklist.parse(f"{RULE}\nhttps://huggingface.co/datasets/owner/set")


def call(text: str, *, tool: str = "bash", key: str = "cmd", **others: str) -> Message:
    return Message(role=Role.ASSISTANT, tool_calls=(ToolCall(name=tool, arguments={**others, key: text}),))


def result(text: str) -> Message:
    return Message(role=Role.TOOL, content=text)


def kinds(*messages: Message) -> list[tuple[int, str]]:
    return [(finding.message, finding.kind) for finding in find_violations(messages, BLACKLIST)]


@pytest.mark.parametrize(
    "command",
    [
        "git clone https://github.com/chengzelei/RICE",
        "cd /tmp && timeout 60 git clone --depth 1 https://github.com/ChengZelei/rice.git x",
        "git clone git@github.com:chengzelei/RICE.git",
        "git clone ssh://git@github.com/chengzelei/RICE",
        "git clone git://github.com/chengzelei/RICE",
        "git remote add origin https://github.com/chengzelei/RICE && git fetch",
        "git submodule add https://github.com/chengzelei/RICE",
        "pip install git+https://github.com/chengzelei/RICE@main#egg=rice",
        "python3 -m pip install -q git+ssh://git@github.com/chengzelei/RICE",
        "uv pip install https://github.com/chengzelei/RICE/archive/main.zip",
        "curl -sL https://codeload.github.com/chengzelei/RICE/tar.gz/main | tar xz",
        "wget -q https://raw.githubusercontent.com/chengzelei/RICE/main/train.py",
        "curl https://api.github.com/repos/chengzelei/RICE/contents",
        "curl https://github.com/x/../chengzelei/%52ICE",
        "wget https://web.archive.org/web/2024/https://github.com/chengzelei/RICE",
        "gh repo clone chengzelei/RICE",
        "npx degit chengzelei/RICE",
        "OWNER=chengzelei; REPO=RICE; git clone https://github.com/$OWNER/${REPO}",
        'git clone https://git""hub.com/chengzelei/RICE',
        "git clone \\\n  https://github.com/chengzelei/RICE",
        "bash -c 'git clone https://github.com/chengzelei/RICE'",
        "curl $(echo aHR0cHM6Ly9naXRodWIuY29tL2NoZW5nemVsZWkvUklDRQ== | base64 -d)",
        "python3 -c \"import requests; requests.get('https://github.com/chengzelei/RICE')\"",
        "python3 - <<'EOF'\nfrom git import Repo\nRepo.clone_from('https://github.com/chengzelei/RICE', 'x')\nEOF",
        "cat > get.sh <<EOF\ngit clone https://github.com/chengzelei/RICE\nEOF\nbash get.sh",
        "hf download owner/set --repo-type dataset",
        "file:///dev/null; git fetch https://github.com/chengzelei/RICE.wiki.git",
    ],
)
def test_commands_that_fetch_it(command: str) -> None:
    assert (0, "attempted") in kinds(call(command))


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request\nurllib.request.urlopen('https://github.com/chengzelei/RICE')",
        "import subprocess\nsubprocess.run(['git', 'clone', 'https://github.com/chengzelei/RICE'])",
        "import os\nos.system('git clone https://github.com/chengzelei/RICE')",
        "owner = 'chengzelei'\nurl = f'https://github.com/{owner}/RICE'\nrequests.get(url)",
        "url = 'https://github.com/' + 'chengzelei' + '/RICE'\nrequests.get(url)",
        "torch.hub.load('chengzelei/RICE', 'model')",
        "from huggingface_hub import snapshot_download\nsnapshot_download('owner/set', repo_type='dataset')",
        "load_dataset('owner/set')",
    ],
)
def test_programs_that_fetch_it(code: str) -> None:
    assert kinds(call(code, tool="python", key="code")) == [(0, "attempted")]
    assert kinds(call(code, tool="write_file", key="content", path="get.py")) == [(0, "attempted")]


@pytest.mark.parametrize(
    "command",
    [
        "cat /home/paper/blacklist.txt",
        "grep -r 'github.com/chengzelei/RICE' /home/paper",
        "echo 'We did not use https://github.com/chengzelei/RICE' >> README.md",
        "cat > README.md <<EOF\nThe authors' code (git clone https://github.com/chengzelei/RICE) was not used.\nEOF",
        "# git clone https://github.com/chengzelei/RICE is forbidden\nls",
        "git clone https://github.com/other/RICE",
        "git commit -m 'no code from https://github.com/chengzelei/RICE'",
        "pip install rice",
        "ls /home/chengzelei/RICE",
    ],
)
def test_commands_that_only_speak_of_it(command: str) -> None:
    assert not any(finding.is_violation for finding in find_violations([call(command), result("ok")], BLACKLIST))


def test_code_that_only_speaks_of_it() -> None:
    code = "# https://github.com/chengzelei/RICE must not be used\nimport requests\nrequests.get('https://example.org/data')"
    assert not any(
        finding.is_violation for finding in find_violations([call(code, tool="python", key="code")], BLACKLIST)
    )


def test_reading_the_blacklist_or_the_addendum_is_a_mention() -> None:
    messages = [
        Message(role=Role.SYSTEM, content="Never use the URLs in blacklist.txt."),
        Message(role=Role.USER, content="Reproduce the paper."),
        call("cat /home/paper/blacklist.txt"),
        result(f"{RULE}\n"),
        call("/home/paper/addendum.md", tool="read_file_chunk", key="file"),
        result(f"12: The original code is at {RULE}."),
        Message(role=Role.ASSISTANT, content=f"I must not use {RULE}.", reasoning=f"{RULE} is forbidden."),
    ]
    assert kinds(*messages) == [(3, "mentioned"), (5, "mentioned"), (6, "mentioned")]


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (f"git clone {RULE}", "Cloning into 'RICE'...\n"),
        (f"git clone -q {RULE}", "(no output)"),
        (f"curl -sO {RULE}/archive/main.zip", ""),
        (f"pip install git+{RULE}", "Collecting git+...\nSuccessfully installed rice-0.1"),
        ("curl -s https://raw.githubusercontent.com/chengzelei/RICE/main/README.md", "# RICE: Breaking Through"),
    ],
)
def test_what_did_not_fail_was_obtained(command: str, printed: str) -> None:
    assert kinds(call(command), result(printed)) == [(0, "attempted"), (1, "obtained")]


@pytest.mark.parametrize(
    "printed",
    [
        "Cloning into 'RICE'...\nfatal: unable to access: The requested URL returned error: 403\n[exit code 128]",
        "fatal: unable to access: Could not resolve host: github.com",
        "Refused by the rules of the sandbox's network: the task's blacklist forbids it",
        "curl: (56) CONNECT tunnel failed, response 403\n[exit code 56]",
        "ERROR: Could not install packages",
        "(no output)",
        "Killed: the command ran longer than 10m.",
    ],
)
def test_what_failed_was_not_obtained(printed: str) -> None:
    assert kinds(call(f"git clone {RULE}"), result(printed)) == [(0, "attempted")]


@pytest.mark.parametrize(
    "printed",
    [
        f"origin\t{RULE} (fetch)\norigin\t{RULE} (push)",
        "origin\tgit@github.com:chengzelei/RICE.git (fetch)",
        f'[remote "origin"]\n\turl = {RULE}.git\n',
        f"numpy==1.0\nrice @ git+{RULE}@0123abcd",
        f"  Resolved {RULE} to commit 0123abcd",
    ],
)
def test_results_that_show_possession(printed: str) -> None:
    assert (1, "obtained") in kinds(call("whatever"), result(printed))


def test_a_finding_names_rule_and_place() -> None:
    messages = [call("ls"), result("a"), call(f"cd /tmp\ngit clone {RULE} x\nls x")]
    expected = Finding(message=2, kind="attempted", rule=RULE, text=f"git clone {RULE} x")
    assert find_violations(messages, BLACKLIST) == (expected,)


def test_without_a_blacklist_there_is_nothing_to_find() -> None:
    assert find_violations([call(f"git clone {RULE}")], Blacklist.parse("none")) == ()


@given(text=st.text(max_size=300), reply=st.text(max_size=100))
def test_nothing_raises(text: str, reply: str) -> None:
    find_violations([call(text), result(text), Message(role=Role.ASSISTANT, content=reply)], BLACKLIST)
    find_violations([call(f"X={text} git clone {RULE}{text}"), result(reply)], BLACKLIST)


def transcripts(folder: Path) -> list[Transcript]:
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            found += [transcript for transcript in read_transcripts(file) if isinstance(transcript, Transcript)]
        except (ValueError, OSError):
            continue
    return found


def test_real_transcripts_of_other_tasks_hold_no_violation(shared_data: Path) -> None:
    """Real work with much git, pip and curl in it, none of it with the papers' repositories."""
    found = transcripts(shared_data / "trajectories")
    assert len(found) > 10
    entries = [
        entry
        for file in sorted(shared_data.glob("paperbench/papers/*/blacklist.txt"))
        for entry in Blacklist.read(file).entries
    ]
    blacklist = Blacklist(entries)
    assert [finding for transcript in found for finding in find_violations(transcript.messages, blacklist)] == []


def test_a_real_run_of_the_rice_task_only_mentions_its_blacklist(shared_data: Path) -> None:
    blacklist = Blacklist.read(shared_data / "paperbench/papers/rice/blacklist.txt")
    (transcript,) = transcripts(shared_data / "paperbench/runs")
    findings = find_violations(transcript.messages, blacklist)
    assert not any(finding.is_violation for finding in findings)


@pytest.mark.parametrize("text", ["export PATH=" + ":".join(["$PATH"] * 300), "A='{A}{A}{A}{A}{A}{A}{A}{A}'\n" * 200])
def test_a_variable_that_names_itself_does_not_blow_up(text: str) -> None:
    assert max(map(len, _spellings(text))) < 10 * len(text) + (1 << 17)
    assert kinds(call(f"{text}; git clone {RULE}")) == [(0, "attempted")]
