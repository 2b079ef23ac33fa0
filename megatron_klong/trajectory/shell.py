"""Shell text -> its simple commands: program, arguments, files written to, text fed to it.

Split at operators, not interpreted: variables, functions and `eval` stay what they are. Nothing raises: of a text with
a quote that is never closed, the commands before the quote count.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1([^\n]*)\n(.*?)(?:^\s*\2\s*$|\Z)", re.DOTALL | re.MULTILINE)
_COMMENT_LINE = re.compile(r"^\s*#.*$", re.MULTILINE)
_OPENING = re.compile(r"^(\w+=)?\$?\(+(?=.)")  # of a subshell, or of $(...), before its first word
_SEPARATORS = frozenset(";|&\n")
# What may stand before a command, with options and durations of its own.
_WRAPPERS = frozenset(
    ("sudo", "time", "nohup", "exec", "env", "command", "timeout", "nice", "xargs", "do", "then", "else", "elif", "if")
) | {"while", "until", "!", "{"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """program: its name without folders.  written: files its output goes to.  fed: heredocs of the whole text."""

    program: str
    arguments: tuple[str, ...]
    written: tuple[str, ...]
    fed: str


def commands(text: str) -> Iterator[Command]:
    """The simple commands in order; those inside `bash -c TEXT` are commands of their own."""
    fed = "\n".join(body for _, _, _, body in _HEREDOC.findall(text))
    for words in _split(_COMMENT_LINE.sub("", _HEREDOC.sub(r" <<\2 \3\n", text))):
        inner = _unwrapped(words)
        if not inner:
            continue
        program, rest = PurePosixPath(inner[0]).name.rstrip(")"), inner[1:]
        if program in ("bash", "sh") and len(rest) > 1 and re.fullmatch(r"-\w*c", rest[0]):
            yield from commands(rest[1])
        else:
            yield Command(program=program, arguments=tuple(rest), written=tuple(_written(program, rest)), fed=fed)


def _split(text: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&<>\n")
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    try:
        for token in lexer:
            if token and set(token) <= _SEPARATORS:
                yield words
                words = []
            elif token not in ("(", ")"):
                words.append(token)
    except ValueError:  # a quote that is never closed
        pass
    yield words


def _unwrapped(words: Sequence[str]) -> Sequence[str]:
    """A command without variables set for it and without what only starts it (`sudo`, `timeout 60`, `then`)."""
    for start, word in enumerate(words):
        opened = _OPENING.sub("", word)
        if opened != word:
            return [opened, *words[start + 1 :]]
        option = start > 0 and re.fullmatch(r"-.*|\d+(\.\d+)?[smhd]?", word)
        if word not in _WRAPPERS and not re.match(r"\w+=", word) and not option:
            return words[start:]
    return []


def _written(program: str, arguments: Sequence[str]) -> list[str]:
    files = [target for sign, target in pairwise(arguments) if sign in (">", ">>", ">|")]
    if program == "tee":
        files += [word for word in arguments if not word.startswith(("-", "<", ">"))]
    return [file for file in files if not file.startswith("/dev/")]
