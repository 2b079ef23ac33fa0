"""Plays a task in memory: a teacher, the tools it needs, and no sandbox.

For counting turns and for making demonstrations quickly. It knows only the commands of the papers. What it says to the
teacher is what the agent scaffold says, without reminders of time (tests/integration/examples plays the same episodes
by the scaffold in a sandbox and compares).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.longhaul.context import Message
from examples.longhaul.experiment import (
    CHECK_COMMAND,
    LOOKUP_PATTERN,
    RECORD_PATTERN,
    REPORT_PATTERN,
    REPRODUCE_PATTERN,
    RUN_PATTERN,
    Experiment,
    score,
    score_line,
)
from examples.longhaul.teachers import PAPER_FILE, Reply, Teacher
from megatron_klong.agent.reading import ReadingTracker

PROMPT = f"Replicate the paper {PAPER_FILE} in /home/submission."


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """What was said, and the files left in /home/submission."""

    messages: tuple[Message, ...]
    files: Mapping[str, str]
    submitted: bool

    @property
    def num_turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self.messages)


@dataclass(slots=True)
class Workspace:
    """The commands of the papers, on files held in memory."""

    paper: str
    salt: str
    files: dict[str, str] = field(default_factory=dict)
    reading: ReadingTracker = field(init=False)

    def __post_init__(self) -> None:
        self.reading = ReadingTracker(self.paper)

    def result(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What a tool call answers, with the scaffold's notes."""
        read_before = self.reading.complete
        text = self.call(name, arguments).rstrip("\n") or "(no output)"
        self.reading.show(text)
        if read_before:
            return text
        return f"{text}\n{'[paper read]' if self.reading.complete else f'[paper read: {self.reading.progress}]'}"

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        if name == "read_file_chunk":
            return file_chunk(self.paper, int(arguments["start_line"]), int(arguments["max_lines"]))
        return self.bash(arguments["cmd"]) if name == "bash" else "Submitted."

    def bash(self, command: str) -> str:
        if command == CHECK_COMMAND:
            command = self.files["reproduce.sh"].strip()
        if match := RUN_PATTERN.fullmatch(command):
            experiment = Experiment(method=match[1], setting=int(match[2]), dataset=match[3])
            return score_line(*experiment.pair, score(self.salt, experiment)) + "\n"
        if RECORD_PATTERN.fullmatch(command):
            self.files["results.txt"] = self.files.get("results.txt", "") + _echoed(command)
            return ""
        if REPORT_PATTERN.fullmatch(command) or REPRODUCE_PATTERN.fullmatch(command):
            self.files[command.rpartition(" > ")[2]] = _echoed(command)
            return ""
        if match := LOOKUP_PATTERN.fullmatch(command):
            lines = self.files.get("results.txt", "").splitlines(keepends=True)
            return "".join(line for line in lines if match[1] in line and match[2] in line)
        raise ValueError(f"the simulated workspace does not know this command: {command}")


def play(
    task_directory: Path,
    teacher: Teacher,
    *,
    visible: Callable[[Sequence[Message]], Sequence[Message]] = lambda messages: messages,
    max_turns: int = 10_000,
) -> Episode:
    """Plays a task until the teacher submits or calls no tool; `visible` says what it sees at each turn."""
    facts = json.loads((task_directory / "longhaul.json").read_text())
    workspace = Workspace(paper=(task_directory / "paper.md").read_text(), salt=facts["salt"])
    return play_in(workspace, teacher, visible=visible, max_turns=max_turns)


def play_in(
    workspace: Workspace,
    teacher: Teacher,
    *,
    prompt: str = PROMPT,
    visible: Callable[[Sequence[Message]], Sequence[Message]] = lambda messages: messages,
    max_turns: int = 10_000,
) -> Episode:
    """The same in a workspace that need not be on disk."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    submitted = False
    for turn in range(max_turns):
        reply = teacher(visible(messages))
        messages.append(assistant_message(reply, call_id=f"call_{turn}"))
        if reply.tool is None:
            break
        result = workspace.result(reply.tool, reply.arguments or {})
        messages.append({"role": "tool", "tool_call_id": f"call_{turn}", "content": result})
        if reply.tool == "submit":
            submitted = True
            break
    return Episode(messages=tuple(messages), files=workspace.files, submitted=submitted)


def assistant_message(reply: Reply, *, call_id: str) -> dict[str, Any]:
    """A reply as an OpenAI chat message."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": reply.content,
        "reasoning_content": reply.reasoning,
    }
    if reply.tool is not None:
        function = {"name": reply.tool, "arguments": json.dumps(dict(reply.arguments or {}))}
        message["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
    return message


def file_chunk(text: str, start_line: int, max_lines: int) -> str:
    """What the scaffold's read_file_chunk answers."""
    lines = text.splitlines()
    shown = lines[start_line - 1 : start_line - 1 + max_lines]
    header = f"File has {len(lines)} total lines. Showing lines {start_line} to {start_line - 1 + len(shown)}.\n"
    return header + "\n".join(f"{number}: {line}" for number, line in enumerate(shown, start_line))


def _echoed(command: str) -> str:
    return command.removeprefix("echo ").partition(" >")[0] + "\n"
