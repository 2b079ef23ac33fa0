"""`/v1/chat/completions`: messages in, the next turn out, as OpenAI's clients expect both.

With `logprobs` the message also holds the ids it was sampled as, under Megatron's names; sent back in a later request
they stand in the prompt unchanged (prompts.py).
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from megatron_klong.serve.completions import copies, usage, without_stop
from megatron_klong.serve.interface import Progress
from megatron_klong.serve.parsing import ParsedCall, ParsedTurn, Schemas
from megatron_klong.serve.prompts import Prompts, schemas, stop_ids
from megatron_klong.serve.protocol import Completion, CompletionRequest, ProtocolError
from megatron_klong.serve.turn_stream import Part, TurnStream
from megatron_klong.serve.wire import Delivery, read_asked
from megatron_klong.trajectory.sampled import decode
from megatron_klong.trajectory.tokenizer import Tokenizer

_PROMPT = ("messages", "tools", "tool_choice", "parallel_tool_calls")
_FIELDS: Mapping[str, str] = {"reasoning": "reasoning_content", "content": "content"}
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCompletions:
    """The requests of one body, and how their replies are written."""

    requests: Sequence[CompletionRequest]
    delivery: Delivery
    model: str
    tokenizer: Tokenizer
    schemas: Schemas
    one_call: bool
    id: str
    created: int
    streams: dict[int, TurnStream] = field(default_factory=dict)

    @classmethod
    def of(
        cls, body: Mapping[str, Any], *, model: str, prompts: Prompts, tokenizer: Tokenizer, longest: int
    ) -> "ChatCompletions":
        """longest: tokens of prompt and reply; a reply without max_tokens may fill it. Raises ProtocolError."""
        asked = read_asked(body, prompt_fields=_PROMPT)
        if (choice := body.get("tool_choice") or "auto") not in ("auto", "none"):
            raise ProtocolError(f"tool_choice: {json.dumps(choice)[:80]}: a policy cannot be made to call; use auto")
        tools = body.get("tools") if choice == "auto" else None  # what is not offered is not called
        prompt = prompts.ids(body.get("messages"), tools)
        request = asked.stopping_at(stop_ids(tokenizer)).request(prompt, max_tokens=max(1, longest - len(prompt)))
        return cls(
            requests=copies(request, asked),
            delivery=asked.delivery,
            model=model,
            tokenizer=tokenizer,
            schemas=schemas(tools),
            one_call=body.get("parallel_tool_calls") is False,
            id=f"chatcmpl-{uuid4().hex}",
            created=int(time.time()),
        )

    def reply(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body of a whole reply."""
        choices = []
        for place, completion in enumerate(completions):
            _, turn = self._stream(place).finish(self._body(place, completion))
            message: dict[str, Any] = {"role": "assistant", "content": turn.content}
            if turn.reasoning:
                message["reasoning_content"] = turn.reasoning
            if calls := self._calls(turn):
                message["tool_calls"] = calls
            choices.append({**self._end(place, completion, turn), "message": {**message, **self._sampled(completion)}})
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(completions)}

    def chunk(self, place: int, part: Progress | Completion) -> dict[str, Any]:
        """What one piece of a streamed reply is written as."""
        # said once: clients put together what comes under one name
        role = {} if place in self.streams else {"role": "assistant"}
        stream = self._stream(place)
        choice: dict[str, Any]
        if isinstance(part, Completion):
            rest, turn = stream.finish(self._body(place, part))
            delta = {**role, **_delta(rest), **self._sampled(part)}
            if calls := self._calls(turn):
                delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
            choice = {"index": place, "delta": delta, "finish_reason": _reason(part, turn)}
        else:
            delta = {**role, **_delta(list(stream.feed(without_stop(part.ids, self.requests[place]))))}
            logprobs = self._logprobs(part.ids, part.log_probs, part.top_log_probs)
            choice = {"index": place, "delta": delta, "finish_reason": None, **logprobs}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, completions: Sequence[Completion]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(completions)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _stream(self, place: int) -> TurnStream:
        if place not in self.streams:
            stop = self.requests[place].stop
            self.streams[place] = TurnStream(self.tokenizer, schemas=self.schemas, stop=stop)
        return self.streams[place]

    def _body(self, place: int, completion: Completion) -> Sequence[int]:
        return without_stop(completion.generation_token_ids, self.requests[place])

    def _calls(self, turn: ParsedTurn) -> list[dict[str, Any]]:
        calls = turn.calls[:1] if self.one_call else turn.calls
        return [
            {
                "id": f"call_{uuid4().hex}",
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call)},
            }
            for call in calls
        ]

    def _end(self, place: int, completion: Completion, turn: ParsedTurn) -> dict[str, Any]:
        logprobs = self._logprobs(
            completion.generation_token_ids, completion.generation_log_probs, completion.top_log_probs
        )
        return {"index": place, "finish_reason": _reason(completion, turn), "logprobs": None, **logprobs}

    def _sampled(self, completion: Completion) -> dict[str, Any]:
        """What a trainer needs, beside what OpenAI's message has."""
        if self.delivery.top_logprobs is None:
            return {}
        sampled = completion.to_choice(prompt_tokens=self.delivery.return_prompt_tokens)
        return {name: value for name, value in sampled.items() if name != "finish_reason"}

    def _logprobs(
        self, ids: Sequence[int], values: Sequence[float], top: Sequence[Sequence[tuple[int, float]]]
    ) -> dict[str, Any]:
        if self.delivery.top_logprobs is None:
            return {}
        likeliest = top or [[]] * len(ids)
        content = [
            {**self._token(token, value), "top_logprobs": [self._token(other, theirs) for other, theirs in others]}
            for token, value, others in zip(ids, values, likeliest, strict=True)
        ]
        return {"logprobs": {"content": content, "refusal": None}}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        text = decode(self.tokenizer, [token])
        # of a part of a character the text is not known; OpenAI says null then
        return {"token": text, "logprob": value, "bytes": None if _UNFINISHED in text else list(text.encode())}


def _reason(completion: Completion, turn: ParsedTurn) -> str:
    if completion.finish_reason != "stop":
        return "length"  # OpenAI knows no deadline
    return "tool_calls" if turn.calls else "stop"


def _arguments(call: ParsedCall) -> str:
    """Of a call that cannot be read, an object that is not closed: nobody runs it, and Prompts takes it back."""
    written = json.dumps(call.arguments, ensure_ascii=False)
    return written if call.error is None else written.removesuffix("}")


def _delta(parts: Sequence[Part]) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    for name, text in parts:
        delta[_FIELDS[name]] = delta.get(_FIELDS[name], "") + text
    return delta
