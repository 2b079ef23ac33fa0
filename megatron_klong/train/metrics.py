"""The curves of a run: JSON lines in its folder, and wandb where asked for. Only one process writes.

`metrics.jsonl` has a line a step, `{"step": 1, "loss": ...}`, and one of step 0 for what is measured before the first;
every line is whole on disk before the next step. A resumed run first cuts off what lies behind the step it resumes
from, a torn last line too, so each step stands there once, as the weights that live on saw it.

wandb writes below `wandb/` in the run folder; `wandb_id` holds the id of its run, which a resumed run goes on under.
Offline it opens no connection, and each start makes an `offline-run-*` folder of its own for `wandb sync`.
"""

import importlib.util
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from megatron_klong.config import ConfigError
from megatron_klong.files import write_atomically

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"
_WANDB_SECONDS = 60  # for what is left to upload at the end


def check_wandb(mode: str) -> None:
    """Raises ConfigError if wandb is asked for and not installed."""
    if mode != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"wandb = {mode!r}, but wandb is not installed; pip install wandb, or set wandb to off")


class RunLog:
    """Writes on the process that `writes`, elsewhere nothing. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        writes: bool,
        wandb: Literal["off", "offline", "online"] = "off",
        settings: Mapping[str, Any],
    ) -> None:
        """`first_step`: the steps before it are kept."""
        self._writes = writes
        self._file: TextIO | None = None
        self._wandb: Any = None
        if not writes:
            return
        path = folder / FILE
        write_atomically(path, "".join(line for line in _whole_lines(path) if json.loads(line)["step"] < first_step))
        self._file = path.open("a", encoding="utf-8")
        if wandb != "off":
            self._wandb = _start_wandb(folder, wandb, settings)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, step: int, figures: Mapping[str, float | str]) -> None:
        """One line."""
        if self._file:
            self._file.write(json.dumps({"step": step, **figures}) + "\n")
            self._file.flush()
        if self._wandb:
            self._wandb.log(dict(figures), step=step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines, oldest first."""
    return [json.loads(line) for line in _whole_lines(folder / FILE)]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _start_wandb(folder: Path, mode: Literal["offline", "online"], settings: Mapping[str, Any]) -> Any:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    try:
        return wandb.init(
            project="megatron_klong",
            id=_wandb_id(folder),
            name=folder.resolve().name,
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=dict(settings),
            settings=wandb.Settings(
                quiet=True,
                # neither the screen nor the source goes along; the address of a remote may hold a password
                console="off",
                disable_git=True,
                disable_code=True,
                # Without a network the program must end: the start would wait for more than ten minutes, the end for
                # ever. Metrics that could not be sent stay on disk for `wandb sync`.
                x_graphql_retry_max=2,
                finish_timeout=_WANDB_SECONDS,
            ),
        )
    except wandb.errors.Error as error:  # not logged in, or no network
        raise ConfigError(f"wandb = {mode!r}: {error}; run `wandb login`, or set wandb to offline") from error


def _wandb_id(folder: Path) -> str:
    """Drawn once for a run folder: names of folders are not unique among all those who log to one project."""
    path = folder / WANDB_ID
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()
