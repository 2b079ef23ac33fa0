"""The wire format: what is sent is read back, and a reply that lacks anything is an error."""

import hashlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.serve.completions import TextCompletions
from megatron_klong.serve.protocol import (
    Completion,
    CompletionRequest,
    PromptIds,
    ProtocolError,
    Reply,
    ReplyError,
)
from megatron_klong.serve.wire import read_json

IDS = st.lists(st.integers(0, 200_000), min_size=1, max_size=20)
CHOICE: dict[str, Any] = {
    "prompt_token_ids": [1, 2],
    "generation_token_ids": [3, 4],
    "generation_log_probs": [-0.5, -1.25],
    "finish_reason": "stop",
    "policy_epoch": [[0, 7]],
}


REQUESTS = st.builds(
    CompletionRequest,
    prompt_token_ids=IDS.map(tuple),
    max_tokens=st.integers(1, 9),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 9),
    stop_token_ids=IDS.map(tuple),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3).map(tuple),
    seed=st.none() | st.integers(),
    top_logprobs=st.integers(0, 20),
    deadline_seconds=st.none() | st.floats(0.001, 99),
    policy_epoch_at_least=st.none() | st.integers(0, 9),
    routes=st.booleans(),
    prompt_cache_key=st.none() | st.text(max_size=3),
)


@given(REQUESTS)
def test_a_request_is_read_as_it_was_sent(request: CompletionRequest) -> None:
    body = read_json(json.dumps(request.to_wire()).encode())
    assert TextCompletions.of(body, model="m", tokenizer=None).requests == [request]


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=4))
def test_a_prompt_that_grew_is_that_of_all_its_ids(parts: list[list[int]]) -> None:
    grown = [PromptIds()]
    for part in parts:
        grown.append(grown[-1].followed_by(part))
    for number, prompt in enumerate(grown):
        ids = [identifier for part in parts[:number] for identifier in part]
        assert (json.loads(prompt.json), len(prompt)) == (ids, len(ids))
        assert (
            prompt.sha256 == hashlib.sha256(b"".join(struct.pack("<i", identifier) for identifier in ids)).hexdigest()
        )


@pytest.mark.parametrize("ids", [[2**31], ["5"], [None], [1.5]])
def test_what_is_no_token_id_is_refused(ids: list[Any]) -> None:
    with pytest.raises(ProtocolError, match="no token ids"):
        PromptIds([3]).followed_by(ids)
    with pytest.raises(ReplyError, match="no token ids"):
        Reply.from_wire({"choices": [{**CHOICE, "prompt_token_ids": ids}]}, PromptIds([3]))


@given(
    IDS,
    st.lists(st.tuples(st.integers(0, 99), st.floats(-50, 0)), min_size=1),
    st.sampled_from(["stop", "length"]),
    st.booleans(),
)
def test_a_reply_is_read_as_it_was_sent(
    prompt: list[int], sampled: list[tuple[int, float]], reason: Any, repeats_prompt: bool
) -> None:
    body = {"prompt": prompt, "return_prompt_tokens": repeats_prompt}
    asked = TextCompletions.of(body, model="m", tokenizer=None)
    completion = Completion(
        prompt_token_ids=tuple(prompt),
        generation_token_ids=tuple(identifier for identifier, _ in sampled),
        generation_log_probs=tuple(value for _, value in sampled),
        finish_reason=reason,
        policy_epoch=((0, 3),),
    )
    reply = json.loads(json.dumps(asked.reply([completion])))
    assert dict(Reply.from_wire(reply, PromptIds(prompt))).items() <= dict(completion).items()
    if repeats_prompt:
        assert Completion.from_wire(reply) == completion
    assert ("prompt_token_ids" in reply["choices"][0]) is repeats_prompt
    with pytest.raises(ReplyError, match="to another prompt"):
        Reply.from_wire(reply, PromptIds([*prompt, 5]))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"prompt": "text", "max_tokens": 1}, "prompt: .* --tokenizer"),
        ({"prompt": [], "max_tokens": 1}, "prompt_token_ids"),
        ({"prompt": [[[1]]], "max_tokens": 1}, "prompt"),
        ({"prompt": [True], "max_tokens": 1}, "prompt"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [1], "max_tokens": "9"}, "max_tokens"),
        ({"prompt": [1], "max_tokens": 1, "temperature": -1.0}, "temperature"),
        ({"prompt": [1], "max_tokens": 1, "top_p": 0}, "top_p"),
        ({"max_tokens": 1}, "prompt"),
        ({"prompt": [[1], []], "max_tokens": 1}, "prompt_token_ids"),
        ({"prompt": [[1], "text"], "max_tokens": 1}, "prompt"),
    ],
)
def test_a_malformed_request_is_refused_and_its_field_named(body: Any, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        TextCompletions.of(body, model="m", tokenizer=None)


@pytest.mark.parametrize(
    "change",
    [
        {"generation_token_ids": None},
        {"generation_token_ids": [], "generation_log_probs": []},
        {"generation_log_probs": None},
        {"generation_log_probs": [-0.5]},
        {"generation_log_probs": [-0.5, None]},
        {"generation_log_probs": [-0.5, float("-inf")]},
        {"generation_log_probs": [-0.5, float("nan")]},
        {"generation_log_probs": [-0.5, 0.7]},
        {"prompt_token_ids": None},
        {"finish_reason": "abort"},
    ],
)
def test_a_reply_that_lacks_something_is_no_sample(change: dict[str, Any]) -> None:
    assert Completion.from_wire({"choices": [CHOICE]}).generation_token_ids == (3, 4)
    with pytest.raises(ReplyError):
        Completion.from_wire({"choices": [{**CHOICE, **change}]})


@pytest.mark.parametrize("body", [None, {}, {"choices": []}, {"choices": [CHOICE, CHOICE]}, {"choices": [None]}])
def test_a_reply_has_one_choice(body: Any) -> None:
    with pytest.raises(ReplyError):
        Completion.from_wire(body)
