"""Texts to train the small tokenizer on: the papers, the language of the commands, and what the scaffold says.

Always: every name and number occurs behind a space often enough to become one token of a vocabulary of 1,500
(tests/integration/examples/test_language.py).
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.longhaul.context import Message
from examples.longhaul.experiment import LOWEST_NUMBER, NUM_NUMBERS
from examples.longhaul.names import DATASETS, METHODS
from examples.longhaul.simulated import play
from examples.longhaul.teachers import oracle
from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.messages import tool_definitions
from megatron_klong.agent.scaffold import GO_ON
from megatron_klong.agent.task import INSTRUCTIONS
from megatron_klong.agent.tools import tools_of
from megatron_klong.trajectory.glm import tools_text
from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS

_REPEATS = 50
# What varies from task to task is one token each; the phrases around it may merge into long tokens.
ISOLATED = " (?:" + "|".join((*METHODS, *DATASETS, "[0-9]+")) + r")(?![a-z0-9])|\n[0-9]+:"
_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))


def training_texts(
    task_folders: Sequence[Path], settings: EpisodeConfig, *, demonstrations: Path | None = None
) -> Iterator[str]:
    """Yield the texts as they stand between control tokens; the tasks should be those of the train split."""
    vocabulary = [*METHODS, *DATASETS, *map(str, range(LOWEST_NUMBER, LOWEST_NUMBER + NUM_NUMBERS))]
    tools = tools_text(tool_definitions(tools_of(settings)))
    for _ in range(_REPEATS):
        yield "".join(f" {word}" for word in vocabulary)
        yield from _CONTROL.split(tools)
        yield f"\n{INSTRUCTIONS}"
        yield f"\n{GO_ON}"
    for messages in _episodes(task_folders, demonstrations):
        for message in messages:
            yield from _message_texts(message)


def _episodes(task_folders: Sequence[Path], demonstrations: Path | None) -> Iterator[Sequence[Message]]:
    for folder in task_folders:
        yield play(folder, oracle()).messages
    if demonstrations is not None:
        with demonstrations.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["messages"] for line in lines)


def _message_texts(message: Message) -> Iterator[str]:
    if message["role"] == "tool":
        yield f"\n{message['content']}\n"
    elif message["role"] == "assistant":
        yield message["reasoning_content"]
        for call in message.get("tool_calls", ()):
            yield f"{call['function']['name']}\n"
            for key, value in json.loads(call["function"]["arguments"]).items():
                yield key
                yield str(value)
