"""The phase of work a turn, and by majority a window, belongs to: from the tools and commands it used.

    reading     looks at files, searches, browses: read tools, cat, grep, ls, `sed -n`, `git diff`
    coding      changes files: edit tools, patches, heredocs, `sed -i`, inline Python that writes
    running     starts programs: tests, training, installs, inline Python; every program no table names
    debugging   coding or running between a run that failed and the next one that did not
    writing     changes READMEs, reports and papers only, or hands in
    other       none of these: plans, questions, tools of another trade

A turn that does several things counts as the first of coding, writing, running, reading that it does.

Limits. It reads names, not intentions: reading on the way to a fix counts as reading, watching a log with `tail` too,
and a program that edits files as running. A failure is an exit status other than 0, or a line that looks like an
error in what a run printed, so tests that are meant to fail keep an agent "debugging".
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import PurePosixPath

from megatron_klong.trajectory.actions import Action, Turn
from megatron_klong.trajectory.shell import Command, commands


class Phase(StrEnum):
    READING = "reading"
    CODING = "coding"
    RUNNING = "running"
    DEBUGGING = "debugging"
    WRITING = "writing"
    OTHER = "other"


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Tools by name. SWE-agent's commands arrive as shell text, so programs are looked up here too.
_TOOLS = {
    Phase.READING: _names(
        "read read_file read_file_chunk read_many_files notebookread view view_image open open_file goto scroll_up "
        "scroll_down ls list_directory list_dir glob grep find_file search search_file search_dir search_code "
        "search_file_content grep_search file_search codebase_search web_search web_search_call "
        "google_web_search web_fetch websearch webfetch fetch browser browse visit"
    ),
    Phase.CODING: _names(
        "edit multiedit multi_edit write write_file create create_file replace insert str_replace edit_file "
        "apply_patch patch notebookedit undo_edit"
    ),
    Phase.WRITING: _names("submit finish attempt_completion task_complete"),
}
# Editors that also view, as their first argument says.
_EDITORS = _names("str_replace_editor str_replace_based_edit_tool text_editor file_editor")
_SHELLS = _names(
    "bash shell sh execute_bash run_shell_command terminal run_command exec_command execute_command local_shell "
    "bash_command shell_command run_terminal_cmd exec"
)
_PYTHONS = _names("python execute_ipython_cell ipython jupyter code_interpreter execute_python")

_READERS = _names(
    "cat head tail less more grep egrep fgrep rg ag ack ls tree find fd wc nl od xxd hexdump strings stat file du df "
    "diff cmp cut sort uniq awk jq sed perl ps nvidia-smi free"
)
_READING_GIT = _names("log show diff status blame grep ls-files branch rev-parse shortlog describe")
_CHANGING_GIT = _names("apply am")
# Programs that say nothing about the work by themselves.
_NEUTRAL = _names(
    "cd echo printf pwd export set unset source . sleep true false exit mkdir touch rm cp mv chmod ln which type test "
    "[ [[ for case esac done fi } in wait local return whoami date clear alias uname break continue tee git"
)
_PATH_KEYS = ("path", "file_path", "filename", "absolute_path", "file", "target_file", "notebook_path")
_COMMAND_KEYS = ("command", "cmd", "commands", "script", "keystrokes", "code", "input")

_PROSE = re.compile(r"^(readme|report|summary|changelog|contributing|paper)\b|\.(md|rst|tex)$", re.IGNORECASE)
_PATCHED = re.compile(r"^(?:\*\*\* (?:Add|Update) File: |\+\+\+ (?:b/)?)(\S+)", re.MULTILINE)
_PYTHON_WRITE = re.compile(r"\bopen\([^()]*,\s*(?:mode=)?['\"][wax]|\.write_(?:text|bytes)\(")
_PYTHON_TARGET = re.compile(r"\b(?:open|Path)\(\s*f?r?['\"]([^'\"]+)['\"](?:\s*,\s*(?:mode=)?['\"][wax]|\)\.write_)")
_STATUS = re.compile(
    r"(?:exit(?:ed)?(?: with)?[ _]?(?:code|status)|return[ _]?code)\W{0,4}(?:is |of )?(-?\d+)", re.IGNORECASE
)
_FAILURE = re.compile(
    r"^Traceback \(most recent call last\)|^(?:E\s+)?[\w.]*(?:Error|Exception)\b:|^(?:FAILED|ERROR)\b|"
    r"\b[1-9]\d* (?:failed|errors?)\b|command not found|Segmentation fault|core dumped|^make: \*\*\*|^npm ERR!|"
    r"^(?:error|fatal)(?:\[\w+\])?:",
    re.MULTILINE,
)
_STRONGEST = (Phase.CODING, Phase.WRITING, Phase.RUNNING, Phase.READING)
_IN_A_TIE = (Phase.DEBUGGING, Phase.CODING, Phase.RUNNING, Phase.WRITING, Phase.READING)


def turn_phases(turns: Iterable[Turn]) -> list[Phase]:
    """The phase of each turn of one transcript, in order: what a run printed decides what follows it."""
    phases: list[Phase] = []
    failing = False
    for turn in turns:
        did = {phase for action in turn.actions for phase in _action_phases(action)}
        phase = next((phase for phase in _STRONGEST if phase in did), Phase.OTHER)
        phases.append(Phase.DEBUGGING if failing and phase in (Phase.CODING, Phase.RUNNING) else phase)
        if Phase.RUNNING in did:
            failing = failed(turn.results)
    return phases


def window_phase(phases: Iterable[Phase]) -> Phase:
    """The phase of a window from those of its new turns: the most frequent; "other" only where all are."""
    counted = Counter(phases)
    del counted[Phase.OTHER]
    most = max(counted.values(), default=0)
    return next((phase for phase in _IN_A_TIE if most and counted[phase] == most), Phase.OTHER)


def failed(printed: str) -> bool:
    """Whether what a run printed says that it failed."""
    statuses = _STATUS.findall(printed)
    return (bool(statuses) and int(statuses[-1]) != 0) or _FAILURE.search(printed) is not None


def _action_phases(action: Action) -> Iterator[Phase]:
    name = re.split(r"\.|__", action.tool.lower())[-1]
    if name in _SHELLS:
        yield from _shell_phases(_command_text(action.arguments))
    elif name in _PYTHONS:
        yield _python_phase(_command_text(action.arguments))
    elif name in _EDITORS and action.arguments.get("command") == "view":
        yield Phase.READING
    elif name in _EDITORS or name in _TOOLS[Phase.CODING]:
        yield _edit_phase(_targets(action.arguments))
    else:
        yield from (phase for phase, names in _TOOLS.items() if name in names)


def _targets(arguments: Mapping[str, str]) -> list[str]:
    """The files an edit changes, as far as it names them."""
    named = [arguments[key] for key in _PATH_KEYS if key in arguments]
    return named or [path for text in arguments.values() for path in _PATCHED.findall(text)]


def _edit_phase(targets: Sequence[str]) -> Phase:
    prose = bool(targets) and all(_PROSE.search(PurePosixPath(target).name) for target in targets)
    return Phase.WRITING if prose else Phase.CODING


def _python_phase(code: str) -> Phase:
    return _edit_phase(_PYTHON_TARGET.findall(code)) if _PYTHON_WRITE.search(code) else Phase.RUNNING


def _command_text(arguments: Mapping[str, str]) -> str:
    """The shell text or code of a call; the list ["bash", "-lc", TEXT] is TEXT."""
    text = next((arguments[key] for key in _COMMAND_KEYS if key in arguments), "")
    try:
        words = json.loads(text) if text.startswith("[") else None
    except ValueError:  # a shell test: [ -f x ] && ...
        words = None
    return shlex.join(map(str, words)) if isinstance(words, list) else text


def _shell_phases(text: str) -> Iterator[Phase]:
    if "*** Begin Patch" in text:
        yield _edit_phase(_PATCHED.findall(text))
        return
    for command in commands(text):
        yield from _command_phases(command)


def _command_phases(command: Command) -> Iterator[Phase]:
    program, arguments = command.program, command.arguments
    if program in ("cat", "echo", "printf", "tee") and command.written:
        yield _edit_phase(command.written)
    elif program in ("sed", "perl") and any(re.match(r"-\w*i|--in-place", word) for word in arguments):
        yield Phase.CODING
    elif program == "git" and not _READING_GIT.isdisjoint(arguments):
        yield Phase.READING
    elif program == "git" and not _CHANGING_GIT.isdisjoint(arguments):
        yield Phase.CODING
    elif program.startswith("python") and any(word in ("-c", "-") or "<<" in word for word in arguments):
        yield _python_phase("\n".join([*arguments, command.fed]))
    elif program in _EDITORS:
        yield Phase.READING if "view" in arguments[:1] else _edit_phase(arguments[1:2])
    elif program in _READERS:
        yield Phase.READING
    elif tool_phases := [phase for phase, names in _TOOLS.items() if program in names]:
        yield from tool_phases
    elif program not in _NEUTRAL:
        yield Phase.RUNNING
