"""Why an episode failed, from its record: which part of the system is to be mended, the agent being the last.

    engine, sandbox, context   the ending says so
    dependency   the end of the episode went into installs and imports that failed and never worked
    agent        any other episode that did not finish, or whose score is low
Always: pure; a fault is a line that a program prints, at the start of a line, so code and prose about errors are none;
what the agent made itself (its own modules, Python given to a shell) is no dependency; in doubt it is the agent.

Limits. Things are matched by name, with a few aliases: a package that provides a module of another name counts as
mended only once the import or the failed command itself worked.
"""

import builtins
import keyword
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_klong.agent.ending import Ending
from megatron_klong.trajectory.episode import EpisodeRecord
from megatron_klong.trajectory.phases import failed
from megatron_klong.trajectory.schema import Message, Role, ToolCall
from megatron_klong.trajectory.shell import Command, commands

LAST_SHARE, LEAST_RESULTS = 0.25, 6  # the end of an episode: a share of its tool results, and at least so many
LEAST_FAULTS, FAULT_SHARE = 2, 1 / 3  # it was spent on a dependency if so many of them show such a fault
_EXCERPT_CHARACTERS = 200


class FailureCategory(StrEnum):
    DEPENDENCY = "dependency"
    CONTEXT = "context"
    ENGINE = "engine"
    SANDBOX = "sandbox"
    AGENT = "agent"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """message: the number, from 0, of the message that shows it; None where ending or error text says it."""

    category: FailureCategory
    message: int | None
    excerpt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A dependency that failed in one tool result. thing: what was missing, in lower case ("flash-attn", "cuda")."""

    thing: str
    message: int
    excerpt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """One tool result, and the call it answers with the commands in it."""

    message: int
    call: ToolCall | None
    commands: tuple[Command, ...]
    printed: str


_OF_ENDING = {
    Ending.ENGINE_FAILED: FailureCategory.ENGINE,
    Ending.SANDBOX_FAILED: FailureCategory.SANDBOX,
    Ending.CONTEXT_ERROR: FailureCategory.CONTEXT,
}
_IN_LIBRARY = r"(?:site|dist)-packages/(?P<thing>\w+)"
_NAMED_FAULTS = (
    re.compile(r"^(?:E +)?ModuleNotFoundError: No module named ['\"](?P<thing>\w+)", re.MULTILINE),
    re.compile(r"^\S*python[\d.]*: No module named (?P<thing>\w+)", re.MULTILINE),
    re.compile(rf"^(?:E +)?ImportError: cannot import name .*{_IN_LIBRARY}", re.MULTILINE),
    re.compile(rf"^(?:E +)?ImportError: .*{_IN_LIBRARY}\S*: undefined symbol", re.MULTILINE),
    re.compile(r"^.*?(?P<thing>lib[\w+-]+)\.so[\w.]*: cannot open shared object file", re.MULTILINE),
    re.compile(r"^ERROR: No matching distribution found for (?P<thing>[\w.-]+)", re.MULTILINE),
    re.compile(r"^ERROR: Could not find a version that satisfies the requirement (?P<thing>[\w.-]+)", re.MULTILINE),
    re.compile(r"^ *ERROR: (?:Failed building wheel for|Failed to build) (?P<thing>[\w.-]+)", re.MULTILINE),
    re.compile(r"^E: Unable to locate package (?P<thing>\S+)", re.MULTILINE),
    re.compile(r"^E: Package '(?P<thing>\S+)' has no installation candidate", re.MULTILINE),
    re.compile(r"^(?:[\w./-]+: )*(?:line \d+: )?(?P<thing>[\w+.-]+): command not found$", re.MULTILINE),
    re.compile(r"^(?:[\w./-]+: )+\d+: (?:exec: )?(?P<thing>[\w+.-]+): not found$", re.MULTILINE),
    re.compile(r"^zsh: command not found: (?P<thing>[\w+.-]+)", re.MULTILINE),
)
# Faults of an installer that name no package. A refused connection is one only where something was to be installed.
_INSTALL_FAULT = re.compile(
    r"^(?:ERROR: ResolutionImpossible|PackagesNotFoundError|ResolvePackageNotFound|E: Failed to fetch|"
    r"E: Unable to fetch some archives|E: Could not (?:open lock file|get lock)|.*No solution found when resolving).*",
    re.MULTILINE,
)
_REFUSED = re.compile(
    r"^.*(?:Temporary failure (?:in name resolution|resolving)|Could not resolve (?:host|proxy)|Network is unreachable|"
    r"unable to resolve host|Failed to establish a new connection|ProxyError|Connection refused|"
    r"CondaHTTPError|Tunnel connection failed|403 +Forbidden|ENOTFOUND|ECONNREFUSED).*",
    re.MULTILINE,
)
_CUDA = re.compile(
    r"^.*(?:NVIDIA driver on your system is too old|Found no NVIDIA driver|Torch not compiled with CUDA enabled|"
    r"CUDA driver version is insufficient|no kernel image is available for execution|no CUDA-capable device|"
    r"CUDA_HOME environment variable is not set|detected CUDA version .* mismatches|"
    r"forward compatibility was attempted on non supported HW).*",
    re.MULTILINE,
)
_INSTALLED = re.compile(
    r"^ *(?:Successfully (?:installed|built)|Installed \d+ packages?|Setting up) ?(.*)", re.MULTILINE
)
_PRESENT = re.compile(r"^Requirement already satisfied: ([\w.-]+)|^([\w.+-]+) is already the newest", re.MULTILINE)
_ADDED = re.compile(r"^ \+ ([\w.-]+)==", re.MULTILINE)  # uv
_INSTALLERS = frozenset(("pip", "pip3", "uv", "conda", "mamba", "apt", "apt-get", "npm", "yarn", "cargo", "poetry"))
_ANY_INSTALL = frozenset(("install", "network", "cuda"))  # things that name no package
_ALIASES = {
    "cv2": "opencv-python",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "pil": "pillow",
    "yaml": "pyyaml",
    "bs4": "beautifulsoup4",
    "attr": "attrs",
    "dateutil": "python-dateutil",
}
_NO_PROGRAMS = frozenset((*keyword.kwlist, *dir(builtins), "EOF", "END", "PY", "then", "fi", "done", "bash", "sh"))


def failure_category(record: EpisodeRecord, *, low_score: float = 0.0) -> FailureCategory | None:
    """The category of a failure; None: it finished with more than `low_score`, or goes on. ValueError: no Ending."""
    failure = explain_failure(record, low_score=low_score)
    return failure.category if failure else None


def explain_failure(record: EpisodeRecord, *, low_score: float = 0.0) -> Failure | None:
    """The same with its evidence. An episode without a score has a low one."""
    ending, said = Ending(record.ending), _excerpt(record.error or record.ending)
    if category := _OF_ENDING.get(ending):
        return Failure(category=category, message=None, excerpt=said)
    won = ending is Ending.FINISHED and record.score is not None and record.score > low_score
    if won or ending is Ending.SUSPENDED:
        return None
    if fault := decisive_fault([message.message() for message in record.messages]):
        return Failure(category=FailureCategory.DEPENDENCY, message=fault.message, excerpt=fault.excerpt)
    return Failure(category=FailureCategory.AGENT, message=None, excerpt=said)


def decisive_fault(messages: Sequence[Message]) -> Fault | None:
    """The last fault of a dependency, if the end of the episode was spent on such faults and they stayed."""
    steps = list(_steps(messages))
    count = min(len(steps), max(LEAST_RESULTS, round(len(steps) * LAST_SHARE)))
    last = {step.message for step in steps[len(steps) - count :]}
    lasting = [fault for fault in _lasting_faults(steps) if fault.message in last]
    shown = {fault.message for fault in lasting}
    spent = len(shown) >= LEAST_FAULTS and len(shown) >= FAULT_SHARE * count
    return lasting[-1] if spent else None


def _lasting_faults(steps: Sequence[_Step]) -> list[Fault]:
    """The faults after which the same thing never worked, in order."""
    own = "\n".join(text for step in steps for text in _argument_texts(step.call))
    faults: list[tuple[Fault, _Step]] = []
    for step in steps:
        new = [fault for fault in _faults(step) if not _is_own(fault.thing, own)]
        faults = [(fault, at) for fault, at in faults if not _mended(fault, at, step, new)]
        faults += [(fault, step) for fault in new]
    return [fault for fault, _ in faults]


def _steps(messages: Sequence[Message]) -> Iterator[_Step]:
    """Results go to their call by its id, or, where ids are missing, in the order of the calls."""
    open_calls: list[ToolCall] = []
    for number, message in enumerate(messages):
        if message.role is Role.ASSISTANT:
            open_calls = list(message.tool_calls)
        elif message.role is Role.TOOL:
            by_id = [call for call in open_calls if call.id is not None and call.id == message.tool_call_id]
            call = next(iter(by_id or open_calls), None)
            if call is not None:
                open_calls.remove(call)
            yield _Step(message=number, call=call, commands=tuple(_commands(call)), printed=message.content)


def _faults(step: _Step) -> Iterator[Fault]:
    found = [(match.group("thing"), match) for pattern in _NAMED_FAULTS for match in pattern.finditer(step.printed)]
    found = [(thing, match) for thing, match in found if thing not in _NO_PROGRAMS]
    if match := _INSTALL_FAULT.search(step.printed):
        found.append(("install", match))
    if any(map(_installs, step.commands)):
        found += [("network", match) for match in _REFUSED.finditer(step.printed)][-1:]
    if failed(step.printed):  # on a machine without a GPU the same lines are warnings
        found += [("cuda", match) for match in _CUDA.finditer(step.printed)][-1:]
    for thing, match in found:
        line = match.string[match.start() :].split("\n", 1)[0]
        yield Fault(thing=_normalized(thing), message=step.message, excerpt=_excerpt(line))


def _mended(fault: Fault, failed_at: _Step, step: _Step, new: Sequence[Fault]) -> bool:
    """Whether a later step shows that the thing works: it was installed, or used, or what failed ran again."""
    installed = _installed(step.printed)
    if fault.thing in installed or _ALIASES.get(fault.thing) in installed:
        return True
    if fault.thing in ("install", "network") and installed:
        return True
    if failed(step.printed) or any(other.thing == fault.thing for other in new):
        return False
    return _same_call(failed_at.call, step.call) or any(_uses(fault.thing, command) for command in step.commands)


def _installed(printed: str) -> set[str]:
    """The packages a result says are there now."""
    words = [word for line in _INSTALLED.findall(printed) for word in line.split() or ["install"]]
    names = {re.sub(r"-\d[\w.+!]*$|:\w+$", "", word) for word in words}  # einops-0.8.2, libgl1:amd64
    names |= {name for pair in _PRESENT.findall(printed) for name in pair if name}
    return {_normalized(name) for name in names | set(_ADDED.findall(printed))}


def _same_call(one: ToolCall | None, other: ToolCall | None) -> bool:
    return one is not None and other is not None and (one.name, one.arguments) == (other.name, other.arguments)


def _uses(thing: str, command: Command) -> bool:
    """Whether a command runs the program, imports the module or installs the package."""
    if thing in _ANY_INSTALL:
        return False
    if _normalized(command.program) == thing:
        return True
    words = [_normalized(re.split(r"[=<>\[~!]", word)[0]) for word in command.arguments]
    if _installs(command):
        return thing in words
    if not command.program.startswith("python"):
        return False
    module = re.escape(thing).replace("\\-", "[-_]")
    code = "\n".join([*command.arguments, command.fed])
    return re.search(rf"(?:^|[;\n ])(?:import|from) +{module}\b|^-m\n{module}\b", code, re.IGNORECASE) is not None


def _installs(command: Command) -> bool:
    """Whether it is an installer that installs: `apt-get install x`, `python -m pip install x`, `uv add x`."""
    installer = command.program in _INSTALLERS or "pip" in command.arguments
    return installer and not {"install", "add", "update", "ci"}.isdisjoint(command.arguments)


def _commands(call: ToolCall | None) -> Iterator[Command]:
    """The commands of a call; code for Python is one that is fed to it."""
    for text in _argument_texts(call):
        if call is not None and "python" in call.name.lower():
            yield Command(program="python", arguments=(), written=(), fed=text)
        else:
            yield from commands(text)


def _argument_texts(call: ToolCall | None) -> list[str]:
    return [value for value in call.arguments.values() if isinstance(value, str)] if call else []


def _is_own(thing: str, arguments: str) -> bool:
    """Whether the agent has a file or folder of that name: thing.py, thing/."""
    name = re.escape(thing).replace("\\-", "[-_]")
    return re.search(rf"(?<![\w-])(?<!-packages/){name}(?:\.py\b|/\w)", arguments, re.IGNORECASE) is not None


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _excerpt(text: str) -> str:
    return text.strip()[:_EXCERPT_CHARACTERS]
