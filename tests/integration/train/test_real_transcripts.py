"""Real transcripts that nobody here wrote, from their files to exported weights."""

import math
from pathlib import Path

from megatron_klong.data.preprocess import preprocess
from megatron_klong.data.shard import Shard
from megatron_klong.train.metrics import read_metrics
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.integration.train.launcher import finish, start
from tests.unit.train.builders import mixture_of

STEPS = 20
WINDOW_TOKENS = 4608  # tools and task of the longest one take 3,700
VOCABULARY_SIZE = 4096


def texts(source: Path) -> list[str]:
    found = [item for file in transcript_files(source) for item in read_transcripts(file)]
    assert all(isinstance(item, Transcript) for item in found)
    return [message.content for item in found if isinstance(item, Transcript) for message in item.messages]


def test_real_transcripts_train_for_20_steps_and_every_trained_token_is_accounted_for(
    shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "trajectories" / "openai_messages"
    train_tokenizer(texts(source), vocabulary_size=VOCABULARY_SIZE, folder=tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    policy = ContextPolicy(
        max_tokens=WINDOW_TOKENS,
        reserve_tokens=WINDOW_TOKENS // 8,
        keep=WINDOW_TOKENS // 8,
        pin="reading",
        prefix_cap_tokens=WINDOW_TOKENS // 2,
    )
    prefix = tmp_path / "shards" / "real"
    report = preprocess([source], prefix, tokenizer, policy)
    assert (report.transcripts, report.turns, report.refusals) == (5, 88, [])
    assert report.trained_tokens == report.trainable_tokens
    assert not report.dropped_tokens

    folder = tmp_path / "run"
    flags = ["--steps", str(STEPS), "--row_tokens", str(WINDOW_TOKENS), "--global_batch_rows", "2"]
    flags += ["--optimizer.learning_rate", "5e-3", "--optimizer.warmup_steps", "2"]
    finish(start(prefix, folder, *flags))

    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "grad_norm"))
    assert abs(lines[0]["loss"] - math.log(tokenizer.vocabulary_size)) < 0.5
    assert sum(line["loss"] for line in lines[-3:]) / 3 < lines[0]["loss"] - 1.5

    rows = mixture_of(prefix, row_tokens=WINDOW_TOKENS).train
    count = len(rows.rows_of(0))
    assert count <= 2 * STEPS  # so the run saw everything at least once
    trained = Shard(prefix).column("trained_tokens")
    assert sum(trained[window] for n in range(count) for window in rows.row_at(n)) == report.trained_tokens
    for number, line in enumerate(lines):
        windows = [window for position in (2 * number, 2 * number + 1) for window in rows.row_at(position)]
        assert line["trained_tokens"] == sum(trained[window] for window in windows)

    exported = load_tokenizer(folder / "hugging_face")
    assert exported.sha256 == tokenizer.sha256
