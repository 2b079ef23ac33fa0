"""What was sampled, turn by turn: ids and log-probabilities, found by the id of the assistant's message.

The one place they are kept: messages pass through code that may rewrite them, and text cannot be turned back into
ids. With a file each turn is also appended to it as a line of JSON before the reply is handed on, so that what an
episode sampled outlives it; a line cut short by a kill is left out when the file is read.
"""

import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Self

from pydantic import BaseModel, ConfigDict

from megatron_klong.files import write_atomically
from megatron_klong.serve.protocol import PromptIds, Reply
from megatron_klong.trajectory.schema import Sampled


class SampledTurn(BaseModel):
    """One reply as it was sampled; of its prompt, the length and the SHA-256 of its ids (as in trajectory/live.py)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    prompt_tokens: int
    prompt_sha256: str
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    stopped: bool
    """Whether the last id is a stop token; else the reply was cut by its length."""
    policy_epoch: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, key: str, prompt: PromptIds, reply: Reply) -> Self:
        return cls(
            key=key,
            prompt_tokens=len(prompt),
            prompt_sha256=prompt.sha256,
            ids=reply.generation_token_ids,
            log_probs=reply.generation_log_probs,
            stopped=reply.finish_reason == "stop",
            policy_epoch=reply.policy_epoch,
        )

    @property
    def body(self) -> tuple[int, ...]:
        """The ids without the stop token, which belongs to the message that follows."""
        return self.ids[:-1] if self.stopped else self.ids

    @property
    def reply(self) -> Sampled:
        """As the transcript holds it."""
        return Sampled(body=self.body, end=self.ids[-1] if self.stopped else None)


class UnknownTurn(LookupError):
    """A reply in a prompt that was not sampled here; its ids are not known and its text is not encoded."""


class TurnStore:
    """Turns by key; with `path`, in a file as well."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._file: BinaryIO | None = None  # open from the first turn that is added
        self._turns: dict[str, SampledTurn] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._turns = {turn.key: turn for turn in read_turns(path)} if path.exists() else {}

    def add(self, turn: SampledTurn) -> None:
        self._turns[turn.key] = turn
        if self._path is None:
            return
        if self._file is None:
            self._file = self._path.open("ab")
            weakref.finalize(self, self._file.close)
        # first a line break: a line that a kill cut short must not swallow this one
        self._file.write(b"\n" + turn.model_dump_json().encode())
        self._file.flush()

    def __getitem__(self, key: str) -> SampledTurn:
        try:
            return self._turns[key]
        except KeyError:
            raise UnknownTurn(f"message {key} was not sampled by this provider") from None

    def take(self, keys: Iterable[str]) -> list[SampledTurn]:
        """Turns of an episode that is over; they are forgotten here (in the file they stay). Raises UnknownTurn."""
        turns = [self[key] for key in keys]
        for turn in turns:
            del self._turns[turn.key]
        return turns

    def __len__(self) -> int:
        return len(self._turns)


def write_turns(turns: Iterable[SampledTurn], path: Path) -> None:
    """A whole file at once, as `TurnStore` reads it."""
    write_atomically(path, "".join(f"{turn.model_dump_json()}\n" for turn in turns))


def read_turns(path: Path) -> list[SampledTurn]:
    """All whole turns of a file, in the order in which they were sampled."""
    turns = []
    for line in path.read_bytes().split(b"\n"):
        try:
            fields = json.loads(line)
        except ValueError:  # empty, or cut short
            continue
        turns.append(SampledTurn.model_validate(fields))
    return turns
