"""What a renderer is: transcript in, token segments out, under a name that says which chat format it writes.

Two exist: GlmRenderer (glm.py), which knows GLM-4.5's format, and TemplateRenderer (template_renderer.py), which takes
any Hugging Face chat template with generation markers.
"""

from typing import Protocol

from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.segments import RenderedTranscript
from megatron_klong.trajectory.tokenizer import Tokenizer


class RenderError(ValueError):
    """A transcript this renderer cannot write faithfully; the message names transcript, message and cure."""


class Renderer(Protocol):
    """name: of the chat format, as shards record it.  tokenizer: whose ids the segments hold."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def transcript(self, transcript: Transcript) -> RenderedTranscript:
        """All segments of a transcript. Raises RenderError; GlmRenderer never does."""
        ...
