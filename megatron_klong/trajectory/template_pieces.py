"""What a chat template writes for a transcript -> pieces of text, each of one message and one kind.

Always: up to every turn, the pieces read as the template renders the messages up to there; where it has by then left
reasoning out, they do so without their `may_go` pieces. So a window that holds a prefix of the pieces holds what the
template would have written. A template that cannot be read so, or that leaves out text, is a RenderError.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from megatron_klong.trajectory.chat_template import ChatTemplate, Rendering, TemplateError
from megatron_klong.trajectory.renderer import RenderError
from megatron_klong.trajectory.schema import Role, Transcript
from megatron_klong.trajectory.segments import SegmentKind

_TEXT_KINDS = {
    Role.SYSTEM: SegmentKind.SYSTEM,
    Role.USER: SegmentKind.USER,
    Role.TOOL: SegmentKind.OBSERVATION,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """message: its number, None before the first.  may_go: left out of history once a user message follows."""

    message: int | None
    kind: SegmentKind
    text: str
    trained: bool = False

    @property
    def may_go(self) -> bool:
        return self.kind is SegmentKind.REASONING

    @property
    def of_turn(self) -> bool:
        return self.kind in (SegmentKind.HEADER, SegmentKind.ANSWER, SegmentKind.REASONING)

    def is_turn_border(self, after: "Piece") -> bool:
        """Whether history may be cut, or a turn begins or ends, between this piece and the next."""
        return self.message != after.message and (self.of_turn or after.of_turn)


@dataclass(frozen=True, kw_only=True)
class Script:
    """One transcript, ready for its template: spelt control tokens hidden, `marks` for the generation spans."""

    transcript: Transcript
    template: ChatTemplate
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any]
    marks: tuple[str, str]
    variables: Mapping[str, str]
    control: re.Pattern[str]
    shown: Mapping[str, str]  # private character -> the control token it hides

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Rendering:
        try:
            return self.template.render(messages, self.tools, marks=self.marks, variables=self.variables)
        except TemplateError as error:
            raise self.error(len(messages) - 1, f"{error}; change the message, or choose another template") from error

    def error(self, number: int, problem: str) -> RenderError:
        return RenderError(f"{self.transcript.id}: messages[{number}]: {problem}")

    def quote(self, text: str) -> str:
        """A piece of hidden text as a person would read it."""
        return repr("".join(self.shown.get(character, character) for character in text))

    def is_assistant(self, number: int) -> bool:
        return self.transcript.messages[number].role is Role.ASSISTANT

    def user_speaks(self, start: int, stop: int | None = None) -> bool:
        return any(message.role is Role.USER for message in self.transcript.messages[start:stop])


@dataclass(kw_only=True)
class _State:
    """What was read so far. shown: as the template shows it now.  bare: with all reasoning that may go left out."""

    pieces: list[Piece] = field(default_factory=list)
    shown: str = ""
    unstripped: list[int] = field(default_factory=list)  # turns whose reasoning is shown, numbers of messages
    stripping: int | None = None  # the message before which the template left reasoning out
    keeping: int | None = None  # the message before which it could have done so, and did not


def transcript_pieces(script: Script) -> list[Piece]:
    """All pieces in document order. Raises RenderError."""
    turns = [number for number in range(len(script.messages)) if script.is_assistant(number)]
    if not turns or turns[0] == 0:
        raise script.error(0, "no message before the first turn, or no turn at all; begin with the task")
    state = _State()
    _add_head(state, script, turns[0])
    for turn, stop in zip(turns, [*turns[1:], len(script.messages)], strict=True):
        _add_turn(state, script, turn)
        if stop > turn + 1:
            _add_between(state, script, turn, stop)
    if state.stripping is None:  # nothing is ever left out, so nothing needs a segment of its own
        return [replace(piece, kind=SegmentKind.ANSWER) if piece.may_go else piece for piece in state.pieces]
    if state.keeping is not None:
        raise script.error(
            state.keeping,
            f"{script.template.path} leaves earlier reasoning out before messages[{state.stripping}], but not here; "
            "windows know one rule only, so take the reasoning out of the transcript, or choose another template",
        )
    return state.pieces


# -- turns


def _add_turn(state: _State, script: Script, turn: int) -> None:
    rendering = script.render(script.messages[: turn + 1])
    if not rendering.text.startswith(state.shown):
        raise _changed(script, turn, state.shown, rendering.text, "before it")
    start = len(state.shown)
    spans = [span for span in rendering.spans if span[1] > start]
    if not spans:
        raise script.error(
            turn, f"{script.template.path} marks none of this turn as generated; mark it, or use another"
        )
    if spans[0][0] < start:  # the template counts what ends the message before as the model's
        start = _give_back(state, script, turn, start - spans[0][0])
    reasoning = _reasoning(script, turn, rendering, start)
    _check_complete(script, turn, rendering.text[start:])
    trained = script.transcript.messages[turn].trained
    borders = sorted({start, len(rendering.text), *(place for span in spans for place in span), *reasoning})
    for first, last in pairwise(borders):
        marked = any(span[0] <= first < span[1] for span in spans)
        kind = SegmentKind.HEADER if last <= spans[0][0] else SegmentKind.ANSWER
        if reasoning and first in range(*reasoning):
            kind = SegmentKind.REASONING
        text = rendering.text[first:last]
        state.pieces.append(Piece(message=turn, kind=kind, text=text, trained=trained and marked))
    state.shown = rendering.text
    if reasoning:
        state.unstripped.append(turn)


def _give_back(state: _State, script: Script, turn: int, length: int) -> int:
    """Move the end of the message before `turn` to the turn; returns where the turn begins."""
    last = state.pieces[-1]
    if last.of_turn or len(last.text) < length:
        raise script.error(turn, f"{script.template.path}: a generation marker reaches over another turn; mend it")
    state.pieces[-1] = replace(last, text=last.text[:-length])
    return len(state.shown) - length


def _reasoning(script: Script, turn: int, rendering: Rendering, start: int) -> tuple[()] | tuple[int, int]:
    """The text that goes if the reasoning of this turn does, if that can matter; nothing if it is no single range."""
    reasoning = (script.messages[turn]["reasoning_content"] or "").strip()
    if not reasoning:
        return ()
    if reasoning not in rendering.text[start:] and _quoted(reasoning) not in rendering.text[start:]:
        raise script.error(
            turn,
            f"{script.template.path} does not write this turn's reasoning; take it out of the transcript, or choose a "
            "template that does",
        )
    if not script.user_speaks(turn + 1):
        return ()
    bare = script.render([*script.messages[:turn], _without_reasoning(script.messages[turn])]).text
    whole = rendering.text
    length = len(whole) - len(bare)
    same = _same_length(whole, bare)
    # Often cutting a little earlier or later leaves the same text: take the cut that splits no control token.
    controls = [found.span() for found in script.control.finditer(whole, start)]
    places = [first for first, _ in controls] + [
        found.start() for found in re.finditer(f"(?={re.escape(reasoning)})", whole[: same + len(reasoning)])
    ]
    for place in [*places, same]:
        stop = place + length
        fits = start <= place <= same and length > 0 and whole[:place] + whole[stop:] == bare
        if fits and not any(first < border < last for first, last in controls for border in (place, stop)):
            return place, stop
    return ()


def _without_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in message.items() if key != "thinking"}
    return {**made, "reasoning_content": ""} if "reasoning_content" in made else made


# -- other messages


def _add_head(state: _State, script: Script, stop: int) -> None:
    """The task. What stands before the first message's own text, up to its last control token, is the preamble."""
    text = script.render(script.messages[:stop]).text
    state.pieces = _messages_between(script, 0, stop, 0, text)
    first = state.pieces[0]
    role, content = script.transcript.messages[0].role, str(script.messages[0]["content"]).strip()
    if role is not Role.SYSTEM and content in first.text:
        controls = [found.start() for found in script.control.finditer(first.text, 0, first.text.rfind(content))]
        cut = controls[-1] if controls else 0
        kind = SegmentKind.TOOLS if script.tools else SegmentKind.PREAMBLE
        state.pieces[:1] = [
            Piece(message=None, kind=kind, text=first.text[:cut]),
            replace(first, text=first.text[cut:]),
        ]
    for number in range(stop):
        _check_complete(script, number, text)
    state.shown = text


def _add_between(state: _State, script: Script, turn: int, stop: int) -> None:
    """The messages between two turns, with what a user message among them does to the reasoning before it."""
    text = script.render(script.messages[:stop]).text
    user_speaks = script.user_speaks(turn + 1, stop)
    if text.startswith(state.shown):
        if user_speaks and state.unstripped:
            state.keeping = turn + 1
    else:
        bare = _bare(script, turn)
        ours = "".join(piece.text for piece in state.pieces if not piece.may_go)
        if not user_speaks or bare != ours or not text.startswith(bare):
            raise _changed(script, turn + 1, state.shown, text, "before it")
        state.shown = bare
        state.stripping = turn + 1
        state.unstripped = []
    added = _messages_between(script, turn + 1, stop, len(state.shown), text)
    for number in range(turn + 1, stop):
        _check_complete(script, number, text[len(state.shown) :])
    state.pieces += added
    state.shown = text


def _bare(script: Script, turn: int) -> str:
    return script.render([_without_reasoning(message) for message in script.messages[: turn + 1]]).text


def _messages_between(script: Script, start: int, stop: int, place: int, text: str) -> list[Piece]:
    """Share `text` from `place` on between messages; where the template gives no border, the later one has it."""
    pieces: list[Piece] = []
    for number in range(start, stop):
        end = len(text)
        if number + 1 < stop:
            try:
                up_to = script.render(script.messages[: number + 1]).text
            except RenderError:  # some templates want a user message first
                up_to = ""
            end = len(up_to) if len(up_to) > place and text.startswith(up_to) else place
        kind = _TEXT_KINDS[script.transcript.messages[number].role]
        pieces.append(Piece(message=number, kind=kind, text=text[place:end]))
        place = end
    return pieces


# -- refusals


def _check_complete(script: Script, number: int, text: str) -> None:
    """Every text of a message stands in what was written for it, as it is or quoted for JSON."""
    message = script.messages[number]
    fields = {"content": message["content"], "tool_calls": message.get("tool_calls")}
    for place, value in _texts(fields, ""):
        wanted = value.strip()
        if wanted not in text and _quoted(wanted) not in text and _quoted(wanted, ascii_only=True) not in text:
            raise script.error(
                number,
                f"{script.quote(place.lstrip('.'))[1:-1]}: {script.template.path} leaves this text out "
                f"({script.quote(wanted[:40])}); choose a template that writes it, or take it out of the transcript",
            )


def _texts(value: Any, place: str) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(place, value)]
    if isinstance(value, Mapping):
        names = [(place, key) for key in value if ".arguments" in place]
        skipped = ("id", "type") if ".arguments" not in place else ()
        return names + [
            text for key, item in value.items() if key not in skipped for text in _texts(item, f"{place}.{key}")
        ]
    if isinstance(value, list):
        return [text for number, item in enumerate(value) for text in _texts(item, f"{place}[{number}]")]
    return []


def _quoted(text: str, *, ascii_only: bool = False) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _same_length(first: str, second: str) -> int:
    """Characters both begin with."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _changed(script: Script, number: int, before: str, after: str, where: str) -> RenderError:
    place = _same_length(before, after)
    was, now = before[max(0, place - 20) : place + 40], after[max(0, place - 20) : place + 40]
    return script.error(
        number,
        f"{script.template.path} changes the text {where} when this message is added ({script.quote(was)} becomes "
        f"{script.quote(now)}), so windows cut from the whole would hold what no model ever saw; use an append-only "
        "template (a training variant), take the reasoning out of the transcript, or end it before this message",
    )
