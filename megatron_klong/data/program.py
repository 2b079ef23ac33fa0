"""What the preprocess program does with its options."""

import argparse

from megatron_klong.data.options import policy_from_options
from megatron_klong.data.preprocess import merge, preprocess
from megatron_klong.data.report import PreprocessReport
from megatron_klong.trajectory.template_renderer import load_template_renderer
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer


def run(options: argparse.Namespace) -> PreprocessReport:
    """Make a shard of transcripts or of shards. Raises ValueError with what is wrong and the cure, or OSError."""
    if options.merge:
        return merge(
            options.merge, options.output_prefix, overwrite=options.overwrite, materialized=options.materialize
        )
    return preprocess(
        options.input,
        options.output_prefix,
        _tokenizer(options),
        policy_from_options(options),
        loss_on=options.loss_on,
        chat_template=options.chat_template,
        workers=options.workers,
        overwrite=options.overwrite,
        strict=options.strict,
        materialized=options.materialize,
        share=options.part,
    )


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    if options.chat_template:
        return load_template_renderer(options.chat_template, options.tokenizer).tokenizer
    return load_tokenizer(options.tokenizer, add_special_tokens=options.add_special_tokens)
