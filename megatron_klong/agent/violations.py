"""What a transcript shows of forbidden material: asked for, got, or only spoken of, whether or not a network was there.

The proxy sees requests; this sees what was meant. It reads the calls as shell or Python text, in several spellings
(variables put in, string literals joined, quotes and base64 taken off), and looks for what the task's blacklist names.

    attempted   a command or program that fetches it, run or written to a script
    obtained    a result that shows that it is there: a clone that did not fail, `git remote -v`, `pip freeze`
    mentioned   anything else: the blacklist or the addendum read, a line in a README, a sentence of the reply

Always (tests/unit/agent/test_violations.py): pure; nothing raises, however a reply is damaged; at most one finding for
each message, kind and rule. It reads text, it does not run it: a URL computed at run time is found only in what the
program printed.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal

from megatron_klong.sandbox.egress.rules import Blacklist
from megatron_klong.trajectory.actions import Action, actions_in
from megatron_klong.trajectory.schema import Message, Role
from megatron_klong.trajectory.shell import Command, commands

type Kind = Literal["attempted", "obtained", "mentioned"]

_EXCERPT = 200
_DEEPEST = 3  # scripts within scripts
_MOST_ADDED = 1 << 16  # characters that variables may add to a text, beside four times its own
_MOST_BASE64 = 32  # of a text

# Programs that fetch what their arguments name; where only some of their subcommands do, those.
_FETCHERS: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("curl", "wget", "aria2c", "axel", "http", "https", "lynx", "w3m", "links", "svn", "hg"), frozenset()
    ),
    **dict.fromkeys(
        ("gh", "go", "npx", "degit", "hf", "huggingface-cli", "scp", "rsync", "chromium", "firefox"), frozenset()
    ),
    "git": frozenset(("clone", "fetch", "pull", "remote", "ls-remote", "submodule", "archive")),
    **dict.fromkeys(
        ("pip", "pip3", "pipx", "uv", "poetry"), frozenset(("install", "download", "add", "wheel", "run", "pip"))
    ),
    **dict.fromkeys(("conda", "mamba", "npm", "yarn", "pnpm", "cargo"), frozenset(("install", "i", "add", "create"))),
}
_BY_NAME = frozenset(("gh", "npx", "degit", "npm", "hf", "huggingface-cli"))  # take a plain owner/repo
_INTERPRETERS = re.compile(r"(?:i?python|pypy|node|perl|ruby|Rscript)[\d.]*")
_CODE_FETCHES = re.compile(
    r"\b(?:requests|httpx|session|client|aiohttp|http|s)\.(?:get|post|request|stream|head)\s*\("
    r"|\burl(?:open|retrieve)\s*\(|\bclone_from\s*\(|\bwget\.download\s*\(|\bhub\.(?:load|download)\w*\s*\("
    r"|\b(?:snapshot_download|hf_hub_download|load_dataset|from_pretrained|download_url\w*|download_file|fetch)\s*\("
    r"|\bgit[\"',\s\]]+(?:clone|fetch|pull|ls-remote)\b|\b(?:curl|wget)\b|\bpip[\"',\s]+install\b"
)
_BY_NAME_IN_CODE = re.compile(
    r"(?:hub\.load|snapshot_download|hf_hub_download|load_dataset|from_pretrained|get_repo)\s*\([^()]*"
)
_COMMENTS = re.compile(r"^\s*(?:#|//).*$", re.MULTILINE)
_PROSE = frozenset((".md", ".txt", ".rst", ".tex", ".html", ".json", ".csv", ".log"))
_PATH_ARGUMENTS = ("path", "file", "file_path", "filename", "file_name")

_ASSIGNED = re.compile(r"(?:^|[\s;&|(])(\w+)\s?=\s?(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^\s\"'`;&|()]+))")
_JOINED = re.compile(r"[\"']\s*\+?\s*[\"']")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")

_FAILED = re.compile(
    r"fatal:|\b(?:error|HTTP|status)\D{0,20}\b(?:403|404|5\d\d)\b|could not resolve|failed to connect|no such host"
    r"|network is unreachable|connection (?:refused|reset|timed out)|refused by the rules|\[exit code [1-9]"
    r"|command not found|no matching distribution|temporary failure|traceback \(most recent|ERROR:|timed out|Killed:",
    re.IGNORECASE,
)
_QUIET = re.compile(r"\s(?:-q|--quiet|-sO|-so|-s|-o|-O)\b")
_POSSESSED = (
    r"^\s*\w+\s+\S*{url}\S*\s+\((?:fetch|push)\)",  # git remote -v
    r"^\s*url\s*=\s*\S*{url}",  # .git/config
    r"@\s*git\+\S*{url}",  # pip freeze
    r"Resolved\s+\S*{url}\S*\s+to commit",  # pip install
    r"^\s*(?:remote\.\w+\.url|Fetch URL:)\s*[=:]?\s*\S*{url}",  # git config, git remote show
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing found. message: its number, from 0.  text: an excerpt.  rule: the entry of the blacklist."""

    message: int
    kind: Kind
    rule: str
    text: str

    @property
    def is_violation(self) -> bool:
        return self.kind != "mentioned"


def find_violations(messages: Sequence[Message], blacklist: Blacklist) -> tuple[Finding, ...]:
    """All findings, in the order of the messages; none where nothing is forbidden."""
    if not blacklist:
        return ()
    found: dict[tuple[int, Kind, str], Finding] = {}
    scan = _Scan(blacklist)
    for number, message in enumerate(messages):
        for kind, rule, text in scan.message(message):
            finding = Finding(message=number, kind=kind, rule=rule, text=text[:_EXCERPT])
            found.setdefault((number, kind, rule), finding)
    return tuple(found.values())


class _Scan:
    """Goes through a transcript, and knows of the last reply what it ran."""

    def __init__(self, blacklist: Blacklist) -> None:
        self._blacklist = blacklist
        self._names = {
            rule: re.compile(rf"(?<![\w./-]){re.escape(name)}(?:\.git)?(?![\w/-])", re.IGNORECASE)
            for name, rule in blacklist.repositories.items()
        }
        self._running: dict[str, str] = {}  # rule -> the call that fetches it, until the next reply

    def message(self, message: Message) -> Iterator[tuple[Kind, str, str]]:
        if message.role is not Role.ASSISTANT:
            yield from self._result(message.content)
            return
        self._running = {}
        actions = _actions_of(message)
        for action in actions:
            yield from self._call(action)
        for text in (message.content, message.reasoning or ""):
            if message.tool_calls or not actions:
                yield from self._mentions(text)

    def _mentions(self, text: str) -> Iterator[tuple[Kind, str, str]]:
        for reference in self._blacklist.references(text):
            yield "mentioned", reference.rule, _around(text, reference.url)

    def _call(self, action: Action) -> Iterator[tuple[Kind, str, str]]:
        path = next((action.arguments[key] for key in _PATH_ARGUMENTS if key in action.arguments), "")
        for key, text in action.arguments.items():
            rules = set()
            for spelled in _spellings(text):
                for rule, ran in self._fetches(spelled, action.tool, key, path):
                    rules.add(rule)
                    if ran:
                        self._running[rule] = text
            for rule in rules:
                yield "attempted", rule, self._excerpt(text, rule)
            for spelled in _spellings(text):
                yield from (found for found in self._mentions(spelled) if found[1] not in rules)

    def _fetches(self, text: str, tool: str, key: str, path: str) -> Iterator[tuple[str, bool]]:
        """The rules that a call's argument goes against, and whether what does so was run and not only written."""
        if path:
            if key not in _PATH_ARGUMENTS and PurePosixPath(path).suffix.lower() not in _PROSE:
                yield from ((rule, False) for rule in {*self._shell(text), *self._code(text)})
        elif "python" in tool.lower() or key == "code":
            yield from ((rule, True) for rule in self._code(text))
        else:
            yield from ((rule, True) for rule in self._shell(text))
            yield from ((rule, False) for rule in self._written(text))

    def _shell(self, text: str, depth: int = 0) -> Iterator[str]:
        for command in commands(text):
            line = " ".join(command.arguments)
            if _INTERPRETERS.fullmatch(command.program):
                module = " ".join(command.arguments[1:]) if command.arguments[:1] == ("-m",) else None
                if module is not None and depth < _DEEPEST:
                    yield from self._shell(module, depth + 1)
                yield from self._code(f"{line}\n{command.fed}")
            elif command.program in ("bash", "sh", "ssh", "eval", "source") and command.fed and depth < _DEEPEST:
                yield from self._shell(command.fed, depth + 1)
            elif _fetches(command):
                yield from (reference.rule for reference in self._blacklist.references(line))
                if command.program in _BY_NAME:
                    yield from self._named(line)

    def _written(self, text: str) -> Iterator[str]:
        """What a script that the text writes to a file would fetch."""
        for command in commands(text):
            if command.fed and command.written and PurePosixPath(command.written[0]).suffix.lower() not in _PROSE:
                yield from self._shell(command.fed, 1)
                yield from self._code(command.fed)

    def _code(self, text: str) -> Iterator[str]:
        code = _COMMENTS.sub("", text)
        if _CODE_FETCHES.search(code):
            yield from (reference.rule for reference in self._blacklist.references(code))
        for part in _BY_NAME_IN_CODE.findall(code):
            yield from self._named(part)

    def _named(self, text: str) -> Iterator[str]:
        yield from (rule for rule, name in self._names.items() if name.search(text))

    def _result(self, text: str) -> Iterator[tuple[Kind, str, str]]:
        for reference in self._blacklist.references(text):
            kind: Kind = "obtained" if _shows_possession(text, reference.url) else "mentioned"
            yield kind, reference.rule, _around(text, reference.url)
        for rule, call in self._running.items():
            silent = text.strip() in ("", "(no output)")
            if not _FAILED.search(text) and (not silent or _QUIET.search(call)):
                yield "obtained", rule, text.strip() or call
        self._running = {}

    def _excerpt(self, text: str, rule: str) -> str:
        for reference in self._blacklist.references(text):
            if reference.rule == rule:
                return _around(text, reference.url)
        return text


def _actions_of(message: Message) -> tuple[Action, ...]:
    if not message.tool_calls:
        return actions_in(message.content)
    return tuple(Action(tool=call.name, arguments=_texts(call.arguments)) for call in message.tool_calls)


def _texts(arguments: Mapping[str, object]) -> dict[str, str]:
    def text(value: object) -> str:
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return str(value[-1]) if value[:1] in (["bash"], ["sh"]) else " ".join(value)  # an argument list
        return value if isinstance(value, str) else json.dumps(value, default=str)

    return {key: text(value) for key, value in arguments.items()}


def _fetches(command: Command) -> bool:
    subcommands = _FETCHERS.get(command.program)
    return subcommands is not None and (not subcommands or not subcommands.isdisjoint(command.arguments))


def _spellings(text: str) -> list[str]:
    """The text; with its variables put in; with its literals joined; without quotes; with its base64 read."""
    values = {name: next(filter(None, parts), "") for name, *parts in _ASSIGNED.findall(text)}
    plain = re.sub(r"\\\r?\n\s*", " ", text)
    put = _Putting(values, most=4 * len(plain) + _MOST_ADDED)
    filled = plain
    for _ in range(_DEEPEST if values else 0):
        filled = re.sub(r"\$?\{(\w+)\}|\$(\w+)", put, filled)
    filled = re.sub(r"[\"']\s*\+\s*(\w+)", put, filled)
    joined = _JOINED.sub("", filled)
    found = [text, plain, filled, joined, re.sub(r"(?<=\w)[\"'\\]+(?=[\w./])", "", filled)]
    for part in islice(dict.fromkeys(_BASE64.findall(text)), _MOST_BASE64):
        if clear := _clear(part):  # in the place of `$(echo ... | base64 -d)`, or just of what stood there
            around = rf"[$`]\(?[^()`]*{re.escape(part)}[^()`]*[)`]"
            found.append(clear.join(re.split(around, filled)))
            found.append(filled.replace(part, clear))
    return list(dict.fromkeys(found))


class _Putting:
    """Puts values of variables in; at most so many characters, for a variable may name itself many times over."""

    def __init__(self, values: Mapping[str, str], *, most: int) -> None:
        self._values, self._left = values, most

    def __call__(self, found: re.Match[str]) -> str:
        value = self._values.get(next(filter(None, found.groups()), ""), found[0])
        self._left -= len(value)
        return value if self._left >= 0 else found[0]


def _clear(text: str) -> str:
    """What base64 stands for, if that is text."""
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_" if re.search("[-_]", text) else None)
        clear = decoded.decode("ascii")
    except ValueError:
        return ""
    return clear if clear.isprintable() or clear.strip().isprintable() else ""


def _shows_possession(text: str, url: str) -> bool:
    patterns = (pattern.replace("{url}", re.escape(url)) for pattern in _POSSESSED)
    return any(re.search(pattern, text, re.IGNORECASE | re.MULTILINE) for pattern in patterns)


def _around(text: str, url: str) -> str:
    """The line in which a URL stands, or what there is of it."""
    at = text.lower().find(url[:60].lower())
    if at < 0:
        return url
    start = text.rfind("\n", 0, at) + 1
    return text[max(start, at - _EXCERPT // 2) :].partition("\n")[0].strip()
