"""A step of the SFT program against what it is made of, and packed rows against padded ones.

    over_bare_loop         tokens a second of the program's loop (rows read from a shard and packed, the train step, the
                           line of the curves, and a checkpoint every hundredth step) / of a bare Megatron-Core loop:
                           the same model, optimizer and schedule on ready-made tensors, nothing read, reported or saved
    without_checkpoints    the same, checkpoints left out
    packed_over_padded     tokens a second of packed rows / of one window a row, padded to the longest
    over_pad_share         that speed-up / what the shares of padding say it is where padding costs what tokens cost
    wait_share             share of the program's step that passes until its batch is there

One process; the two sides of a ratio take turns, step by step, and train copies of one model on the same rows, so they
have the same losses, which is checked. A ratio is the median over the rounds. Lengths are those of a mix as KLong has
it: windows of long transcripts, nearly full but the last of each, and as many short examples. The last line is JSON.
"""

import argparse
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import megatron_klong.model.megatron_ready  # noqa: E402, F401

# isort: split
import torch  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from megatron_klong.data.batch import PackedBatch, pack  # noqa: E402
from megatron_klong.data.blend import Blend  # noqa: E402
from megatron_klong.data.mixture import Mixture, open_mixture  # noqa: E402
from megatron_klong.data.shard import ShardWriter  # noqa: E402
from megatron_klong.model.build import build_chunks  # noqa: E402
from megatron_klong.model.config import LayoutConfig, ModelConfig  # noqa: E402
from megatron_klong.model.parallel import initialize  # noqa: E402
from megatron_klong.model.presets import tiny  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402
from megatron_klong.train.checkpoint import Progress, Retention  # noqa: E402
from megatron_klong.train.checkpoint_writer import CheckpointWriter  # noqa: E402
from megatron_klong.train.config import SftConfig  # noqa: E402
from megatron_klong.train.loop import Run, advance, feed, figures, open_log, save  # noqa: E402
from megatron_klong.train.loss import cross_entropy  # noqa: E402
from megatron_klong.train.optimizer import Training, make_trainable  # noqa: E402
from megatron_klong.train.step import train_step  # noqa: E402
from megatron_klong.trajectory.context import ContextPolicy  # noqa: E402
from megatron_klong.trajectory.schema import Reading, Role, Transcript  # noqa: E402
from megatron_klong.trajectory.segments import (  # noqa: E402
    RenderedMessage,
    RenderedTranscript,
    Segment,
    SegmentKind,
)
from megatron_klong.trajectory.tokenizer import Tokenizer  # noqa: E402
from megatron_klong.trajectory.windows import split  # noqa: E402

VOCABULARY = 8192
STEPS = 100_000  # more than are made: the learning rate stays where it is
WARM_UP = 2  # rounds
TURN_TOKENS = 24  # of a reply, and of the result behind it


type Ready = tuple[PackedBatch, PackedSeqParams]
type Sums = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Timings:
    """Seconds a step; of a checkpoint where one was written."""

    program: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    checkpoints: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """By round. speedup: of packed rows.  predicted: what the shares of padding say."""

    speedup: list[float]
    predicted: list[float]
    packed_padding: float
    padded_padding: float


def mixed_lengths(longest: int, windows: int) -> list[int]:
    """Half of them windows of long transcripts, of which every sixth is a last one; half short examples."""
    chosen = random.Random(1)
    lengths = []
    for number in range(windows):
        if number % 2:
            share = chosen.uniform(0.03, 0.4)
        elif number % 12 == 0:
            share = chosen.uniform(0.3, 1.0)
        else:
            share = chosen.uniform(0.85, 1.0)
        lengths.append(int(share * longest))
    return lengths


def write_shard(prefix: Path, lengths: Sequence[int], longest: int) -> None:
    """A window of random ids for each length, in as many segments as turns make."""
    chosen = random.Random(2)
    tokenizer = Tokenizer(
        encode=lambda text: [],
        decode=lambda ids: "",
        control={},
        vocabulary_size=VOCABULARY,
        sha256="none",
        path="none",
    )
    policy = ContextPolicy(max_tokens=longest, reserve_tokens=1, keep=0, pin="task", prefix_cap_tokens=longest // 2)
    with ShardWriter(prefix, tokenizer, policy, renderer="random", overwrite=False) as shard:
        for number, length in enumerate(lengths):
            rendered = random_transcript(chosen, length)
            made = Transcript(id=str(number), task=str(number), source="random", tools=(), messages=())
            shard.add(made, rendered, split(rendered, policy))


def random_transcript(chosen: random.Random, tokens: int) -> RenderedTranscript:
    """A task and turns that fill so many tokens."""

    def segment(kind: SegmentKind, length: int) -> Segment:
        trained = kind in (SegmentKind.ANSWER, SegmentKind.TURN_END)
        return Segment(kind, trained, [chosen.randrange(VOCABULARY) for _ in range(length)])

    def message(role: Role, *segments: Segment) -> RenderedMessage:
        return RenderedMessage(role=role, reading=Reading.NONE, segments=segments)

    task = 2 + tokens % (2 * TURN_TOKENS)
    messages = [message(Role.USER, segment(SegmentKind.USER, task))]
    for _ in range(tokens // (2 * TURN_TOKENS)):
        reply = segment(SegmentKind.HEADER, 1), segment(SegmentKind.ANSWER, TURN_TOKENS - 2)
        messages.append(message(Role.ASSISTANT, *reply))
        result = segment(SegmentKind.TURN_END, 1), segment(SegmentKind.OBSERVATION, TURN_TOKENS)
        messages.append(message(Role.TOOL, *result))
    return RenderedTranscript(preamble=(segment(SegmentKind.PREAMBLE, 2),), messages=tuple(messages), closing=())


def trainable(config: SftConfig, model_config: ModelConfig) -> Training:
    """The same weights at every call."""
    torch.manual_seed(1)
    chunks = build_chunks(model_config, config.layout, precision=config.precision)
    return make_trainable(chunks, config.optimizer, steps=STEPS)


class Program:
    """The loop of the SFT program, a step at a time."""

    def __init__(self, config: SftConfig, model_config: ModelConfig, data: Mixture, stack: ExitStack) -> None:
        self.run = Run(
            config=config,
            data=data,
            model_config=model_config,
            training=trainable(config, model_config),
            checkpoints=stack.enter_context(
                CheckpointWriter(config.checkpoints_folder, config, Retention(newest=1), background=True)
            ),
            steps=STEPS,
        )
        self.progress = Progress(step=0, data_position=0, data_fingerprint=data.train.fingerprint)
        self.waited = 0.0
        self.run.folder.mkdir(parents=True)
        self._log = stack.enter_context(open_log(self.run, self.progress))
        self._feed = stack.enter_context(feed(self.run, self.progress))

    def step(self) -> tuple[float, int]:
        """The loss, and of how many trained tokens it is the mean."""
        started = time.monotonic()
        given, self.waited = next(self._feed)
        result = train_step(self.run.training, given.batches, self.run.loss)
        line = figures(self.run, given, result, seconds=time.monotonic() - started, waited=self.waited)
        self.progress = advance(self.run, self.progress)
        self._log.write(self.progress.step, line)
        self.run.checkpoints.poll()
        return result.loss, result.trained_tokens

    def save(self) -> None:
        save(self.run, self.progress)


def bare_step(training: Training, ready: Sequence[Ready]) -> list[Sums]:
    """Nothing but Megatron-Core: forward, backward, update."""
    (wrapped,) = training.wrapped
    wrapped.zero_grad_buffer()
    training.optimizer.zero_grad()
    sums: list[Sums] = get_forward_backward_func()(
        forward_step_func=bare_forward,
        data_iterator=iter(ready),
        model=[wrapped],
        num_microbatches=len(ready),
        seq_length=int(ready[0][0].ids.numel()),
        micro_batch_size=1,
        forward_only=False,
    )
    training.optimizer.step()
    training.schedule.step(1)
    return sums


def bare_forward(ready: Iterator[Ready], model: Any) -> tuple[torch.Tensor, Any]:
    batch, packed = next(ready)

    def loss(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        total, tokens = (token_losses * batch.loss_mask).sum(), batch.loss_mask.sum()
        return total, tokens.int(), {"loss": total.detach(), "tokens": tokens}

    output = model(
        batch.ids,
        batch.positions,
        None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=packed,
        padding_mask=batch.padding_mask,
    )
    return output, loss


def made_ready(batches: Sequence[PackedBatch], device: torch.device) -> list[Ready]:
    """On the device, and with what the model is told of windows."""
    ready = []
    for batch in (batch.to(device) for batch in batches):
        ends, longest = batch.cu_seqlens, batch.longest_window_tokens
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        ready.append((batch, packed))
    return ready


def timed[Result](work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def by_turns[First, Second](
    number: int, first: Callable[[], First], second: Callable[[], Second]
) -> tuple[tuple[float, First], tuple[float, Second]]:
    """Both timed; which one begins changes from round to round."""
    if number % 2:
        later = timed(second)
        return timed(first), later
    return timed(first), timed(second)


def against_bare(program: Program, bare: Training, blend: Blend, rounds: int) -> Timings:
    """The same steps by both, and a checkpoint now and then."""
    times = Timings()
    for number in range(-WARM_UP, rounds):
        ready = made_ready(next_rows(program, blend), bare.device)
        (own, (loss, tokens)), (theirs, sums) = by_turns(number, program.step, partial(bare_step, bare, ready))
        bare_tokens = sum(part["tokens"] for part in sums)
        assert tokens == bare_tokens, (tokens, bare_tokens)
        bare_loss = float(sum(part["loss"] for part in sums) / bare_tokens)
        # the program also balances its experts, so in time the two models part
        assert abs(loss - bare_loss) < (1e-3 if number < 0 else 1e-2) * bare_loss, (loss, bare_loss)
        if number < 0:
            continue
        times.program.append(own)
        times.bare.append(theirs)
        times.waits.append(program.waited)
        if number % 10 == 0:
            times.checkpoints.append(timed(program.save)[0])
    return times


def next_rows(program: Program, blend: Blend) -> list[PackedBatch]:
    """The batches that the program's next step will be fed; blend: one of its own, the program's is its thread's."""
    first, rows = program.progress.data_position, program.run.config.global_batch_rows
    return blend.batches([blend.row_at(position) for position in range(first, first + rows)], part=0, parts=1)


def against_padded(training: Training, blend: Blend, longest: int, micro_batches: int, rounds: int) -> Packing:
    """Steps of as many rows of one length, of packed rows and of rows of one window, drawn anew each round."""
    packed_rows = blend.rows_of(0)
    padded_rows = [(number,) for number in range(len(blend))]
    chosen = random.Random(3)
    speedup, predicted = [], []
    for number in range(-WARM_UP, rounds):
        sides = [
            [pack(blend, row, row_tokens=longest) for row in chosen.sample(rows, micro_batches)]
            for rows in (packed_rows, padded_rows)
        ]
        steps = [partial(train_step, training, side, cross_entropy) for side in sides]
        (own, packed), (theirs, padded) = by_turns(number, *steps)
        if number >= 0:
            speedup.append(packed.tokens / own / (padded.tokens / theirs))
            predicted.append(packed.tokens / padded.tokens)
    tokens = int(blend.lengths_tokens.sum())
    return Packing(
        speedup=speedup,
        predicted=predicted,
        packed_padding=1 - tokens / (len(packed_rows) * longest),
        padded_padding=1 - tokens / (len(padded_rows) * longest),
    )


def ratios_of(times: Timings, packing: Packing, save_every_steps: int) -> dict[str, float]:
    saved = statistics.median(times.checkpoints) / save_every_steps  # a step's share of a checkpoint
    pairs = list(zip(times.program, times.bare, strict=True))
    return {
        "over_bare_loop": statistics.median(bare / (own + saved) for own, bare in pairs),
        "without_checkpoints": statistics.median(bare / own for own, bare in pairs),
        "packed_over_padded": statistics.median(packing.speedup),
        "over_pad_share": statistics.median(
            found / expected for found, expected in zip(packing.speedup, packing.predicted, strict=True)
        ),
        "wait_share": statistics.median(wait / own for wait, own in zip(times.waits, times.program, strict=True)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2048, help="of a row, and of the longest window")
    parser.add_argument("--rows", type=int, default=2, help="a step")
    parser.add_argument("--scale", type=int, default=4, help="of the tiny model's width and number of experts")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    initialize(LayoutConfig(), seed=1)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        shard = Path(scratch) / "shard"
        write_shard(shard, mixed_lengths(options.tokens, 240), options.tokens)
        config = SftConfig(
            shards=(str(shard),),
            run_folder=str(Path(scratch) / "run"),
            precision="bf16" if torch.cuda.is_available() else "fp32",
            steps=STEPS,
            global_batch_rows=options.rows,
            row_tokens=options.tokens,
        )
        model_config = tiny(VOCABULARY, scale=options.scale)
        data, again = (
            open_mixture(config.all_sources, row_tokens=config.row_tokens, seed=config.seed) for _ in range(2)
        )
        blend = again.train
        program, bare = Program(config, model_config, data, stack), trainable(config, model_config)
        load = os.getloadavg()[0]
        times = against_bare(program, bare, blend, options.rounds)
        packing = against_padded(bare, blend, options.tokens, options.rows, options.rounds)
    parameters = sum(parameter.numel() for parameter in bare.chunks[0].parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, {options.rows} rows of {options.tokens} tokens a step, {options.rounds} "
        f"rounds, {torch.get_num_threads()} threads, load {load:.1f} to {os.getloadavg()[0]:.1f}"
    )
    report(times, packing, ratios_of(times, packing, config.save_every_steps))
    return 0


def report(times: Timings, packing: Packing, ratios: dict[str, float]) -> None:
    milliseconds = {"program's step": times.program, "bare step": times.bare, "wait for the batch": times.waits}
    rows = [[name, f"{1000 * statistics.median(found):.1f}"] for name, found in milliseconds.items()]
    rows.append(["a checkpoint", f"{1000 * statistics.median(times.checkpoints):.1f}"])
    print("\n".join(aligned([["median", "ms"], *rows])))
    print(f"padding: {packing.packed_padding:.1%} of packed rows, {packing.padded_padding:.1%} of padded ones")
    print("\n".join(aligned([["ratio", "median"], *([name, f"{value:.4f}"] for name, value in ratios.items())])))
    versions = {name: version(name) for name in ("megatron-core", "torch")} | {"python": platform.python_version()}
    rounded = {name: round(value, 4) for name, value in ratios.items()}
    print(json.dumps({"benchmark": "sft_step", "ratios": rounded, "versions": versions}))


if __name__ == "__main__":
    sys.exit(main())
