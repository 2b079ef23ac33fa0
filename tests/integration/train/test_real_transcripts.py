"""Real transcripts that nobody here wrote, from their files to exported weights, in every layout."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.data.mixture import Mixture
from megatron_klong.data.preprocess import preprocess
from megatron_klong.data.shard import Shard
from megatron_klong.model.conversion.random_weights import write_tiny_model
from megatron_klong.train.metrics import read_metrics
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.importers import read_transcripts, transcript_files
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from tests.integration.train.launcher import finish, start
from tests.unit.train.builders import mixture_of

STEPS = 20
WINDOW_TOKENS = 4608  # tools and task of the longest one take 3,700
VOCABULARY_SIZE = 4096
FLAGS = ["--steps", str(STEPS), "--row_tokens", str(WINDOW_TOKENS), "--global_batch_rows", "2"]
FLAGS += ["--optimizer.learning_rate", "5e-3", "--optimizer.warmup_steps", "2", "--window_multiple", "4"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    prefix: Path
    weights: Path
    folder: Path
    tokenizer: Tokenizer
    lines: list[dict[str, Any]]


def texts(source: Path) -> list[str]:
    found = [item for file in transcript_files(source) for item in read_transcripts(file)]
    assert all(isinstance(item, Transcript) for item in found)
    return [message.content for item in found if isinstance(item, Transcript) for message in item.messages]


@pytest.fixture(scope="module")
def trained(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two data-parallel processes; one of the five transcripts is held out."""
    root = tmp_path_factory.mktemp("real")
    source = shared_data / "trajectories" / "openai_messages"
    train_tokenizer(texts(source), vocabulary_size=VOCABULARY_SIZE, folder=root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    policy = ContextPolicy(
        max_tokens=WINDOW_TOKENS,
        reserve_tokens=WINDOW_TOKENS // 8,
        keep=WINDOW_TOKENS // 8,
        pin="reading",
        prefix_cap_tokens=WINDOW_TOKENS // 2,
    )
    prefix = root / "shards" / "real"
    report = preprocess([source], prefix, tokenizer, policy)
    assert (report.transcripts, report.turns, report.refusals) == (5, 88, [])
    assert report.trained_tokens == report.trainable_tokens
    assert not report.dropped_tokens
    # random weights of a run's own would be others in another layout
    weights = root / "weights"
    write_tiny_model(weights, seed=1, vocabulary_size=tokenizer.vocabulary_size, mtp=False, qk_norm=False)
    folder = root / "run"
    flags = [*FLAGS, "--hugging_face_init", str(weights), "--validation_share", "0.1", "--validate_every_steps", "10"]
    finish(start(prefix, folder, *flags), timeout_seconds=400)
    return Trained(prefix=prefix, weights=weights, folder=folder, tokenizer=tokenizer, lines=read_metrics(folder))


@pytest.mark.long
def test_they_train_and_every_trained_token_is_accounted_for(trained: Trained) -> None:
    before, *lines = trained.lines
    assert before.keys() == {"step", "validation_loss", "validation_loss_first", "validation_loss_continuation"}
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "grad_norm"))
    assert abs(lines[0]["loss"] - math.log(trained.tokenizer.vocabulary_size)) < 0.5
    assert sum(line["loss"] for line in lines[-3:]) / 3 < lines[0]["loss"] - 1.5

    mixture = open_held_out(trained.prefix)
    blend = mixture.train
    count = len(blend.rows_of(0))
    assert count <= 2 * STEPS  # so the run saw everything at least once
    shard = Shard(trained.prefix)
    everything = int(shard.column("trained_tokens").sum())
    assert mixture.validation is not None
    assert sum(part.trained_tokens for part in (*blend.parts, *mixture.validation.parts)) == everything
    for number, line in enumerate(lines):
        windows = [window for position in (2 * number, 2 * number + 1) for window in blend.row_at(position)]
        assert line["trained_tokens"] == blend.trained_tokens[windows].sum()
        assert line["prefix_share"] == pytest.approx(blend.prefix_tokens[windows].sum() / line["tokens"])

    exported = load_tokenizer(trained.folder / "hugging_face")
    assert exported.sha256 == trained.tokenizer.sha256


@pytest.mark.long
def test_the_loss_of_a_transcript_that_was_held_out_falls_before_and_behind_the_first_cut(trained: Trained) -> None:
    measured = [line for line in trained.lines if "validation_loss" in line]
    assert [line["step"] for line in measured] == [0, 10, 20]
    for name in ("validation_loss", "validation_loss_first", "validation_loss_continuation"):
        assert measured[-1][name] < measured[0][name] - 1.0, name


def open_held_out(prefix: Path) -> Mixture:
    return mixture_of(prefix, row_tokens=WINDOW_TOKENS, window_multiple=4, validation_share=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "expert", "context"])
def test_every_layout_takes_the_same_course(layout: str, trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [*FLAGS, "--hugging_face_init", str(trained.weights), "--validation_share", "0.1"]
    flags += [f"--layout.{layout}_parallel", "2", "--export_hugging_face", "false"]
    finish(start(trained.prefix, folder, *flags), timeout_seconds=400)
    course = {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}
    assert course == pytest.approx({line["step"]: line["loss"] for line in trained.lines[1:]}, rel=1e-3)
