"""The provider over the real front and client: only the engine is scripted."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelOutput,
    get_model,
)
from inspect_ai.tool import ToolCallError, ToolInfo, ToolParam, ToolParams
from pydantic_core import from_json

from megatron_klong.serve.client import Client, ServerError
from megatron_klong.serve.protocol import (
    Completion,
    CompletionRequest,
    EngineStopped,
    ProtocolError,
    RefitRefused,
    RefitReply,
    RefitRequest,
)
from megatron_klong.serve.provider import KlongAPI
from megatron_klong.serve.turns import UnknownTurn, read_turns
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Message, Role
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.unit.serve.scripted import Scripted, call, eventually, serving, written

LIMIT = 1500
BASH = ToolInfo(
    name="bash",
    description="Run a command.",
    parameters=ToolParams(properties={"command": ToolParam(type="string", description="it")}, required=["command"]),
)
TASK: list[ChatMessage] = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="Count the files.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["counting files, counting"] * 4, vocabulary_size=285, folder=made)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def provider(folder: Path, tmp_path: Path) -> Iterator[Callable[[Scripted], KlongAPI]]:
    with ExitStack() as servers:

        def make(engine: Scripted) -> KlongAPI:
            url = servers.enter_context(serving(engine, max_sequence_length=LIMIT, max_requests=1, max_waiting=0))
            return KlongAPI("policy", f"{url}/v1", tokenizer=str(folder), turns=str(tmp_path / "turns.jsonl"))

        yield make


def sampled(tokenizer: Tokenizer, reasoning: str, content: str, command: str | None, end: str) -> list[int]:
    called = "" if command is None else call("bash", command=command)
    return written(tokenizer, f"\n<think>{reasoning}</think>\n{content}{called}{end}")


def ask(api: KlongAPI, messages: list[ChatMessage], **config: Any) -> ModelOutput:
    async def once() -> ModelOutput:
        try:
            return await api.generate(messages, [BASH], "auto", GenerateConfig(**config))
        finally:
            await api.aclose()

    return anyio.run(once)


def test_a_reply_is_read_and_what_was_sampled_is_kept(
    provider: Callable[[Scripted], KlongAPI], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ids = sampled(tokenizer, "counting", "I count.", "ls | wc", "<|observation|>")
    engine = Scripted(ids, policy_epoch=2)
    api = provider(engine)
    output = ask(api, TASK, temperature=0.5, max_tokens=99, seed=7)
    message = output.choices[0].message
    assert (message.text, output.stop_reason) == ("I count.", "tool_calls")
    assert isinstance(message.content[0], ContentReasoning)
    assert message.content[0].reasoning == "counting"
    assert message.tool_calls is not None
    assert (message.tool_calls[0].function, message.tool_calls[0].arguments) == ("bash", {"command": "ls | wc"})
    [kept] = read_turns(tmp_path / "turns.jsonl")
    assert kept == api.turns[message.id or ""]
    assert (kept.ids, kept.stopped, kept.policy_epoch) == (tuple(ids), True, ((0, 2),))
    assert len(kept.log_probs) == len(ids)
    asked = engine.asked[0]
    assert (asked.temperature, asked.max_tokens, asked.seed) == (0.5, 99, 7)
    assert asked.stop_token_ids == tuple(tokenizer.control[t] for t in ("<|observation|>", "<|user|>", "<|endoftext|>"))


def test_the_first_prompt_is_what_the_template_says(
    provider: Callable[[Scripted], KlongAPI], tokenizer: Tokenizer
) -> None:
    api = provider(Scripted())
    renderer = GlmRenderer(tokenizer)
    task = [Message(role=Role(message.role), content=message.text) for message in TASK]
    segments = [s for n, m in enumerate(task) for s in renderer.message(m, task[n - 1] if n else None).segments]
    expected = [i for s in [*renderer.preamble([]), *segments, renderer.header] for i in s.ids]
    assert from_json(api.prompt(TASK, []).json) == expected
    assert anyio.run(api.count_tokens, TASK) == len(expected)
    assert anyio.run(api.count_text_tokens, "counting") == len(tokenizer.encode("counting"))


@pytest.mark.parametrize("stripped", [False, True])
def test_sampled_ids_stand_in_later_prompts_as_they_were_sampled(
    provider: Callable[[Scripted], KlongAPI], tokenizer: Tokenizer, stripped: bool
) -> None:
    first = sampled(tokenizer, "counting", "I count.", "ls", "<|observation|>")
    engine = Scripted(first, sampled(tokenizer, "x", "done", None, "<|user|>"))
    api = provider(engine)
    message = ask(api, TASK).choices[0].message
    if stripped:
        assert isinstance(message.content, list)
        message = message.model_copy(update={"content": message.content[1:]})
    ask(api, [*TASK, message, ChatMessageTool(content="3", tool_call_id="c")])
    before, after = (list(request.prompt_token_ids) for request in engine.asked)
    shown = first[:-1]
    if stripped:
        shown = shown[:2] + shown[2 + len("counting") :]
    assert after[: len(before) + len(shown)] == before + shown
    assert tokenizer.decode(after[len(before) + len(shown) :]) == (
        "<|observation|>\n<tool_response>\n3\n</tool_response><|assistant|>"
    )


@pytest.mark.parametrize("kept_ids", [0, 1 << 24])
def test_a_prompt_is_what_it_would_be_anew_whatever_became_of_the_one_before(
    provider: Callable[[Scripted], KlongAPI], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kept_ids: int
) -> None:
    monkeypatch.setattr("megatron_klong.serve.provider._KEPT_IDS", kept_ids)
    engine = Scripted(lambda request: sampled(tokenizer, "a", "b", "ls", "<|observation|>"))
    api = provider(engine)

    def longer(messages: list[ChatMessage]) -> list[ChatMessage]:
        return messages

    def cut(messages: list[ChatMessage]) -> list[ChatMessage]:
        return [*messages[:2], *messages[4:]]

    def no_more(messages: list[ChatMessage]) -> list[ChatMessage]:
        return messages[:-2]

    def edited(messages: list[ChatMessage]) -> list[ChatMessage]:
        return [*messages[:3], messages[3].model_copy(update={"content": "4"}), *messages[4:]]

    def failed(messages: list[ChatMessage]) -> list[ChatMessage]:
        return [*messages[:3], messages[3].model_copy(update={"error": ToolCallError("unknown", "no")}), *messages[4:]]

    def said_by_another(messages: list[ChatMessage]) -> list[ChatMessage]:
        return [*messages[:3], ChatMessageUser(content=messages[3].content), *messages[4:]]

    def in_place(messages: list[ChatMessage]) -> list[ChatMessage]:
        messages[3].content = "5"
        return messages

    messages = list(TASK)
    turns = [longer, longer, edited, longer, failed, said_by_another, in_place, longer, cut, no_more, longer]
    for number, turn in enumerate(turns):
        reply = ask(api, messages).message
        anew = from_json(api.prompt(messages, [BASH]).json)
        assert list(engine.asked[-1].prompt_token_ids) == anew, turns[number - 1].__name__
        messages = turn([*messages, reply, ChatMessageTool(content=f"{number}", tool_call_id="c")])


def test_a_reply_not_sampled_here_or_rewritten_is_an_error(
    provider: Callable[[Scripted], KlongAPI], tokenizer: Tokenizer
) -> None:
    api = provider(Scripted(sampled(tokenizer, "a", "b", None, "<|user|>")))
    with pytest.raises(UnknownTurn):
        ask(api, [*TASK, ChatMessageAssistant(content="hello"), ChatMessageUser(content="x")])
    message = ask(api, TASK).choices[0].message
    with pytest.raises(ProtocolError, match="no longer"):
        ask(api, [*TASK, message.model_copy(update={"content": [ContentText(text="c")]}), ChatMessageUser(content="x")])


def test_a_cut_reply_and_the_room_that_is_left(provider: Callable[[Scripted], KlongAPI], tokenizer: Tokenizer) -> None:
    cut = sampled(tokenizer, "a", "b", "ls", "<|user|>")[:-2]
    engine = Scripted(cut)
    api = provider(engine)
    output = ask(api, TASK)
    assert output.stop_reason == "max_tokens"
    assert output.message.tool_calls is not None
    assert "not closed" in (output.message.tool_calls[0].parse_error or "")
    assert len(engine.asked[0].prompt_token_ids) + engine.asked[0].max_tokens == LIMIT
    too_long = ask(api, [*TASK, ChatMessageUser(content="x" * LIMIT)])
    assert too_long.stop_reason == "model_length"
    assert "leaves no room in the server" in too_long.completion


def test_errors_say_whether_to_try_again(provider: Callable[[Scripted], KlongAPI]) -> None:
    api = provider(Scripted(EngineStopped("gone")))
    with pytest.raises(ServerError) as stopped:
        ask(api, TASK)
    assert stopped.value.status == 503
    assert api.should_retry(stopped.value)
    with pytest.raises(ServerError, match="top_k 400") as refused:
        ask(api, TASK, top_k=400)
    assert refused.value.status == 400
    assert not api.should_retry(refused.value)
    with pytest.raises(ProtocolError, match="stop_seqs"):
        ask(api, TASK, stop_seqs=["x"])


def test_a_client_that_may_try_again_gets_through_once_there_is_room() -> None:
    engine = Scripted([5], [6], held=True)
    request = CompletionRequest(prompt_token_ids=(1,), max_tokens=1)

    async def run(url: str) -> Completion:
        async with Client(url, retries=3) as client, anyio.create_task_group() as group:
            group.start_soon(client.complete, request)
            await anyio.to_thread.run_sync(eventually, lambda: engine.asked)
            with pytest.raises(ServerError, match="in flight") as full:
                await Client(url).complete(request)
            assert (full.value.status, full.value.retry_after, full.value.passing) == (429, 1, True)
            engine.let()
            return await client.complete(request)
        raise AssertionError("unreachable")

    with serving(engine, max_requests=1, max_waiting=0) as url:
        assert anyio.run(run, url).generation_token_ids == (6,)


def test_a_server_with_a_token_is_brought_it(folder: Path, tokenizer: Tokenizer) -> None:
    engine = Scripted(sampled(tokenizer, "a", "b", None, "<|user|>"))
    with serving(engine, token="secret") as url:
        assert ask(KlongAPI("policy", url, "secret", tokenizer=str(folder)), TASK).completion == "b"
        with pytest.raises(ServerError, match="bearer token") as refused:
            ask(KlongAPI("policy", url, "wrong", tokenizer=str(folder)), TASK)
    assert refused.value.status == 401


def test_a_server_whose_replies_hold_no_sampled_ids_is_refused(provider: Callable[[Scripted], KlongAPI]) -> None:
    engine = Scripted()
    engine.exact_tokens = False
    with pytest.raises(ProtocolError, match="no sampled ids"):
        ask(provider(engine), TASK)


def test_the_requests_of_an_episode_say_that_they_belong_together(
    provider: Callable[[Scripted], KlongAPI], tokenizer: Tokenizer
) -> None:
    engine = Scripted(lambda request: sampled(tokenizer, "a", "b", "ls", "<|observation|>"))
    api = provider(engine)
    for _ in range(2):
        messages = list(TASK)
        for _ in range(2):
            messages += [ask(api, messages).message, ChatMessageTool(content="3", tool_call_id="c")]
    one, again, other, its_own = (request.prompt_cache_key for request in engine.asked)
    assert one == again != other == its_own


@pytest.mark.parametrize("refusal", [None, RefitRefused("no such folder")])
def test_new_weights_are_asked_for(refusal: Exception | None) -> None:
    engine = Scripted(refit=refusal)

    async def refit(url: str) -> RefitReply:
        async with Client(url) as client:
            return await client.refit(RefitRequest(weights="/new", in_flight="finish"))

    with serving(engine) as url:
        if refusal is None:
            assert anyio.run(refit, url) == RefitReply(policy_epoch=1, seconds=0.5)
        else:
            with pytest.raises(ServerError, match="no such folder") as refused:
                anyio.run(refit, url)
            assert (refused.value.status, refused.value.passing) == (409, False)
    assert engine.refits == [RefitRequest(weights="/new", in_flight="finish")]


def test_inspect_finds_it_by_name(folder: Path) -> None:
    model = get_model("klong/http://127.0.0.1:1", tokenizer=str(folder), memoize=False)
    assert isinstance(model.api, KlongAPI)
    with pytest.raises(ValueError, match="base_url"):
        get_model("klong/policy", tokenizer=str(folder), memoize=False)
