"""OpenAI's own client, as it comes, against the front: what it expects is what it gets.

Its types know neither the fields we add nor messages handed back as plain objects: so the ignored type errors.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

from megatron_klong.serve.protocol import DeadlinePassed, EngineStopped
from tests.unit.serve.scripted import Scripted, call, eventually, log_prob, serving, written
from tests.unit.trajectory.builders import byte_tokenizer

BYTES = byte_tokenizer()
HELLO: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Count."}]},
]
BASH: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}, "seconds": {"type": "integer"}},
            "required": ["command"],
            "additionalProperties": False,
        },
    },
}
PLAIN = "\n<think>One, two.</think>\nTwo é.<|user|>"
CALLS = "\n<think>Look.</think>\nI look."
CALLS += call("bash", command="5", seconds="9") + call("bash", command='echo "é"') + "<|observation|>"
CUT = "\n<think></think>\n<tool_call>bash\n<arg_key>command</arg_key>\n<arg_value>ls</arg_value>\n"


def scripted(*texts: str, **settings: Any) -> Scripted:
    """Says each of the texts, in single bytes."""
    replies = [written(BYTES, text) for text in texts]
    return Scripted(*replies, tokenizer=BYTES, vocabulary_size=BYTES.vocabulary_size, **settings)


@pytest.fixture
def engine() -> Scripted:
    return scripted()


@pytest.fixture
def client(engine: Scripted) -> Iterator[OpenAI]:
    with (
        serving(engine, tokenizer=BYTES, token="secret", max_requests=4, max_waiting=0) as url,
        OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client,
    ):
        yield client


def say(engine: Scripted, *texts: str) -> None:
    engine.replies += [written(BYTES, text) for text in texts]


def test_chat(engine: Scripted, client: OpenAI) -> None:
    say(engine, PLAIN)
    reply = client.chat.completions.create(
        model="policy", messages=HELLO, max_completion_tokens=90, temperature=0.5, top_p=0.9, seed=3, user="u"
    )
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Two é.", "stop")
    assert choice.message.reasoning_content == "One, two."  # type: ignore[attr-defined]
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    assert (reply.object, reply.model) == ("chat.completion", "policy")
    [asked] = engine.asked
    assert (asked.temperature, asked.top_p, asked.seed, asked.max_tokens) == (0.5, 0.9, 3, 90)
    prompt = "[gMASK]<sop><|system|>\nBe brief.<|user|>\nCount.<|assistant|>"
    assert BYTES.decode(asked.prompt_token_ids) == prompt
    assert reply.usage is not None
    sampled = len(written(BYTES, PLAIN))
    assert reply.usage.prompt_tokens == len(asked.prompt_token_ids)
    assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (sampled, sampled + len(asked.prompt_token_ids))
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 1


def test_chat_streamed(engine: Scripted, client: OpenAI) -> None:
    say(engine, PLAIN)
    stream = client.chat.completions.create(
        model="policy", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Two é."
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "One, two."
    assert len([delta for delta in deltas if delta.content]) > 3
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(written(BYTES, PLAIN))


def test_tools(engine: Scripted, client: OpenAI) -> None:
    say(engine, CALLS, PLAIN)
    first = client.chat.completions.create(model="policy", messages=HELLO, tools=[BASH], tool_choice="auto")
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.content == "I look."
    assert message.tool_calls is not None
    functions = [one.function for one in message.tool_calls if one.type == "function"]
    assert [function.name for function in functions] == ["bash", "bash"]
    assert [json.loads(function.arguments) for function in functions] == [
        {"command": "5", "seconds": 9},
        {"command": 'echo "é"'},
    ]
    assert len({one.id for one in message.tool_calls}) == 2
    results: list[ChatCompletionMessageParam] = [
        {"role": "tool", "tool_call_id": one.id, "content": f"result {n}"} for n, one in enumerate(message.tool_calls)
    ]
    said = message.to_dict()
    second = client.chat.completions.create(model="policy", messages=[*HELLO, said, *results], tools=[BASH])  # type: ignore[list-item]
    assert second.choices[0].message.content == "Two é."
    before, after = (BYTES.decode(request.prompt_token_ids) for request in engine.asked)
    assert '"name": "bash"' in before
    results_read = "".join(f"\n<tool_response>\nresult {n}\n</tool_response>" for n in (0, 1))
    assert after == before + CALLS + results_read + "<|assistant|>"


def test_tools_streamed(engine: Scripted, client: OpenAI) -> None:
    say(engine, CALLS)
    with client.chat.completions.stream(model="policy", messages=HELLO, tools=[BASH]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done", "tool_calls.function.arguments.done"} <= kinds
    [choice] = final.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "I look.", "tool_calls")
    assert choice.message.tool_calls is not None
    assert [json.loads(one.function.arguments) for one in choice.message.tool_calls] == [
        {"command": "5", "seconds": 9},
        {"command": 'echo "é"'},
    ]


@pytest.mark.parametrize("parallel", [True, False])
def test_one_call_or_several(engine: Scripted, client: OpenAI, parallel: bool) -> None:
    say(engine, CALLS)
    reply = client.chat.completions.create(model="policy", messages=HELLO, tools=[BASH], parallel_tool_calls=parallel)
    assert len(reply.choices[0].message.tool_calls or ()) == 1 + parallel


def test_a_call_that_cannot_be_read_is_none_that_can_be_run(engine: Scripted, client: OpenAI) -> None:
    say(engine, CUT, PLAIN)
    first = client.chat.completions.create(model="policy", messages=HELLO, tools=[BASH])
    [one] = first.choices[0].message.tool_calls or ()
    assert first.choices[0].finish_reason == "length"
    assert one.type == "function"
    assert one.function.arguments == '{"command": "ls"'
    said = first.choices[0].message.to_dict()
    again = [*HELLO, said, {"role": "tool", "tool_call_id": one.id, "content": "Unreadable."}]
    client.chat.completions.create(model="policy", messages=again, tools=[BASH])  # type: ignore[arg-type]
    assert "<arg_value>ls</arg_value>\n</tool_call><|observation|>" in BYTES.decode(engine.asked[1].prompt_token_ids)


def test_log_probabilities(engine: Scripted, client: OpenAI) -> None:
    text = "<think></think>ab<|user|>"
    say(engine, text, text)
    reply = client.chat.completions.create(model="policy", messages=HELLO, logprobs=True, top_logprobs=2)
    [choice] = reply.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert [one.token for one in content] == ["<think>", "</think>", "a", "b", "<|user|>"]
    assert [one.logprob for one in content] == [log_prob(place) for place in range(5)]
    assert [(one.token, one.bytes) for one in content[2].top_logprobs] == [("a", [97]), ("b", [98])]
    # what a trainer needs; sent back, it stands in the next prompt as it was sampled
    assert choice.message.generation_token_ids == written(BYTES, text)  # type: ignore[attr-defined]
    assert choice.message.generation_log_probs == [log_prob(place) for place in range(5)]  # type: ignore[attr-defined]
    again = [*HELLO, choice.message.to_dict(), {"role": "user", "content": "More."}]
    client.chat.completions.create(model="policy", messages=again)  # type: ignore[arg-type]
    first, second = (request.prompt_token_ids for request in engine.asked)
    assert second[: len(first) + 5] == first + tuple(written(BYTES, text))


def test_of_a_part_of_a_character_no_bytes_are_known(engine: Scripted, client: OpenAI) -> None:
    say(engine, "é")
    reply = client.chat.completions.create(model="policy", messages=HELLO, logprobs=True)
    assert reply.choices[0].logprobs is not None
    assert [one.bytes for one in reply.choices[0].logprobs.content or []] == [None, None]


def test_stop_strings_and_several_replies(engine: Scripted, client: OpenAI) -> None:
    say(engine, *(["<think></think>one, two, three"] * 3))
    reply = client.chat.completions.create(model="policy", messages=HELLO, n=3, stop=[", t"], seed=5)
    assert [choice.message.content for choice in reply.choices] == ["one"] * 3
    assert [choice.finish_reason for choice in reply.choices] == ["stop"] * 3
    assert [request.seed for request in engine.asked] == [5, 6, 7]


@pytest.mark.parametrize("prompt", ["Count", [67, 111, 117, 110, 116]])
def test_completions_of_text_and_of_ids(engine: Scripted, client: OpenAI, prompt: Any) -> None:
    say(engine, "a b c", "a b c")
    reply = client.completions.create(model="policy", prompt=prompt, max_tokens=4, stop="c", logprobs=1)
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason) == ("a b ", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", " ", "b", " "]
    assert choice.logprobs.token_logprobs == [log_prob(place) for place in range(4)]
    assert choice.generation_token_ids == list(b"a b ")  # type: ignore[attr-defined]
    assert engine.asked[0].prompt_token_ids == tuple(b"Count")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 4)
    stream = client.completions.create(model="policy", prompt=prompt, max_tokens=9, stop="c", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "a b "


def test_models(client: OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.object) == ("policy", "model")


def test_errors_have_the_classes_that_a_client_expects(engine: Scripted, client: OpenAI) -> None:
    def ask(**fields: Any) -> Any:
        return client.completions.create(**{"model": "policy", "prompt": [5], "max_tokens": 1} | fields)

    with pytest.raises(openai.BadRequestError, match="best_of") as refused:
        ask(best_of=2)
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask(max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="policy", input="x")
    with pytest.raises(openai.AuthenticationError, match="bearer token"):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.ConflictError, match="policy 0 is served"):
        ask(extra_body={"policy_epoch_at_least": 1})
    engine.replies = [EngineStopped("gone"), DeadlinePassed("too late"), RuntimeError("a fault")]
    for status in (503, 504, 500):
        with pytest.raises(openai.InternalServerError) as failed:
            ask()
        assert failed.value.status_code == status
    with pytest.raises(openai.APIStatusError) as too_large:
        ask(user="x" * 17_000_000)
    assert too_large.value.status_code == 413


def test_an_error_in_the_middle_of_a_stream_is_raised(engine: Scripted, client: OpenAI) -> None:
    engine.replies = [[*b"ab", EngineStopped("the engine has ended: out of memory")]]
    stream = client.completions.create(model="policy", prompt=[5], stream=True)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)


def test_asked_at_once_by_the_asynchronous_client() -> None:
    engine = scripted(*[PLAIN] * 5, held=True)

    async def whole(client: AsyncOpenAI) -> str | None:
        reply = await client.chat.completions.create(model="policy", messages=HELLO)
        return reply.choices[0].message.content

    async def streamed(client: AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="policy", messages=HELLO, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask(url: str) -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            asked = [asyncio.ensure_future(one(client)) for one in (streamed, whole, streamed, whole)]
            await asyncio.to_thread(eventually, lambda: len(engine.asked) == 4)
            with pytest.raises(openai.RateLimitError, match="4 requests are in flight"):
                await whole(client)
            # one that may try again comes back when it is told to
            asked.append(asyncio.ensure_future(whole(client.with_options(max_retries=5))))
            await asyncio.sleep(0.1)
            engine.let()
            return await asyncio.gather(*asked)

    with serving(engine, tokenizer=BYTES, max_requests=2, max_waiting=2) as url:
        assert asyncio.run(ask(url)) == ["Two é."] * 5
