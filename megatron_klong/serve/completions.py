"""`/v1/completions`: prompts of token ids (or text) in, sampled ids out, under Megatron's field names and OpenAI's."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from megatron_klong.serve.interface import Progress
from megatron_klong.serve.prompts import stop_ids
from megatron_klong.serve.protocol import Completion, CompletionRequest, ProtocolError
from megatron_klong.serve.stop_strings import cut
from megatron_klong.serve.turn_stream import TextStream
from megatron_klong.serve.wire import DEFAULT_MAX_TOKENS, Asked, Delivery, read_asked
from megatron_klong.trajectory.sampled import decode
from megatron_klong.trajectory.tokenizer import Tokenizer

_PROMPT = ("prompt",)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCompletions:
    """The requests of one body, and how their replies are written."""

    requests: Sequence[CompletionRequest]
    delivery: Delivery
    model: str
    tokenizer: Tokenizer | None
    id: str
    created: int
    streams: dict[int, TextStream] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        body: Mapping[str, Any],
        *,
        model: str,
        tokenizer: Tokenizer | None,
        check_count: Callable[[int], None] = lambda count: None,
    ) -> "TextCompletions":
        """check_count: raises for too many replies, before anything is made for each. ProtocolError, with the field."""
        asked = read_asked(body, prompt_fields=_PROMPT)
        several = _several(body.get("prompt"))
        check_count(len(several) * asked.delivery.n)
        prompts, is_text = _ids(several, tokenizer)
        if is_text and tokenizer is not None:
            asked = asked.stopping_at(stop_ids(tokenizer))
        one_each = [asked.request(prompt, max_tokens=DEFAULT_MAX_TOKENS) for prompt in prompts]
        return cls(
            requests=[copy for request in one_each for copy in copies(request, asked)],
            delivery=asked.delivery,
            model=model,
            tokenizer=tokenizer,
            id=f"cmpl-{uuid4().hex}",
            created=int(time.time()),
        )

    def reply(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body of a whole reply."""
        choices = [self._choice(place, completion) for place, completion in enumerate(completions)]
        return {**self._head(), "choices": choices, "usage": usage(completions)}

    def chunk(self, place: int, part: Progress | Completion) -> dict[str, Any]:
        """What one piece of a streamed reply is written as; the text of all pieces is that of the whole reply.

        The last piece has all ids once more, with what only the whole reply has; its `logprobs` were in the others.
        """
        stream = self._stream(place)
        if isinstance(part, Completion):
            text = stream.finish(self._body(place, part)) if stream else ""
            choice = {**self._choice(place, part), "text": text, "logprobs": None}
        else:
            text = stream.feed(without_stop(part.ids, self.requests[place])) if stream else ""
            sampled = {"generation_token_ids": list(part.ids), "generation_log_probs": list(part.log_probs)}
            logprobs = self._logprobs(part.ids, part.log_probs, part.top_log_probs)
            choice = {"index": place, "text": text, "finish_reason": None, "logprobs": logprobs, **sampled}
        return {**self._head(), "choices": [choice]}

    def usage_chunk(self, completions: Sequence[Completion]) -> dict[str, Any]:
        return {**self._head(), "choices": [], "usage": usage(completions)}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _choice(self, place: int, completion: Completion) -> dict[str, Any]:
        text = ""
        if self.tokenizer is not None:
            text = cut(decode(self.tokenizer, self._body(place, completion)), self.requests[place].stop)
        logprobs = self._logprobs(
            completion.generation_token_ids, completion.generation_log_probs, completion.top_log_probs
        )
        sampled = completion.to_choice(prompt_tokens=self.delivery.return_prompt_tokens)
        return {"index": place, "text": text, "logprobs": logprobs, **sampled}

    def _stream(self, place: int) -> TextStream | None:
        if self.tokenizer is not None and place not in self.streams:
            self.streams[place] = TextStream(self.tokenizer, stop=self.requests[place].stop)
        return self.streams.get(place)

    def _body(self, place: int, completion: Completion) -> Sequence[int]:
        return without_stop(completion.generation_token_ids, self.requests[place])

    def _logprobs(
        self, ids: Sequence[int], values: Sequence[float], top: Sequence[Sequence[tuple[int, float]]]
    ) -> dict[str, Any] | None:
        if self.delivery.top_logprobs is None:
            return None
        likeliest = [{self._name(token): value for token, value in one} for one in top]
        names = [self._name(token) for token in ids]
        return {"tokens": names, "token_logprobs": list(values), "top_logprobs": likeliest or None}

    def _name(self, token: int) -> str:
        return decode(self.tokenizer, [token]) if self.tokenizer else str(token)


def copies(request: CompletionRequest, asked: Asked) -> list[CompletionRequest]:
    """As many as are asked for; a seed is the first one's, the others count on."""
    if request.seed is None:
        return [request] * asked.delivery.n
    return [request.model_copy(update={"seed": request.seed + number}) for number in range(asked.delivery.n)]


def without_stop(ids: Sequence[int], request: CompletionRequest) -> Sequence[int]:
    """What a reply, or the last piece of one, says: all but the stop token that ends it."""
    return ids[:-1] if ids and ids[-1] in request.stop_token_ids else ids


def usage(completions: Sequence[Completion]) -> dict[str, Any]:
    """Counted in tokens; of several replies to one prompt each has read it."""
    prompt = sum(len(completion.prompt_token_ids) for completion in completions)
    generated = sum(len(completion.generation_token_ids) for completion in completions)
    cached = sum(completion.cached_tokens for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def characters(body: Mapping[str, Any]) -> int:
    """Of its prompts, as far as they are text."""
    return sum(len(prompt) for prompt in _several(body.get("prompt")) if isinstance(prompt, str))


def _several(given: Any) -> Sequence[Any]:
    """One prompt or several, as several."""
    return given if isinstance(given, list) and given and isinstance(given[0], list | str) else [given]


def _ids(several: Sequence[Any], tokenizer: Tokenizer | None) -> tuple[Sequence[list[int]], bool]:
    """Each as ids; and whether they were text."""
    if all(isinstance(prompt, str) for prompt in several):
        if tokenizer is None:
            raise ProtocolError("prompt: this server has no tokenizer; send token ids, or start it with --tokenizer")
        return [tokenizer.encode(prompt) for prompt in several], True
    for prompt in several:
        if not isinstance(prompt, list) or not all(type(identifier) is int for identifier in prompt):
            raise ProtocolError("prompt: a list of token ids, a text, or a list of one of these is needed")
    return several, False
