"""What a proxy is told of each sandbox, and what it writes down: small files in folders of the runner's own.

    policies/<source address>.json        what the sandbox that connects from there may fetch
    requests/<source address>.jsonl       one line a request, bounded
    requests/<source address>.counts      all requests by verdict, also those that found the log full

Always: a policy is there whole or not at all; a sandbox without one may fetch nothing. One process writes a log.
"""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_klong.sandbox.egress.rules import Blacklist

type Outcome = Literal["allowed", "refused", "failed"]

_LONGEST_TEXT = 500
_COUNTS_BYTES = 192
_KEPT_POLICIES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EgressRequest:
    """One request. path: with its query, None where TLS was not opened.  rule: the entry of the blacklist, if it was
    that.  failed: allowed, but the host could not be reached."""

    time_seconds: float
    method: str
    host: str
    port: int
    path: str | None
    verdict: Outcome
    rule: str | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Requests of one sandbox by verdict. forbidden: refused because of the task's blacklist.  unlogged: how many came
    when the log was full."""

    allowed: int = 0
    refused: int = 0
    failed: int = 0
    forbidden: int = 0
    unlogged: int = 0


class RequestLog:
    """The log of one sandbox, open for writing. `users` counts who may still add to it; the last one closes it."""

    def __init__(self, file: Path, *, limit_bytes: int) -> None:
        self.users = 0
        self._limit_bytes = limit_bytes
        self._lines = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._bytes = os.fstat(self._lines).st_size
        counts_file = file.with_suffix(".counts")
        self._numbers = dataclasses.asdict(read_counts(file))
        self._counts = os.open(counts_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def add(self, request: EgressRequest) -> None:
        """Write a request down; does nothing once the log is closed. OSError where not even the counts can be."""
        if self._lines < 0:
            return
        fields = {
            key: value[:_LONGEST_TEXT] if isinstance(value, str) else value
            for key, value in dataclasses.asdict(request).items()
        }
        line = json.dumps(fields).encode() + b"\n"
        self._numbers[request.verdict] += 1
        self._numbers["forbidden"] += request.rule is not None
        if self._bytes + len(line) > self._limit_bytes or not self._appended(line):
            self._numbers["unlogged"] += 1
        # in place and always as long: a reader finds the old numbers or the new
        os.pwrite(self._counts, json.dumps(self._numbers).encode().ljust(_COUNTS_BYTES), 0)

    def close(self) -> None:
        """Let go of the files. May be called again."""
        descriptors, self._lines, self._counts = {self._lines, self._counts} - {-1}, -1, -1
        for descriptor in descriptors:  # their numbers are soon those of other files
            os.close(descriptor)

    def _appended(self, line: bytes) -> bool:
        """Whether all of a line was written, as it is not on a full disk; no half line stays."""
        with contextlib.suppress(OSError):
            if os.write(self._lines, line) == len(line):
                self._bytes += len(line)
                return True
        os.ftruncate(self._lines, self._bytes)
        return False


def read_requests(file: Path) -> list[EgressRequest]:
    """The requests in a log, also while it is written; none where there is none."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    return [EgressRequest(**json.loads(line)) for line in whole.splitlines()]


def read_counts(file: Path) -> Counts:
    """The numbers beside a log."""
    try:
        content = file.with_suffix(".counts").read_bytes()
    except FileNotFoundError:
        return Counts()
    return Counts(**json.loads(content)) if content.strip() else Counts()


class Policies:
    """The folder of policies: the runner writes, the proxy looks up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, tuple[int, Blacklist]] = {}

    def write(self, source: str, blacklist: Blacklist) -> None:
        """Let the sandbox that connects from `source` fetch what its blacklist does not forbid."""
        temporary = self._folder / f".{source}.tmp"
        temporary.write_text(json.dumps({"blacklist": blacklist.entries}), "utf-8")
        temporary.replace(self._folder / f"{source}.json")

    def remove(self, source: str) -> None:
        """Let it fetch nothing more."""
        (self._folder / f"{source}.json").unlink(missing_ok=True)

    def find(self, source: str, *, fetchers: tuple[str, ...]) -> Blacklist | None:
        """The blacklist of who connects from `source`; None: nobody known. OSError, ValueError."""
        file = self._folder / f"{source}.json"
        try:
            written = file.stat().st_mtime_ns
            kept = self._read.get(source)
            if kept is not None and kept[0] == written:
                return kept[1]
            content = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            return None
        blacklist = Blacklist(content["blacklist"], fetchers=fetchers)
        self._read.pop(source, None)
        self._read[source] = written, blacklist
        if len(self._read) > _KEPT_POLICIES:
            del self._read[next(iter(self._read))]  # the oldest
        return blacklist
