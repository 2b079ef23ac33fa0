"""What a chat template says, found without our renderers: transformers renders it, a plain tokenizer encodes it.

Text that spells a control token is hidden from the template behind a placeholder and put back before encoding, so it
stays the ordinary text it is. Where no text spells one, the rendered text is encoded whole, by the tokenizer that
knows the control tokens, as a serving engine would.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.schema import Message, Provenance, ToolCall, Transcript
from tests.unit.trajectory.builders import assistant, system, tool, transcript, user

_FIRST_PLACEHOLDER = 0xF0000  # a private plane, which no text here uses


class Oracle:
    """One chat template on one tokenizer.json, to which `control` is added where it lacks some."""

    def __init__(self, template: str, tokenizer: Path, control: Sequence[str], **variables: Any) -> None:
        self._template = template
        self._variables = variables
        # Post-processors add nothing here, but cut white space off the offsets.
        definition = {**json.loads(tokenizer.read_text()), "post_processor": None}
        self._whole = HuggingFaceTokenizer.from_str(json.dumps(definition))
        missing = [token for token in control if self._whole.token_to_id(token) is None]
        self._whole.add_special_tokens([AddedToken(token, normalized=False) for token in missing])
        definition = json.loads(self._whole.to_str())
        for token in definition["added_tokens"]:
            token["special"] |= token["content"] in control
        self._ordinary = HuggingFaceTokenizer.from_str(json.dumps(definition))
        self._ordinary.encode_special_tokens = True
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        self._hidden = {token: chr(_FIRST_PLACEHOLDER + number) for number, token in enumerate(control)}
        self._shown = {placeholder: token for token, placeholder in self._hidden.items()}

    def text(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], **more: Any) -> str:
        return self._render(messages, tools, **more)[0]

    def ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **more: Any) -> list[int]:
        return self.ids_and_mask(messages, tools, **more)[0]

    def ids_and_mask(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **more: Any
    ) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them lie in the template's generation spans."""
        raw = [as_dict(message) for message in messages]
        if not self.spells_control(raw, tools):
            text, spans = self._render(raw, tools, **more)
            encoding = self._whole.encode(text, add_special_tokens=False)
            flags = _flags(len(text), spans)
            return encoding.ids, [any(flags[start:stop]) for start, stop in encoding.offsets]
        text, spans = self._render(self._hide(raw), self._hide(list(tools)), **more)
        flags = _flags(len(text), spans)
        ids: list[int] = []
        mask: list[bool] = []
        end = 0
        for found in self._control.finditer(text):
            self._encode_ordinary(text[end : found.start()], flags[end : found.start()], ids, mask)
            ids.append(self._whole.token_to_id(found[0]))
            mask.append(any(flags[found.start() : found.end()]))
            end = found.end()
        self._encode_ordinary(text[end:], flags[end:], ids, mask)
        return ids, mask

    def spells_control(self, *values: Any) -> bool:
        return any(self._control.search(text) for text in _strings(values))

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], **more: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        marked = "endgeneration" in self._template
        rendered, spans = render_jinja_template(
            [list(messages)],
            tools=list(tools) or None,
            chat_template=self._template,
            return_assistant_tokens_mask=marked,
            **self._variables,
            **more,
        )
        return rendered[0], spans[0] if marked else []

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._control.sub(lambda found: self._hidden[found[0]], value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list | tuple) else value

    def _show(self, hidden: str) -> str:
        for placeholder, token in self._shown.items():
            hidden = hidden.replace(placeholder, token)
        return hidden

    def _encode_ordinary(self, hidden: str, flags: Sequence[bool], ids: list[int], mask: list[bool]) -> None:
        if not any(flags):
            encoded = self._ordinary.encode(self._show(hidden), add_special_tokens=False).ids
            ids += encoded
            mask += [False] * len(encoded)
            return
        text = ""
        spread: list[bool] = []
        for character, flag in zip(hidden, flags, strict=True):
            shown = self._shown.get(character, character)
            text += shown
            spread += [flag] * len(shown)
        encoding = self._ordinary.encode(text, add_special_tokens=False)
        ids += encoding.ids
        mask += [any(spread[start:stop]) for start, stop in encoding.offsets]


def as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates take it."""
    made: dict[str, Any] = {"role": str(message.role), "content": message.content}
    if message.reasoning:
        made["reasoning_content"] = message.reasoning
    if message.tool_calls:
        made["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return made


def _flags(length: int, spans: Sequence[tuple[int, int]]) -> list[bool]:
    flags = [False] * length
    for start, stop in spans:
        flags[start:stop] = [True] * (stop - start)
    return flags


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


# -- transcripts to try it on


def real_transcripts(data: Path) -> list[Transcript]:
    """Every real transcript that some importer reads."""
    folders = [data / "trajectories", data / "paperbench" / "runs"]
    items = [item for folder in folders for file in transcript_files(folder) for item in read_transcripts(file)]
    return [item for item in items if isinstance(item, Transcript)]


def all_trained(made: Transcript) -> Transcript:
    """As if the model had said all that stands in its name: templates mark every assistant message."""
    messages = [replace(message, trained=True, provenance=Provenance.MODEL) for message in made.messages]
    return replace(made, messages=tuple(messages))


class Scribbler:
    """Random transcripts, the same for the same seed: odd white space, odd orders of roles, spelt control tokens."""

    _PIECES = (
        "a", "word", " two words", "\n", "\n\n", " ", "\t", "\r\n", "\u00a0", "\u2028", "\x1c", "é", "数据", "🙂",
        "e\u0301", "<", ">", "|", "</", "<|", "|>", "\\", '"', "'", "{", "}", "{{ x }}", "{% if %}", "    return 1",
        "1234567", "/nothink",
    )  # fmt: skip

    def __init__(self, seed: int, control: Sequence[str]) -> None:
        self._random = random.Random(seed)
        cut = [token[: len(token) // 2] for token in control] + [token[len(token) // 2 :] for token in control]
        self._plain = [*self._PIECES]
        self._forged = [*self._PIECES, *control, *control, *cut]
        self._pieces = self._plain

    def transcript(self) -> Transcript:
        pick = self._random
        self._pieces = pick.choice([self._plain, self._forged])
        messages = [user(self._text())]
        if pick.random() < 0.5:
            messages.insert(0, system(self._text()))
        for _ in range(pick.randrange(6)):
            messages += self._turn()
        tools = [self._value(2, kind=dict) for _ in range(pick.choice([0, 0, 1, 2]))]
        return transcript(*messages, tools=tools)

    def _turn(self) -> list[Message]:
        pick = self._random
        calls = [
            ToolCall(name=self._text() or "n", arguments=self._value(2, kind=dict))
            for _ in range(pick.choice([0, 1, 1, 1, 2]))
        ]
        reasoning = self._text() if pick.random() < 0.6 else None
        reply = assistant(self._text(), reasoning=reasoning, calls=calls, trained=pick.random() < 0.9)
        after = [tool(self._text()) for _ in calls]
        if not calls or pick.random() < 0.2:
            after.append(pick.choice([user, user, user, system])(self._text()))
        if pick.random() < 0.05:  # an order that no scaffold makes
            pick.shuffle(after)
            after = after[: pick.randrange(len(after) + 1)]
        return [reply, *after]

    def _text(self) -> str:
        return "".join(self._random.choices(self._pieces, k=self._random.choice([0, 1, 2, 3, 5, 9])))

    def _value(self, depth: int, kind: type | None = None) -> Any:
        pick = self._random
        if kind is dict or (depth and pick.random() < 0.3):
            return {self._text(): self._value(depth - 1) for _ in range(pick.randrange(3))}
        if depth and pick.random() < 0.2:
            return [self._value(depth - 1) for _ in range(pick.randrange(3))]
        return pick.choice([self._text(), self._text(), self._text(), True, None, 3, -0.5, 1e30])
