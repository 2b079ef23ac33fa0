"""Request bodies: every field is read, taken for what it asks anyway, or refused by name."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.serve.protocol import CompletionRequest, ProtocolError
from megatron_klong.serve.wire import Delivery, read_asked, read_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(**body: Any) -> CompletionRequest:
    return read_asked(body, prompt_fields=["prompt"]).request([1], max_tokens=7)


def delivery(**body: Any) -> Delivery:
    return read_asked(body, prompt_fields=["prompt"]).delivery


@pytest.mark.parametrize(
    ("field", "value", "read_as"),
    [
        ("temperature", 0, 0.0),
        ("temperature", 1.5, 1.5),
        ("top_p", 0.5, 0.5),
        ("top_p", 1, 1.0),
        ("top_k", 40, 40),
        ("seed", 3, 3),
        ("seed", -(2**70), -(2**70)),
        ("stop_token_ids", [5, 6], (5, 6)),
        ("stop_token_ids", [], ()),
        ("deadline_seconds", 2, 2.0),
        ("policy_epoch_at_least", 4, 4),
        ("routes", True, True),
        ("prompt_cache_key", "episode", "episode"),
        ("stop", "end", ("end",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", [], ()),
        ("max_tokens", 9, 9),
    ],
)
def test_what_a_request_asks_is_read(field: str, value: Any, read_as: Any) -> None:
    request = read(**{field: value})
    assert getattr(request, field) == read_as
    assert type(getattr(request, field)) is type(read_as)
    others = {name: was for name, was in read().model_dump().items() if name != field}
    assert request.model_dump(include=set(others)) == others


@pytest.mark.parametrize("field", [*CompletionRequest.model_fields, "n", "stream", "logprobs", "logit_bias", "made_up"])
def test_null_is_as_good_as_nothing(field: str) -> None:
    assert read(**{field: None}) == read()
    assert delivery(**{field: None}) == Delivery()


def test_a_reply_without_a_length_gets_the_routes() -> None:
    assert read().max_tokens == 7
    assert read(max_completion_tokens=3).max_tokens == 3
    assert read(max_completion_tokens=3, max_tokens=3).max_tokens == 3
    with pytest.raises(ProtocolError, match="max_completion_tokens is 3 and max_tokens 4"):
        read(max_completion_tokens=3, max_tokens=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "gpt-9"),
        ("user", "u"),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("service_tier", "auto"),
        ("safety_identifier", "s"),
        ("prompt_cache_retention", "24h"),
        ("return_prompt_tokens", True),
        ("frequency_penalty", 0),
        ("presence_penalty", 0.0),
        ("repetition_penalty", 1.0),
        ("logit_bias", {}),
        ("best_of", 1),
        ("suffix", ""),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("min_p", 0.0),
        ("min_tokens", 0),
        ("ignore_eos", False),
        ("add_BOS", False),
        ("prevent_retokenization", True),
        ("skip_special_tokens", True),
        ("echo", False),
        ("stream_options", {}),
        ("prompt", "not looked at here"),
    ],
)
def test_what_asks_for_nothing_else_is_taken(field: str, value: Any) -> None:
    assert read(**{field: value}) == read()
    assert delivery(**{field: value}) == Delivery()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"frequency_penalty": 0.1}, "frequency_penalty: 0.1 is not implemented"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"min_p": 0.1}, "min_p"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"add_BOS": True}, "add_BOS"),
        ({"prevent_retokenization": False}, "prevent_retokenization"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"echo": True}, "echo: prompt_token_ids of every reply"),
        ({"return_prompt_tokens": 1}, "return_prompt_tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort: no such field here"),
        ({"tools": []}, "tools: no such field here"),
        ({"prompt_token_ids": [1]}, "prompt_token_ids: no such field"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": "1"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_tokens"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids"),
        ({"stop": 5}, "stop: .* stop_token_ids"),
        ({"stop": [5]}, "stop: .* stop_token_ids"),
        ({"stop": ""}, "stop: strings have 1 to 1000 characters"),
        ({"stop": ["a", ""]}, "stop: strings have 1 to 1000 characters"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"policy_epoch_at_least": 1.5}, "policy_epoch_at_least"),
        ({"routes": 1}, "routes"),
        ({"prompt_cache_key": 5}, "prompt_cache_key"),
        ({"n": 0}, "n: "),
        ({"n": 129}, "n: "),
        ({"n": "2"}, "n: "),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options: an object"),
        ({"stream_options": {"include_usage": 1}}, "include_usage"),
        ({"stream_options": {"usage_always": True}}, "stream_options.usage_always: no such field"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": "2"}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs: only with logprobs true"),
        ({"logprobs": 3, "top_logprobs": 2}, "logprobs is 3 and top_logprobs 2"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        read(**body)


@given(st.text(), JSON.filter(lambda value: value is not None))
def test_a_name_that_nobody_knows_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ProtocolError) as refused:
        read(**{f"x_{name}": value})
    assert str(refused.value).startswith(f"x_{name}"[:80] + ": ")


@pytest.mark.parametrize(
    ("body", "top"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": 0}, 0),
        ({"logprobs": 3}, 3),
        ({"logprobs": 0, "top_logprobs": 3}, 3),
        ({"logprobs": 3, "top_logprobs": 3}, 3),
        ({"top_logprobs": 3}, 3),
    ],
)
def test_log_probabilities_are_asked_for_in_the_manner_of_either_route(body: dict[str, Any], top: int | None) -> None:
    assert delivery(**body).top_logprobs == top
    assert read(**body).top_logprobs == (top or 0)


@given(st.integers(1, 128), st.booleans(), st.booleans())
def test_how_a_reply_is_handed_over_is_read(n: int, stream: bool, include_usage: bool) -> None:
    asked = delivery(n=n, stream=stream, stream_options={"include_usage": include_usage})
    assert (asked.n, asked.stream, asked.include_usage) == (n, stream, include_usage)


@given(st.dictionaries(st.text(), JSON), st.booleans())
def test_any_json_object_is_read_as_it_was_sent(body: dict[str, Any], escaped: bool) -> None:
    assert read_json(json.dumps(body, ensure_ascii=escaped).encode()) == body


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "no JSON object"),
        (b'"text"', "no JSON object"),
        (b"null", "no JSON object"),
        (b'{"a": "\xff"}', "no JSON: .*utf-8"),
        (b'{"prompt": "\\ud800"}', "no JSON: .*surrogates"),
        (b'{"\\uDfff": 1}', "no JSON: .*surrogates"),
        ('{"prompt": "\ud800"}'.encode(errors="surrogatepass"), "no JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "no JSON: .*4300"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no JSON: .*recursion"),
    ],
)
def test_what_is_no_json_object_is_refused(content: bytes, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        read_json(content)


@given(st.binary())
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(read_json(content), dict)
