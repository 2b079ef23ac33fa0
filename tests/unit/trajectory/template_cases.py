"""Renderers of the real chat templates with tokenizers made for them, and what they must agree with."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFaceTokenizer

from megatron_klong.trajectory.chat_template import ChatTemplate
from megatron_klong.trajectory.schema import Role, Transcript
from megatron_klong.trajectory.segments import RenderedTranscript, Segment, SegmentKind
from megatron_klong.trajectory.template_renderer import TemplateRenderer
from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS, load_template_tokenizer
from tests.unit.trajectory.oracle import Oracle, all_trained

# What each template writes: (tokens declared special, tokens only added to the vocabulary).
TOKENS = {
    "qwen3": (
        ["<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
    ),
    "gptoss": (["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"], []),
    "glm": (list(CONTROL_TOKENS[:7]), list(CONTROL_TOKENS[7:])),
    "deepseek": (
        [
            *("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<bos>"),
            *(
                f"<\uff5ctool\u2581{name}\u2581{end}\uff5c>"
                for name in ("calls", "outputs")
                for end in ("begin", "end")
            ),
            *(f"<\uff5ctool\u2581{name}\u2581{end}\uff5c>" for name in ("call", "output") for end in ("begin", "end")),
            "<\uff5ctool\u2581sep\uff5c>",
        ],
        [],
    ),
}

# A template of a dozen lines for the rules themselves.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A renderer and what it must agree with."""

    renderer: TemplateRenderer
    source: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def oracle(self) -> Oracle:
        tokenizer = self.renderer.tokenizer
        return Oracle(self.source, Path(tokenizer.path), list(tokenizer.control), **self.variables)

    def check(self, made: Transcript) -> RenderedTranscript:
        made = all_trained(made)
        rendered = self.renderer.transcript(made)
        ids, mask = self.oracle.ids_and_mask(made.messages, made.tools)
        users = [number for number, message in enumerate(made.messages) if message.role is Role.USER]
        last_user = max(users, default=-1)
        shown = [
            segment
            for number, message in enumerate(rendered.messages)
            for segment in message.segments
            if segment.kind is not SegmentKind.REASONING or number > last_user
        ]
        assert flat([*rendered.preamble, *shown]) == ids, made.id
        assert [segment.trained for segment in [*rendered.preamble, *shown] for _ in segment.ids] == mask, made.id
        return rendered


def flat(segments: Sequence[Segment]) -> list[int]:
    return [token for segment in segments for token in segment.ids]


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Makes tokenizers and cases from the real templates."""

    data: Path
    folder: Path

    def tokenizer(self, name: str) -> Path:
        """A real vocabulary with the tokens of `name` added."""
        folder = self.folder / name
        if folder.is_dir():
            return folder
        special, added = TOKENS[name]
        source = self.data / "tokenizers" / "gpt-neox-olmo-dolma-v1_5" / "tokenizer.json"
        made = HuggingFaceTokenizer.from_file(str(source))
        made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        made.add_tokens([AddedToken(token, normalized=False) for token in added])
        folder.mkdir()
        made.save(str(folder / "tokenizer.json"))
        return folder

    def template(self, name: str) -> str:
        return (self.data / "chat_templates" / name).read_text()

    def case(self, source: str, tokens: str) -> Case:
        tokenizer = self.tokenizer(tokens)
        template = ChatTemplate(source, path=f"{tokens}.jinja")
        renderer = TemplateRenderer(load_template_tokenizer(tokenizer, template.literals), template)
        return Case(renderer=renderer, source=source)


def with_markers(source: str) -> str:
    """gpt-oss's template, which has no generation markers, with markers and a fixed date."""
    source = source.replace('strftime_now("%Y-%m-%d")', '"2025-08-05"')
    source, replies = re.subn(
        r'\{\{- "<\|start\|>assistant(<\|channel\|>\w+<\|message\|>" \+ message\.\w+ \+ "<\|\w+\|>") \}\}',
        r'{{- "<|start|>assistant" }}{%- generation %}{{- "\1 }}{%- endgeneration %}',
        source,
    )
    assert replies == 5
    call = '{{- "<|start|>assistant to=" }}'
    source = source.replace(call, '{{- "<|start|>assistant" }}{%- generation %}{{- " to=" }}')
    return source.replace('{{- "<|call|>" }}', '{{- "<|call|>" }}{%- endgeneration %}')
