"""A report in tests: made-up records, the page written from them, and the page read back."""

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from megatron_klong.data.preprocess import preprocess
from megatron_klong.data.shard import Shard
from megatron_klong.evaluate.report import write_report
from megatron_klong.trajectory.episode import (
    EpisodeRecord,
    MessageRecord,
    PolicyRecord,
    TurnRecord,
    write_episode,
)
from megatron_klong.trajectory.replay import ReplayResult
from megatron_klong.trajectory.schema import Message
from tests.unit.trajectory.builders import assistant, bash, byte_tokenizer, policy, tool, user

POLICY = policy(400, reserve=60, keep=100)
VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """The rows of all tables as lists of cell texts, the images, and whether every tag is closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def rows_of(self, *start: str) -> list[list[str]]:
        return [row for row in self.rows if row[: len(start)] == list(start)]


def record(task: str, model: str = "m", *, score: float | None, turns: int = 3, **changes: Any) -> EpisodeRecord:
    messages: list[Message] = [user("task")]
    for number in range(turns):
        messages += [assistant(calls=[bash(f"step {number}")]), tool("done " * 10)]
    values: dict[str, Any] = {
        "task": task,
        "model": model,
        "epoch": 1,
        "ending": "finished",
        "error": None,
        "score": score,
        "seconds": 10.0 * turns,
        "windows": 1 + (turns - 1) // 4,
        "messages": [MessageRecord.of(message) for message in messages],
        "tools": [],
        "turns": [
            TurnRecord(
                window=number // 4,
                prompt_tokens=100 + 60 * (number % 4),
                prompt_sha256="0" * 64,
                model_seconds=2.0,
                given_back_seconds=0.5,
            )
            for number in range(turns)
        ],
        "context": PolicyRecord.of(POLICY),
        "tokenizer_sha256": "bytes",
        "log": "log.eval",
        "sample": "s",
    }
    return EpisodeRecord.model_validate({**values, **changes})


def agreeing(records: Sequence[EpisodeRecord]) -> dict[str, ReplayResult]:
    return {one.id: ReplayResult(turns=len(one.turns), windows=one.windows, mismatches=()) for one in records}


def write(folder: Path, records: Sequence[EpisodeRecord], **changes: Any) -> Path:
    """A report of the records; the shard is preprocessed from them."""
    for one in records:
        write_episode(one, folder / "records")
    prefix = folder / "sft"
    preprocess([folder / "records"], prefix, byte_tokenizer(), POLICY, overwrite=True)
    counts = json.loads((folder / "sft.report.json").read_bytes())
    given = {
        "title": "A run",
        "records": records,
        "shard": Shard(prefix),
        "preprocessing": counts | changes.pop("preprocessing", {}),
        "replays": agreeing(records),
        "splits": {one.task: one.task.split("-")[0] for one in records},
        "facts": {"seconds, episodes": "12.5"},
    }
    return write_report(folder / "report", **{**given, **changes})


def read(path: Path) -> Page:
    return Page(path.read_text("utf-8"))
