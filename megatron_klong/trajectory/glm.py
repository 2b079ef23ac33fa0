"""Transcript -> GLM-4.5 token segments, equal token for token to the model's chat template.

Always: segment borders fall on control tokens, so encoding piece by piece equals encoding the rendered text whole;
an assistant turn ends with the next role's token, which is the turn's (trained when the turn is); missing reasoning
renders as an empty think block, which is context and untrained. A reply that a policy sampled under this tokenizer is
taken as its ids, all trained: nothing of it is rendered, and its end is the token it sampled, if it sampled one.
The template's rule that reasoning before the last user message is left out is not applied here: reasoning bodies are
segments of their own, and the context policy decides which of them a window holds.
Source of the format: the GLM-4.5 chat template (zai-org/GLM-4.5, `chat_template.jinja`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from megatron_klong.trajectory.sampled import sampled_segments
from megatron_klong.trajectory.schema import Message, Role, Transcript
from megatron_klong.trajectory.segments import RenderedMessage, RenderedTranscript, Segment, SegmentKind
from megatron_klong.trajectory.tokenizer import Tokenizer

_KEPT_TEXTS = 256  # of the last turns of many episodes; 40 MB, if each has 16,000 characters


class Control(str):
    """A control token, as opposed to text that happens to spell one."""

    __slots__ = ()


_ROLE_TOKENS = {
    Role.SYSTEM: Control("<|system|>"),
    Role.USER: Control("<|user|>"),
    Role.ASSISTANT: Control("<|assistant|>"),
    Role.TOOL: Control("<|observation|>"),
}
_TEXT_KINDS = {
    Role.SYSTEM: SegmentKind.SYSTEM,
    Role.USER: SegmentKind.USER,
    Role.TOOL: SegmentKind.OBSERVATION,
}


class GlmRenderer:
    """Renders messages one by one, as a live agent gets them, or a whole transcript."""

    name = "glm-4.5"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # a live agent's messages are rendered twice: for its context and for what is sent
        self._encode = lru_cache(maxsize=_KEPT_TEXTS)(tokenizer.encode)
        self.header = self._segment(SegmentKind.HEADER, False, [_ROLE_TOKENS[Role.ASSISTANT]])

    def transcript(self, transcript: Transcript) -> RenderedTranscript:
        """Render every message, each in the light of the one before it."""
        messages: list[RenderedMessage] = []
        previous: Message | None = None
        ids_are_ours = transcript.tokenizer_sha256 == self.tokenizer.sha256
        for message in transcript.messages:
            if message.sampled is not None and not ids_are_ours:  # ids of another vocabulary: its text is what is left
                message = replace(message, sampled=None)
            messages.append(self.message(message, previous))
            previous = message
        return RenderedTranscript(
            preamble=self.preamble(transcript.tools),
            messages=tuple(messages),
            closing=self.closing(previous),
        )

    def preamble(self, tools: Sequence[Mapping[str, Any]]) -> tuple[Segment, ...]:
        """What stands before the first message: start tokens and, if there are tools, their definitions."""
        start = self._segment(SegmentKind.PREAMBLE, False, [Control("[gMASK]"), Control("<sop>")])
        return (start, self._segment(SegmentKind.TOOLS, False, _tools_pieces(tools))) if tools else (start,)

    def message(self, message: Message, previous: Message | None) -> RenderedMessage:
        """The segments that `message` adds after `previous`."""
        if message.role is Role.ASSISTANT:
            segments = self._assistant(message)
        else:
            segments = self._text_message(message, previous)
        return RenderedMessage(
            role=message.role, reading=message.reading, segments=tuple(segments), halved=message.halved
        )

    def closing(self, last: Message | None) -> tuple[Segment, ...]:
        """The token that ends the last turn when no message follows: what the model would have had to say."""
        if last is None or last.role is not Role.ASSISTANT:
            return ()
        if last.sampled is not None:
            return () if last.sampled.end is None else (Segment(SegmentKind.TURN_END, True, [last.sampled.end]),)
        token = _ROLE_TOKENS[Role.TOOL if last.tool_calls else Role.USER]
        return (self._segment(SegmentKind.TURN_END, last.trained, [token]),)

    def _text_message(self, message: Message, previous: Message | None) -> list[Segment]:
        kind = _TEXT_KINDS[message.role]
        role_token = _ROLE_TOKENS[message.role]
        body: list[str] = ["\n" + message.content]
        if message.role is Role.TOOL:
            body = [
                "\n",
                Control("<tool_response>"),
                "\n" + message.content + "\n",
                Control("</tool_response>"),
            ]
        if previous is not None and previous.role is Role.ASSISTANT:
            return [*self._turn_end(previous, role_token), self._segment(kind, False, body)]
        if message.role is Role.TOOL and previous is not None and previous.role is Role.TOOL:
            return [self._segment(kind, False, body)]
        return [self._segment(kind, False, [role_token, *body])]

    def _turn_end(self, turn: Message, role_token: Control) -> list[Segment]:
        """The token that ends a turn is the role token of what follows, but a sampled one may be another."""
        if turn.sampled is None:
            return [self._segment(SegmentKind.TURN_END, turn.trained, [role_token])]
        sampled = turn.sampled.end == self.tokenizer.control[role_token]
        end = Segment(SegmentKind.TURN_END, sampled, [self.tokenizer.control[role_token]])
        if sampled or turn.sampled.end is None:
            return [end]
        return [Segment(SegmentKind.SAMPLED_END, True, [turn.sampled.end]), end]

    def _assistant(self, message: Message) -> list[Segment]:
        if message.sampled is not None:
            return [self.header, *sampled_segments(message.sampled.body, self.tokenizer)]
        trained = message.trained
        reasoning = (message.reasoning or "").strip()
        segments = [self.header]
        if reasoning:
            segments += [
                self._segment(SegmentKind.THINK, trained, ["\n", Control("<think>")]),
                self._segment(SegmentKind.REASONING, trained, [reasoning]),
                self._segment(SegmentKind.THINK, trained, [Control("</think>")]),
            ]
        else:
            empty = ["\n", Control("<think>"), Control("</think>")]
            segments.append(self._segment(SegmentKind.THINK, False, empty))
        answer = _answer_pieces(message)
        if answer:
            segments.append(self._segment(SegmentKind.ANSWER, trained, answer))
        return segments

    def _segment(self, kind: SegmentKind, trained: bool, pieces: Sequence[str]) -> Segment:
        """Encode pieces; neighbouring texts are encoded as one, as they would be in the whole rendered text."""
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if not isinstance(piece, Control):
                text += piece
                continue
            if text:
                ids += self._encode(text)
                text = ""
            ids.append(self.tokenizer.control[piece])
        if text:
            ids += self._encode(text)
        return Segment(kind, trained, ids)


def _answer_pieces(message: Message) -> list[str]:
    pieces: list[str] = []
    if content := message.content.strip():
        pieces.append("\n" + content)
    for call in message.tool_calls:
        pieces += ["\n", Control("<tool_call>"), call.name + "\n"]
        for key, value in call.arguments.items():
            text = value if isinstance(value, str) else _to_json(value)
            pieces += [Control("<arg_key>"), key, Control("</arg_key>"), "\n"]
            pieces += [Control("<arg_value>"), text, Control("</arg_value>"), "\n"]
        pieces.append(Control("</tool_call>"))
    return pieces


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tool definitions as the template writes them."""
    return "".join(_tools_pieces(tools))


def _tools_pieces(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    definitions = "".join(_to_json(tool) + "\n" for tool in tools)
    pieces: list[str] = [
        Control("<|system|>"),
        "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        f"function signatures within <tools></tools> XML tags:\n<tools>\n{definitions}</tools>\n\nFor each "
        "function call, output the function name and arguments within the following XML format:\n",
        Control("<tool_call>"),
        "{function-name}\n",
    ]
    for number in (1, 2):
        pieces += [Control("<arg_key>"), f"{{arg-key-{number}}}", Control("</arg_key>"), "\n"]
        pieces += [Control("<arg_value>"), f"{{arg-value-{number}}}", Control("</arg_value>"), "\n"]
    return [*pieces, "...\n", Control("</tool_call>")]


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
