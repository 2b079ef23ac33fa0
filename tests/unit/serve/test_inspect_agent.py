"""Inspect AI's own agent with its own tool, as they come, on either route: only the engine is scripted."""

from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task, eval
from inspect_ai.agent import react
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import ChatMessageTool, Model, get_model
from inspect_ai.scorer import includes
from inspect_ai.tool import bash

from megatron_klong.serve.turns import read_turns
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.unit.serve.scripted import Scripted, call, serving, written

FIRST = "\n<think>I had better count.</think>\nI count." + call("bash", command="echo $((41+1))") + "<|observation|>"
SECOND = "\n<think>That is it.</think>\n" + call("submit", answer="It is 42.") + "<|observation|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["I had better count. That is it. echo"] * 4, vocabulary_size=300, folder=made)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def scripted(tokenizer: Tokenizer) -> Scripted:
    replies = [written(tokenizer, text) for text in (FIRST, SECOND)]
    return Scripted(*replies, tokenizer=tokenizer, vocabulary_size=tokenizer.vocabulary_size)


def played(model: Model, folder: Path) -> EvalLog:
    task = Task(
        dataset=[Sample(input="What is 41 and 1?", target="42")],
        solver=react(tools=[bash(timeout=60)]),
        scorer=includes(),
        sandbox="local",
    )
    [log] = eval(task, model=model, log_dir=str(folder), log_format="json", display="none", fail_on_error=True)
    return log


def check(log: EvalLog, engine: Scripted, tokenizer: Tokenizer) -> None:
    """The episode went as it was written, and the tool's output reached the prompt."""
    assert log.status == "success", log.error
    assert log.samples is not None
    [sample] = log.samples
    assert sample.output.completion.endswith("It is 42.")
    assert sample.scores is not None
    assert sample.scores["includes"].value == "C"
    results = [message.text for message in sample.messages if isinstance(message, ChatMessageTool)]
    assert results[0] == "42\n"
    assert len(engine.asked) == 2
    first, second = (tokenizer.decode(request.prompt_token_ids) for request in engine.asked)
    assert '"name": "bash"' in first
    assert '"name": "submit"' in first
    assert first.endswith("<|user|>\nWhat is 41 and 1?<|assistant|>")
    # what the policy said, and then what came of it
    assert second == first + FIRST + "\n<tool_response>\n42\n\n</tool_response><|assistant|>"
    usage = next(iter(log.stats.model_usage.values()))
    read = usage.input_tokens + (usage.input_tokens_cache_read or 0)
    assert read == sum(len(request.prompt_token_ids) for request in engine.asked)
    assert usage.output_tokens == sum(len(written(tokenizer, text)) for text in (FIRST, SECOND))


@pytest.mark.parametrize("stream", [False, True])
def test_over_chat_by_inspects_own_provider(folder: Path, tokenizer: Tokenizer, tmp_path: Path, stream: bool) -> None:
    engine = scripted(tokenizer)
    with serving(engine, tokenizer=tokenizer) as url:
        settings: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "any", "stream": stream}
        log = played(get_model("openai-api/klong/policy", memoize=False, **settings), tmp_path)
    check(log, engine, tokenizer)


def test_over_completions_by_ours_with_no_sampled_token_encoded_again(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    engine = scripted(tokenizer)
    turns = tmp_path / "turns.jsonl"
    with serving(engine) as url:
        model = get_model("klong/policy", base_url=url, tokenizer=str(folder), turns=str(turns), memoize=False)
        log = played(model, tmp_path)
    check(log, engine, tokenizer)
    first, second = (request.prompt_token_ids for request in engine.asked)
    ids = written(tokenizer, FIRST)
    # which no tokenizer would make of the text
    assert len(tokenizer.encode(FIRST)) != len(ids)
    assert list(second[: len(first) + len(ids)]) == [*first, *ids]
    assert [turn.ids for turn in read_turns(turns)] == [tuple(ids), tuple(written(tokenizer, SECOND))]
