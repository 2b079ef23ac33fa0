"""Transcript -> token segments through any Hugging Face chat template with `{% generation %}` markers.

Always: ids equal the rendered text encoded whole, masks equal the template's generation spans (less untrained turns),
and text that spells a control token stays text: the template sees a private character in its place.
Windows keep history as it was, so a template must be append-only: what stands before a turn, and the turn, must read
the same once more messages follow. The renderer renders every such prefix and compares. One exception is carried over
to the context policy: reasoning that disappears when a user message follows becomes segments of their own, if leaving
those out gives the template's later text exactly. All else is refused, as is a template that leaves out text.
A transcript of n messages takes about 2n renderings: 1,000 messages, some twenty seconds.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_klong.trajectory.chat_template import ChatTemplate
from megatron_klong.trajectory.renderer import RenderError
from megatron_klong.trajectory.schema import Message, Role, Transcript
from megatron_klong.trajectory.segments import RenderedMessage, RenderedTranscript, Segment
from megatron_klong.trajectory.template_pieces import Piece, Script, transcript_pieces
from megatron_klong.trajectory.tokenizer import Tokenizer, TokenizerError, load_template_tokenizer

_PRIVATE = range(0xF0000, 0xFFFFE)  # characters without meaning


def load_template_renderer(template: str | Path, tokenizer: str | Path) -> "TemplateRenderer":
    """The renderer for a template file and the tokenizer.json (or its folder) that belongs to it.

    Names such as `bos_token` that the template uses are read from the tokenizer_config.json beside the tokenizer.
    Raises TemplateError, TokenizerError, OSError.
    """
    path = Path(template)
    compiled = ChatTemplate(path.read_text("utf-8"), path=str(path))
    loaded = load_template_tokenizer(tokenizer, compiled.literals)
    return TemplateRenderer(loaded, compiled, named_tokens=_named_tokens(compiled, Path(loaded.path)))


class TemplateRenderer:
    """Renders whole transcripts, one at a time (it holds the placeholders of the one at hand).

    A live agent needs GlmRenderer, which knows its format message by message.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, named_tokens: Mapping[str, str] | None = None
    ) -> None:
        """tokenizer: from load_template_tokenizer.  named_tokens: what `bos_token` and the like stand for."""
        if tokenizer.encode_with_offsets is None:
            raise TokenizerError(f"{tokenizer.path}: no character offsets; load it with load_template_tokenizer")
        self.tokenizer = tokenizer
        self.name = template.name
        self._template = template
        self._named_tokens = dict(named_tokens or {})
        self._encode = tokenizer.encode_with_offsets
        control = sorted(tokenizer.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")

    def transcript(self, transcript: Transcript) -> RenderedTranscript:
        """Render every message. Raises RenderError, with the message and the cure."""
        self._refuse_sampled(transcript)
        messages, tools, spare = self._hidden(transcript)
        marks = (next(spare), next(spare))
        script = Script(
            transcript=transcript,
            template=self._template,
            messages=messages,
            tools=tools,
            marks=marks,
            variables=self._named_tokens,
            control=self._control,
            shown=self._shown,
        )
        pieces = transcript_pieces(script)
        segments = self._segments(pieces, script)
        self._check_left_out(pieces, segments, transcript)
        numbers = [piece.message for piece in pieces]
        by_message: list[list[Segment]] = [[] for _ in messages]
        preamble: list[Segment] = []
        for number, segment in zip(numbers, segments, strict=True):
            if segment.ids:
                (preamble if number is None else by_message[number]).append(segment)
        rendered = [
            RenderedMessage(role=message.role, reading=message.reading, segments=tuple(added), halved=message.halved)
            for message, added in zip(transcript.messages, by_message, strict=True)
        ]
        return RenderedTranscript(preamble=tuple(preamble), messages=tuple(rendered), closing=())

    def _refuse_sampled(self, transcript: Transcript) -> None:
        if transcript.tokenizer_sha256 != self.tokenizer.sha256:
            return  # ids of another vocabulary: its text is what is left
        for number, message in enumerate(transcript.messages):
            if message.sampled is not None:
                raise RenderError(
                    f"{transcript.id}: messages[{number}]: sampled token ids of this tokenizer, which a chat template "
                    "would encode anew; render it with glm-4.5"
                )

    # -- text that spells control tokens

    def _hidden(self, transcript: Transcript) -> tuple[list[dict[str, Any]], list[Any], Iterator[str]]:
        """Messages and tools as templates take them, control tokens in their text replaced by private characters."""
        raw = [_as_dict(message) for message in transcript.messages]
        used = {
            character
            for text in _strings([raw, list(transcript.tools)])
            for character in text
            if character > "\U000effff"
        }
        spare = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._placeholders = {token: next(spare) for token in self.tokenizer.control}
        self._shown = {placeholder: token for token, placeholder in self._placeholders.items()}
        return self._hide(raw), self._hide(list(transcript.tools)), spare

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._control.sub(lambda found: self._placeholders[found[0]], value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list | tuple) else value

    # -- tokens

    def _segments(self, pieces: Sequence[Piece], script: Script) -> list[Segment]:
        """Encode all text as one and deal the tokens out.

        A token that reaches over a border belongs to the trained side, as transformers masks it, else to the first.
        """
        ids: list[list[int]] = [[] for _ in pieces]
        stops: list[int] = []
        for piece in pieces:
            stops.append((stops[-1] if stops else 0) + len(piece.text))
        place = 0
        for token, start, stop in self._tokens("".join(piece.text for piece in pieces)):
            while place < len(pieces) - 1 and start >= stops[place]:
                place += 1
            owner = place
            while stop > stops[owner]:
                owner += 1
            if owner != place:
                owner = self._owner(pieces, place, owner, script)
            ids[owner].append(token)
        return [Segment(piece.kind, piece.trained, made) for piece, made in zip(pieces, ids, strict=True)]

    def _check_left_out(self, pieces: Sequence[Piece], segments: Sequence[Segment], transcript: Transcript) -> None:
        """Leaving reasoning out must leave the ids that the text without it is encoded as."""
        if not any(piece.may_go for piece in pieces):
            return
        rest = "".join(piece.text for piece in pieces if not piece.may_go)
        kept = [token for piece, made in zip(pieces, segments, strict=True) if not piece.may_go for token in made.ids]
        if kept != [token for token, _, _ in self._tokens(rest)]:
            raise RenderError(
                f"{transcript.id}: leaving reasoning out changes the tokens beside it; the template needs control "
                f"tokens around it: is this the tokenizer that belongs to {self._template.path}?"
            )

    def _owner(self, pieces: Sequence[Piece], first: int, last: int, script: Script) -> int:
        for number in range(first, last):
            before, after = pieces[number], pieces[number + 1]
            if before.is_turn_border(after) or before.may_go or after.may_go:
                raise RenderError(
                    f"{script.transcript.id}: messages[{after.message}]: a token reaches over the border before "
                    f"{script.quote(after.text[:20])}, where history is cut; the template needs a control token "
                    f"there: is this the tokenizer that belongs to {self._template.path}?"
                )
        return next((number for number in range(first, last + 1) if pieces[number].trained), first)

    def _tokens(self, hidden: str) -> Iterator[tuple[int, int, int]]:
        """Ids, each with the range of characters of `hidden` it stands for."""
        end = 0
        for found in self._control.finditer(hidden):
            yield from self._ordinary(hidden[end : found.start()], end)
            yield self.tokenizer.control[found[0]], found.start(), found.end()
            end = found.end()
        yield from self._ordinary(hidden[end:], end)

    def _ordinary(self, hidden: str, offset: int) -> Iterator[tuple[int, int, int]]:
        shown = [self._shown.get(character, character) for character in hidden]
        places = [offset + place for place, text in enumerate(shown) for _ in text]
        places.append(offset + len(hidden))
        ids, offsets = self._encode("".join(shown))
        for token, (start, stop) in zip(ids, offsets, strict=True):
            yield token, places[start], max(places[start], places[stop - 1] + 1 if stop else 0)


def _named_tokens(template: ChatTemplate, tokenizer: Path) -> dict[str, str]:
    if not template.named_tokens:
        return {}
    file = tokenizer.with_name("tokenizer_config.json")
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    named: dict[str, str] = {}
    for name in sorted(template.named_tokens):
        value = config.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(value, str):
            raise TokenizerError(
                f"{file}: no {name}, which {template.path} writes; put the model's tokenizer_config.json beside its "
                "tokenizer.json"
            )
        named[name] = value
    return named


def _as_dict(message: Message) -> dict[str, Any]:
    """A message under the names that templates read. Reasoning is given always: else some look for it in the text."""
    made: dict[str, Any] = {"role": str(message.role), "content": message.content}
    if message.role is Role.ASSISTANT:
        made["reasoning_content"] = message.reasoning or ""
    if message.reasoning:
        made["thinking"] = message.reasoning
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return made


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
