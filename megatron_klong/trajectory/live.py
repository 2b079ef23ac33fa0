"""The context of a live agent: messages in, at each turn those the model is to see.

Built on the same ContextTracker as the splitter, so the windows of the finished transcript are the contexts it
really had. Each prompt has a fingerprint (length and hash of its ids), which `replay` recomputes from the transcript.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_klong.trajectory.context import ContextError, ContextPolicy, ContextTracker
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Message
from megatron_klong.trajectory.segments import RenderedMessage, Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """One prompt: the window it belongs to, its length in tokens with the generation header, the SHA-256 of its ids."""

    window: int
    tokens: int
    sha256: str


class PromptDigest:
    """Running hash over token ids (little-endian int32)."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.tokens = 0

    def update(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            self._hash.update(array("i", segment.ids).tobytes())
            self.tokens += len(segment)

    def fingerprint(self, window: int, header: Segment) -> Fingerprint:
        """The prompt that ends here, with the header that asks for the next turn."""
        digest = self._hash.copy()
        digest.update(array("i", header.ids).tobytes())
        return Fingerprint(window=window, tokens=self.tokens + len(header), sha256=digest.hexdigest())


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What to send for the next turn.

    visible: numbers of the messages in context.  stripped_below: messages before this number go without reasoning.
    reply_tokens: the longest reply that still fits the window.
    """

    visible: tuple[int, ...]
    stripped_below: int
    fingerprint: Fingerprint
    reply_tokens: int


class LiveContext:
    """The growing context of one episode. `messages` is the whole transcript, never cut."""

    def __init__(
        self,
        renderer: GlmRenderer,
        policy: ContextPolicy,
        tools: Sequence[Mapping[str, Any]],
        head: Sequence[Message],
    ) -> None:
        """Begin with the task: `head` is every message before the first turn. Raises ContextError."""
        self.messages: list[Message] = []
        self._renderer = renderer
        self._tracker = ContextTracker(policy)
        preamble = renderer.preamble(tools)
        self._segment_count = len(preamble)
        self._first_segment: list[int] = []  # of each message
        self._tracker.begin(preamble, [self._render(message) for message in head])
        self._rewrites = -1
        self._unhashed: list[Segment] = []
        self._digest = PromptDigest()

    @property
    def windows(self) -> int:
        """Windows so far, the growing one included."""
        return self._tracker.window_number + 1

    def next_prompt(self) -> Prompt:
        """Make room for a turn and say what to send."""
        self._tracker.next_turn()
        return self._prompt()

    def halve_history(self) -> Prompt:
        """What to send instead, with half the history, after an engine called the prompt too long. ContextError.

        The reply's message must say how often this was done (`Message.halved`), or the splitter cuts otherwise.
        """
        if not self._tracker.halve_history():
            raise ContextError(
                f"the engine calls a prompt of {self._tracker.context_tokens} tokens too long that holds no more than "
                f"the task, its reading and one turn; lower max_tokens, {self._tracker.policy.max_tokens}, to what it "
                "serves"
            )
        return self._prompt()

    def _prompt(self) -> Prompt:
        self._hash(self._unhashed)
        fingerprint = self._fingerprint()
        return Prompt(
            visible=tuple(n for n, segment in enumerate(self._first_segment) if self._tracker.in_context(segment)),
            stripped_below=sum(self._tracker.is_stripped(segment) for segment in self._first_segment),
            fingerprint=fingerprint,
            # less one: a reply that is cut by its length is ended by the template
            reply_tokens=self._tracker.policy.max_tokens - fingerprint.tokens - 1,
        )

    def add_turn(self, reply: Message) -> Fingerprint | None:
        """Append the reply and return the fingerprint of the prompt it is trained in.

        That is the prompt it was given, unless the reply is longer than was asked for: then the context is cut again
        to make room, and None means that no window can hold it. A reply with sampled ids is taken as those.
        """
        rendered = self._render(reply)
        self._tracker.add_turn(rendered)
        self._hash((), left_out=len(rendered.segments))
        fingerprint = None if self._tracker.turn_dropped else self._fingerprint()
        self._unhashed = list(rendered.segments)
        return fingerprint

    def add_message(self, message: Message) -> None:
        """Append what followed the turn."""
        rendered = self._render(message)
        self._tracker.add_message(rendered)
        self._unhashed += rendered.segments

    def _render(self, message: Message) -> RenderedMessage:
        rendered = self._renderer.message(message, self.messages[-1] if self.messages else None)
        self.messages.append(message)
        self._first_segment.append(self._segment_count)
        self._segment_count += len(rendered.segments)
        return rendered

    def _hash(self, added: Iterable[Segment], left_out: int = 0) -> None:
        """Bring the digest up to date: append, or start over if the context was rewritten."""
        if self._rewrites == self._tracker.rewrites:
            self._digest.update(added)
            return
        self._rewrites = self._tracker.rewrites
        self._digest = PromptDigest()
        segments = self._tracker.context_segments()
        self._digest.update(segments[: len(segments) - left_out])

    def _fingerprint(self) -> Fingerprint:
        return self._digest.fingerprint(self._tracker.window_number, self._renderer.header)
