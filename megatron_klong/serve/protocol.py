"""What goes over the wire: a prompt of token ids, and the sampled ids with a log-probability each.

Field names are those of Megatron-Core's `/v1/completions`, so its own server can be spoken to as well.
Always: a `Completion` has at least one id, and as many finite log-probabilities as ids; anything else is a
ReplyError, never a sample (tests/unit/serve/test_protocol.py).
"""

import hashlib
import math
from array import array
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_json

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
REFIT = "/v1/refit"
HEALTH = "/health"
METRICS = "/metrics"

_LONGEST_STOP = 1000  # characters; the end of a reply that is searched at every token grows with it

type FinishReason = Literal["stop", "length", "deadline"]
type InFlight = Literal["continue", "finish"]


class ProtocolError(ValueError):
    """A message that breaks the protocol; the text says how."""


class ReplyError(ProtocolError):
    """A reply that breaks the protocol: no ids, a missing log-probability, or nothing at all."""


class EngineStopped(RuntimeError):
    """The engine has ended, and with it what it was asked."""


class DeadlinePassed(RuntimeError):
    """The time a request had was over before anything was sampled."""


class RefitRefused(RuntimeError):
    """New weights were not taken; the old ones are served on. The message says why."""


class WireMessage(BaseModel):
    """Something that goes over the wire."""

    # fields of others (usage, text, logprobs) are no error: the wire format is shared with other programs
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class PromptIds:
    """A prompt as it goes over the wire, and its hash; a longer one is made from it at the cost of what is new.

    A prompt of 100,000 ids made anew at every turn would cost more than all else about the turn.
    """

    __slots__ = ("_hash", "_length", "_text")

    def __init__(self, ids: Sequence[int] = ()) -> None:
        """Raises ProtocolError for what is no token id."""
        self._length = 0
        self._text = b""
        self._hash = hashlib.sha256()
        self._append(ids)

    def followed_by(self, ids: Sequence[int]) -> "PromptIds":
        """These ids and those, as another object. Raises ProtocolError."""
        longer = PromptIds()
        longer._length, longer._text, longer._hash = self._length, self._text, self._hash.copy()
        longer._append(ids)
        return longer

    def __len__(self) -> int:
        return self._length

    def _append(self, ids: Sequence[int]) -> None:
        if not ids:
            return
        self._hash.update(_as_int32(ids))
        self._text += (b"," if self._text else b"") + to_json(list(ids))[1:-1]
        self._length += len(ids)

    @property
    def sha256(self) -> str:
        """Of the ids as little-endian int32 (as in trajectory/live.py)."""
        return self._hash.hexdigest()

    @property
    def json(self) -> bytes:
        return b"[" + self._text + b"]"


class Sampling(WireMessage):
    """How to go on from a prompt. Temperature 0 takes the likeliest token; top_k 0 and top_p 1 take all.

    With both, top_p is of what top_k leaves.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    max_tokens: int = Field(gt=0)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    stop_token_ids: tuple[int, ...] = ()
    """The first of them that is sampled ends the reply, as its last id."""
    stop: tuple[str, ...] = Field(default=(), max_length=16)
    """The reply ends with the id that completes one of these strings; the server needs a tokenizer."""
    seed: int | None = None
    """With it the same prompt gives the same ids from the same weights, whatever else the server does."""
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Also the likeliest so many ids at each place."""
    deadline_seconds: float | None = Field(default=None, gt=0)
    """After so long the reply ends with what it has."""
    policy_epoch_at_least: int | None = None
    """Refused by a server whose policy is older."""
    routes: bool = False
    """Also which experts each token went to."""
    prompt_cache_key: str | None = None
    """Which episode the request belongs to: those of one key go where its cache is."""

    @model_validator(mode="after")
    def _stop_strings(self) -> Self:
        if not all(1 <= len(string) <= _LONGEST_STOP for string in self.stop):
            raise ValueError(f"stop: strings have 1 to {_LONGEST_STOP} characters")
        return self

    def fields(self) -> dict[str, Any]:
        """The body of a POST, without the prompt."""
        fields = self.model_dump(mode="json", exclude={"prompt_token_ids"}, exclude_defaults=True)
        return {"logprobs": 0, **fields}


class CompletionRequest(Sampling):
    """A prompt and how to go on from it."""

    prompt_token_ids: tuple[int, ...] = Field(min_length=1)

    def to_wire(self) -> dict[str, Any]:
        """The body of a POST."""
        return {"prompt": list(self.prompt_token_ids), **self.fields()}

    def check_length(self, limit: int) -> None:
        """Raise ProtocolError where prompt and reply together may be longer than so many tokens."""
        prompt = len(self.prompt_token_ids)
        if prompt + self.max_tokens > limit:
            raise ProtocolError(
                f"too long: {prompt} tokens of prompt and max_tokens {self.max_tokens} are "
                f"{prompt + self.max_tokens}, above the maximum context length of {limit}"
            )


class Reply(WireMessage):
    """What was sampled. The stop token, if one was sampled, is the last id."""

    generation_token_ids: tuple[int, ...] = Field(min_length=1)
    generation_log_probs: tuple[float, ...]
    """Of each id under the distribution it was drawn from, that is after temperature, top_k and top_p; of a greedy
    reply those of the model at temperature 1."""
    top_log_probs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """For each id, if asked for, the likeliest ids with theirs."""
    finish_reason: FinishReason
    policy_epoch: tuple[tuple[int, int], ...] = ()
    """(index of a token, policy that sampled from there on), counted over prompt and reply."""
    kv_cache_epoch: tuple[tuple[int, int], ...] = ()
    """(index of a token, policy that read from there on)."""
    num_evictions: int = 0
    """How often it lost its place in the cache and was read anew."""
    cached_tokens: int = 0
    """Of the prompt, that needed no reading."""
    moe_topk_indices: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """[tokens - 1][expert layer][experts a token] of prompt and reply, if asked for and recorded throughout."""

    @model_validator(mode="after")
    def _a_log_probability_each(self) -> Self:
        ids, log_probs = len(self.generation_token_ids), len(self.generation_log_probs)
        if ids != log_probs:
            raise ValueError(f"{ids} sampled ids but {log_probs} log-probabilities")
        if not all(math.isfinite(value) and value <= 1e-3 for value in self.generation_log_probs):
            raise ValueError("a log-probability is above 0 or not finite")
        return self

    @classmethod
    def from_wire(cls, body: Any, prompt: PromptIds | None = None) -> Self:
        """Read a reply, not of chat; with `prompt`, the reply to that.

        Raises ReplyError unless it has one choice, with ids and log-probabilities, and says that it is to the prompt.
        """
        choices = body.get("choices") if isinstance(body, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ReplyError("the reply does not hold exactly one choice")
        present = {name: value for name, value in choices[0].items() if value is not None}
        try:
            if prompt is not None and _prompt_read(present) != prompt.sha256:
                raise ReplyError("the reply is to another prompt than was sent")
            return validated(cls, present)
        except ProtocolError as error:
            raise ReplyError(str(error)) from None


class Completion(Reply):
    """A reply with its prompt."""

    prompt_token_ids: tuple[int, ...]

    def to_choice(self, *, prompt_tokens: bool = True) -> dict[str, Any]:
        """As a choice of a reply holds it: with the ids of the prompt, or with their SHA-256."""
        left_out = {"top_log_probs"}
        if self.moe_topk_indices is None:
            left_out.add("moe_topk_indices")
        if prompt_tokens:
            return self.model_dump(mode="json", exclude=left_out)
        choice = self.model_dump(mode="json", exclude=left_out | {"prompt_token_ids"})
        return {"prompt_sha256": sha256_of_ids(self.prompt_token_ids), **choice}


class RefitRequest(WireMessage):
    """Other weights of the same architecture, in place of those that are served."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weights: str
    """A folder that every process of the server can read, in Hugging Face format or a checkpoint of ours."""
    policy_epoch: int | None = None
    """What the policy is called from then on; above what it was. None: one more."""
    in_flight: InFlight = "continue"
    """Whether requests in flight go on under the new weights, their context read anew, or are waited for."""


class RefitReply(WireMessage):
    """seconds: how long no token was sampled."""

    policy_epoch: int
    seconds: float


def validated[Model: WireMessage](model: type[Model], fields: dict[str, Any]) -> Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)]
        raise ProtocolError("; ".join(fault.removeprefix(": ") for fault in faults)) from None


def sha256_of_ids(ids: Sequence[int]) -> str:
    """As `PromptIds` has it. Raises ProtocolError for what is no token id."""
    return hashlib.sha256(_as_int32(ids)).hexdigest()


def _as_int32(ids: Sequence[int]) -> bytes:
    try:
        return array("i", ids).tobytes()
    except (TypeError, OverflowError) as error:
        raise ProtocolError(f"no token ids: {error}") from None


def _prompt_read(choice: dict[str, Any]) -> str | None:
    """The hash of the prompt that a reply is to, as it says: stated, or of the ids that servers without it send."""
    if (stated := choice.get("prompt_sha256")) is not None:
        return str(stated)
    ids = choice.get("prompt_token_ids")
    return sha256_of_ids(ids) if isinstance(ids, list) else None
