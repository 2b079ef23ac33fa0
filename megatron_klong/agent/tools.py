"""The tools an agent has, with PaperBench's names and arguments, run in the episode's sandbox.

Always: a fault of a command is text for the agent; a fault of the sandbox is an exception for the episode. Work tools
say (or, by config, insist) that the paper be read first; `submit` is refused, with every reason, before its time and
while something it needs is missing.
"""

import math
from collections.abc import Awaitable, Callable
from typing import Any, Self

from inspect_ai.tool import ToolDef, ToolParams
from inspect_ai.util import ExecResult, OutputLimitExceededError, sandbox

from megatron_klong.agent.config import EpisodeConfig, SubmitNeed, ToolName
from megatron_klong.agent.deadline import Deadline, readable_seconds
from megatron_klong.agent.jobs import Jobs
from megatron_klong.agent.reading import ReadingTracker

SUBMISSION = "/home/submission"
PAPER = "/home/paper/paper.md"
_MAX_CHUNK_LINES = 50
_MATCHES_PER_PAGE = 5


class Toolbox:
    """The tools of one episode. `end_message` is set once a submission has been accepted."""

    def __init__(self, config: EpisodeConfig, reading: ReadingTracker, deadline: Deadline) -> None:
        self.end_message: str | None = None
        self._turn, self._results = 0, 0
        self.jobs = Jobs()
        self._config = config
        self._reading = reading
        self._deadline = deadline

    def begin_turn(self, number: int) -> None:
        """Results that are cut are named by the turn and their place in it."""
        self._turn, self._results = number, 0

    def tools(self) -> list[ToolDef]:
        """Those the configuration names, in its order."""
        functions: dict[ToolName, Callable[..., Awaitable[str]]] = {
            "bash": self.bash,
            "python": self.python,
            "read_file_chunk": self.read_file_chunk,
            "search_file": self.search_file,
            "background": self.background,
            "jobs": self.list_jobs,
            "submit": self.submit,
        }
        found = [ToolDef(functions[name], name=name, parallel=False) for name in self._config.tools]
        for definition in found:
            definition.parameters = _Unchanging(**definition.parameters.model_dump())
        return found

    async def bash(self, cmd: str) -> str:
        """Run a shell command.

        Args:
            cmd: the command
        """
        return await self._work(["bash", "-c", cmd])

    async def python(self, code: str) -> str:
        """Run a Python script.

        Args:
            code: the script
        """
        return await self._work(["python3", "-"], input=code)

    async def read_file_chunk(self, file: str, start_line: int = 1, max_lines: int = _MAX_CHUNK_LINES) -> str:
        """Read lines of a file.

        Args:
            file: its path
            start_line: first line, from 1
            max_lines: at most 50
        """
        lines = await _read_lines(file)
        if isinstance(lines, str):
            return lines
        first = max(1, start_line)
        shown = lines[first - 1 : first - 1 + min(max(1, max_lines), _MAX_CHUNK_LINES)]
        if not shown:
            return f"File has {len(lines)} total lines. There is no line {first}."
        numbered = "\n".join(f"{number}: {line}" for number, line in enumerate(shown, first))
        head = f"File has {len(lines)} total lines. Showing lines {first} to {first + len(shown) - 1}."
        return await self._shortened(f"{head}\n{numbered}")

    async def search_file(self, file: str, query: str, context_lines: int = 2, page: int = 1) -> str:
        """Search a file for text.

        Args:
            file: its path
            query: text to find, in any case
            context_lines: lines shown around a match
            page: page of matches, from 1
        """
        lines = await _read_lines(file)
        if isinstance(lines, str):
            return lines
        found = [n for n, line in enumerate(lines) if query.lower() in line.lower()]
        pages = max(1, math.ceil(len(found) / _MATCHES_PER_PAGE))
        chosen = found[(page - 1) * _MATCHES_PER_PAGE : page * _MATCHES_PER_PAGE]
        blocks = [
            "\n".join(
                f"{n + 1}: {lines[n]}"
                for n in range(max(0, match - context_lines), min(len(lines), match + context_lines + 1))
            )
            for match in chosen
        ]
        return await self._shortened("\n--\n".join([f"{len(found)} matches. Page {page} of {pages}.", *blocks]))

    async def background(self, cmd: str) -> str:
        """Start a shell command that runs on while you go on; bash and python end all they leave running.

        Args:
            cmd: the command
        """
        return self._unread() or await self.jobs.start(cmd, SUBMISSION)

    async def list_jobs(self, stop: int = 0) -> str:
        """List the commands started with background.

        Args:
            stop: number of one to stop
        """
        return await self.jobs.stop(stop) if stop else self.jobs.listing()

    async def submit(self, end_message: str) -> str:
        """End the work and hand in the submission.

        Args:
            end_message: what was done
        """
        if missing := [reason for need in self._config.submit_needs if (reason := await self._missing(need))]:
            return f"Not accepted: {'; '.join(missing)}."
        opens_in = self._config.submit_after * self._deadline.seconds - self._deadline.elapsed
        if opens_in > 0:
            share = self._deadline.elapsed / self._deadline.seconds
            return (
                f"Not accepted yet: only {share:.0%} of the time is used, and there is work that can be improved. "
                f"A submission is taken from {self._config.submit_after:.0%} on, in {readable_seconds(opens_in)}."
            )
        self.end_message = end_message
        return "Submitted."

    async def _missing(self, need: SubmitNeed) -> str | None:
        """Why a submission lacks it, or None."""
        match need:
            case "reading":
                if self._config.reading == "off" or self._reading.complete:
                    return None
                return f"the paper is not read yet ({self._reading.progress})"
            case "reproduce.sh":
                found = await sandbox().exec(["test", "-s", f"{SUBMISSION}/reproduce.sh"], timeout_retry=False)
                return None if found.success else f"{SUBMISSION}/reproduce.sh is missing"
            case "commit":
                found = await sandbox().exec(["git", "-C", SUBMISSION, "rev-parse", "HEAD"], timeout_retry=False)
                return None if found.success else f"nothing is committed to git in {SUBMISSION}"

    def _unread(self) -> str | None:
        """The refusal of a work tool while the paper is unread, by config."""
        if self._config.reading == "refuse" and not self._reading.complete:
            return f"Refused: read {PAPER} first ({self._reading.progress})."
        return None

    async def _shortened(self, text: str) -> str:
        """Here, before Inspect has it: its log would hold all of a flood, turn by turn."""
        self._results += 1
        return await shortened(text, self._config.output_characters, f"/tmp/output/{self._turn}-{self._results}.txt")

    async def _work(self, command: list[str], input: str | None = None) -> str:
        if refusal := self._unread():
            return refusal
        return await self._shortened(await self._output(command, input))

    async def _output(self, command: list[str], input: str | None) -> str:
        timeout = math.ceil(self._config.command_timeout.in_seconds)
        try:
            result = await sandbox().exec(
                command, input=input, cwd=SUBMISSION, timeout=timeout, timeout_retry=False, concurrency=False
            )
        except TimeoutError as error:
            printed = getattr(error, "truncated_output", None) or ""
            return f"{printed}\nKilled: the command ran longer than {self._config.command_timeout}.".lstrip("\n")
        except OutputLimitExceededError as error:
            return f"{error.truncated_output or ''}\nKilled: the output exceeded {error.limit_str}; write it to a file."
        return _readable(result)


class _Unchanging(ToolParams):
    """Parameters that are their own copy: Inspect copies those of all tools at every turn, and nothing changes them."""

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self


def tools_of(config: EpisodeConfig) -> list[ToolDef]:
    """The tools as an engine is told of them, where no episode is played; they are not to be called."""
    return Toolbox(config, ReadingTracker(""), Deadline(0.0, total=float, working=float)).tools()


def _readable(result: ExecResult[str]) -> str:
    output = "\n".join(part.rstrip("\n") for part in (result.stdout, result.stderr) if part.strip("\n"))
    if result.returncode:
        output = f"{output}\n[exit code {result.returncode}]" if output else f"[exit code {result.returncode}]"
    return output or "(no output)"


async def _read_lines(file: str) -> list[str] | str:
    """The lines of a file in the sandbox, or why there are none, for the agent."""
    path = file if file.startswith("/") else f"{SUBMISSION}/{file}"
    try:
        return (await sandbox().read_file(path)).splitlines()
    except FileNotFoundError:
        return f"Error: no such file: {path}"
    except OSError as error:  # a directory, no permission, a name too long, a pipe, ...
        return f"Error: {path}: {error.strerror or type(error).__name__}"
    except (ValueError, OutputLimitExceededError) as error:  # no text, or no path
        return f"Error: {path}: {type(error).__name__}"


async def shortened(text: str, limit: int, path: str) -> str:
    """A result for the agent: one longer than `limit` characters is cut in the middle, and is whole in file `path`."""
    if len(text) <= limit:
        return text
    try:
        await sandbox().write_file(path, text)
    except (OSError, TimeoutError, OutputLimitExceededError):  # the sandbox's disk is full, say: the agent's affair
        return cut_middle(text, limit)
    return cut_middle(text, limit, f"; all of it is in {path}")


def cut_middle(text: str, limit: int, note: str = "") -> str:
    """Shorten a long result to about `limit` characters, keeping its head and its tail."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out{note}]\n{text[len(text) - half :]}"
