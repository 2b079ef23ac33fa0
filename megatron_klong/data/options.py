"""What preprocessing can be told on the command line; the context policy has defaults that follow from the window."""

import argparse
from pathlib import Path
from typing import Literal

from megatron_klong.trajectory.context import ContextPolicy


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Add --max-tokens, --overlap-tokens and their kin."""
    group = parser.add_argument_group("windows")
    group.add_argument("--max-tokens", type=int, default=131072, help="window length")
    group.add_argument(
        *("--overlap-tokens", "--keep"),
        type=_tokens_or_fraction,
        default=16384,
        metavar="TOKENS|FRACTION",
        help="history that survives a cut, in whole turns: tokens, or a fraction (0.7) of the room behind the prefix",
    )
    group.add_argument(
        "--reserve-tokens", type=int, help="room kept free for one turn (default: an eighth of a window)"
    )
    group.add_argument(
        "--pin",
        type=_pin,
        default="reading",
        metavar="task|reading|N",
        help="what every window begins with: the task, also the reading of the paper, or the first N messages (the "
        "task always, the last message with its whole turn)",
    )
    group.add_argument("--prefix-cap-tokens", type=int, help="longest pinned prefix (default: half a window)")
    group.add_argument(
        "--loss-on",
        choices=("new", "window"),
        default="new",
        help="new: each token is trained once, where it is new; window: overlaps and pinned turns count in each window",
    )


def policy_from_options(options: argparse.Namespace) -> ContextPolicy:
    """The policy the options describe. Raises ContextError."""
    return ContextPolicy(
        max_tokens=options.max_tokens,
        reserve_tokens=options.reserve_tokens or options.max_tokens // 8,
        keep=options.overlap_tokens,
        pin=options.pin,
        prefix_cap_tokens=options.prefix_cap_tokens or options.max_tokens // 2,
    )


def _tokens_or_fraction(text: str) -> int | float:
    """Digits alone are tokens; anything with a point is a fraction. Raises ValueError, which argparse reports."""
    return int(text) if text.strip().lstrip("-").isdigit() else float(text)


def _pin(text: str) -> Literal["task", "reading"] | int:
    match text:
        case "task" | "reading":
            return text
    return int(text)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add what is read, what is written, and how the work is done."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, nargs="+", help="transcript files, or folders of them")
    source.add_argument("--merge", type=Path, nargs="+", metavar="PREFIX", help="shards to make one of, in this order")
    parser.add_argument("--output-prefix", type=Path, required=True, help="shard path without suffix, such as data/sft")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, SentencePiece .model, or their folder")
    parser.add_argument("--add-special-tokens", action="store_true", help="append control tokens the vocabulary lacks")
    parser.add_argument(
        "--chat-template",
        type=Path,
        help="Hugging Face chat template with generation markers, to render as its model and not as GLM-4.5",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a shard that exists")
    parser.add_argument("--workers", type=_positive, default=1, help="processes; the shard is the same with any number")
    parser.add_argument(
        "--part",
        type=_share,
        metavar="K/N",
        help="do only part K (from 0) of N and make no shard yet: for the tasks of a job array. The same command "
        "without --part then makes it",
    )
    parser.add_argument("--strict", action="store_true", help="write no shard if any input is refused")
    parser.add_argument(
        "--materialize",
        action="store_true",
        help="also write PREFIX.materialized: each window as a plain document. A stock GPTDataset trains on all of it; "
        "PREFIX.materialized_mask says for each token whether it is to be trained",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def check_input_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Stop, as argparse does, at options that do not go together."""
    if options.input and not options.tokenizer:
        parser.error("--input needs --tokenizer")
    if options.merge and options.part:
        parser.error("--part is for --input: shards are merged in one go")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _share(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: write K/N with K from 0 to N - 1, such as 0/16")
    return int(part), int(parts)
