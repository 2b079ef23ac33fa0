"""OpenAI's request bodies, and Megatron's on the same routes, read into ours; imports no torch.

Fields that ask for what is done anyway (`best_of` 1, penalties of 0) are taken; those that ask for something that is
not implemented, and names nobody knows, are a ProtocolError that names them: a setting that is silently dropped would
be a wrong experiment.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, Field

from megatron_klong.serve.protocol import CompletionRequest, ProtocolError, WireMessage, validated

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI documents it

_SAMPLING = (
    *("temperature", "top_p", "top_k", "seed", "stop_token_ids", "deadline_seconds", "policy_epoch_at_least"),
    *("routes", "prompt_cache_key"),
)
_DELIVERY = ("n", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "return_prompt_tokens")
# say nothing about the reply
_NOTES = frozenset(
    {
        *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_retention"),
    }
)
# fields of the interface that are not implemented, with the values that change nothing
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "add_BOS": (False,),
    "prevent_retokenization": (True,),
    "skip_special_tokens": (True,),
}


_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class _Strict(WireMessage):
    model_config = ConfigDict(extra="forbid", strict=True)


class Delivery(_Strict):
    """How a reply is handed over.

    n: replies to each prompt.  top_logprobs: None if no log-probabilities are asked.  return_prompt_tokens: the ids of
    the prompt, or their SHA-256.
    """

    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    return_prompt_tokens: bool = True


class Asked(_Strict):
    """A body without its prompt. sampling: fields of a CompletionRequest, `max_tokens` None if not given."""

    sampling: Mapping[str, Any]
    max_tokens: int | None = Field(default=None, gt=0)
    stop: tuple[str, ...] = ()
    delivery: Delivery

    def stopping_at(self, ids: Sequence[int]) -> "Asked":
        """With these stop tokens, unless the body has its own."""
        return self.model_copy(update={"sampling": {"stop_token_ids": tuple(ids), **self.sampling}})

    def request(self, prompt: Sequence[int], *, max_tokens: int) -> CompletionRequest:
        """Of one prompt. Raises ProtocolError, naming the field."""
        fields = {
            **self.sampling,
            "prompt_token_ids": tuple(prompt),
            "max_tokens": max_tokens if self.max_tokens is None else self.max_tokens,
            "stop": self.stop,
            "top_logprobs": self.delivery.top_logprobs or 0,
        }
        return validated(CompletionRequest, fields)


def read_json(content: bytes) -> Mapping[str, Any]:
    """A body. Raises ProtocolError."""
    try:
        body = json.loads(content.decode("utf-8-sig"))
        if _HALF_CHARACTER.search(content):  # of a pair, unless it stands alone: then it is no text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ProtocolError("the body is no JSON object")
    return body


def read_asked(body: Mapping[str, Any], *, prompt_fields: Sequence[str]) -> Asked:
    """All but the fields that hold the prompt. Raises ProtocolError, naming the field."""
    given = {name: value for name, value in body.items() if value is not None and name not in prompt_fields}
    _refuse_others(given)
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    if isinstance(ids := sampling.get("stop_token_ids"), list):
        sampling["stop_token_ids"] = tuple(ids)
    longest = _same("max_completion_tokens", "max_tokens", given)
    return validated(
        Asked, {"sampling": sampling, "max_tokens": longest, "stop": _strings(given), "delivery": _delivery(given)}
    )


def _same(one: str, other: str, given: Mapping[str, Any]) -> Any:
    """What two names of one thing say. Raises ProtocolError if they differ."""
    if one in given and other in given and given[one] != given[other]:
        raise ProtocolError(f"{one} is {given[one]!r} and {other} {given[other]!r}; leave one out")
    return given.get(one, given.get(other))


def _refuse_others(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in (*_SAMPLING, *_DELIVERY, "stop", "max_tokens", "max_completion_tokens") or name in _NOTES:
            continue
        if name not in _NEUTRAL:
            raise ProtocolError(f"{name[:80]}: no such field here; leave it out")
        if value not in _NEUTRAL[name]:
            raise ProtocolError(f"{name}: {json.dumps(value)[:80]} is not implemented; leave it out")
    if given.get("echo"):
        raise ProtocolError("echo: prompt_token_ids of every reply are the prompt; leave it out")


def _strings(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", ())
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) for string in strings):
        raise ProtocolError("stop: a string or a list of strings is needed; ids go into stop_token_ids")
    return tuple(strings)


def _delivery(given: Mapping[str, Any]) -> Delivery:
    """`logprobs` is a number on one route and a yes or no on the other, with the number in `top_logprobs`."""
    asked, top = given.get("logprobs"), given.get("top_logprobs")
    if isinstance(asked, bool):
        if top and not asked:
            raise ProtocolError("top_logprobs: only with logprobs true")
        top = (top or 0) if asked else None
    elif asked and top:
        top = _same("logprobs", "top_logprobs", given)
    elif asked is not None:  # 0 asks for log-probabilities alone
        top = top or asked
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise ProtocolError("stream_options: an object is needed")
    if others := [name for name in options if name != "include_usage"]:
        raise ProtocolError(f"stream_options.{others[0]}: no such field here; leave it out")
    fields = {name: given[name] for name in ("n", "stream", "return_prompt_tokens") if name in given}
    usage = {"include_usage": options["include_usage"]} if "include_usage" in options else {}
    return validated(Delivery, {**fields, **usage, "top_logprobs": top})
