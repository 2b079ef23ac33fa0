"""The ablation's windows: each variant lacks the one thing it is named for, and nothing else."""

import pytest

from examples.longhaul.ablation.experiment import make_tokenizer
from examples.longhaul.ablation.losses import answers, fact_ids, is_last, late_windows
from examples.longhaul.ablation.transcripts import TASK, transcripts
from examples.longhaul.ablation.variants import POLICY, Variant, write_shard
from megatron_klong.data.shard import Shard
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.tokenizer import Tokenizer

COUNT = 12


def made_transcripts() -> list[Transcript]:
    return list(transcripts(COUNT, seed="windows"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, Shard]:
    folder = tmp_path_factory.mktemp("shards")
    for variant in Variant:
        write_shard(folder / variant, made_transcripts(), tokenizer, variant)
    return {variant: Shard(folder / variant) for variant in Variant}


def places(shard: Shard, windows: list[int], tokenizer: Tokenizer) -> set[str]:
    facts = fact_ids(tokenizer)
    return {answer.place for window in windows for answer in answers(shard, window, facts)}


def texts(shard: Shard, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(shard.window(number).ids.tolist()) for number in range(len(shard))]


def test_transcripts_have_four_to_eight_windows(shards: dict[Variant, Shard]) -> None:
    split = shards[Variant.SPLIT]
    counts = [split.column("document").tolist().count(document) for document in range(COUNT)]
    assert all(4 <= count <= 8 for count in counts), counts


def test_split_holds_every_late_answer_in_prefix_history_or_window(
    shards: dict[Variant, Shard], tokenizer: Tokenizer
) -> None:
    split = shards[Variant.SPLIT]
    assert places(split, late_windows(split), tokenizer) == {"prefix", "overlap", "new"}


def test_without_prefix_the_answers_of_the_paper_are_absent(shards: dict[Variant, Shard], tokenizer: Tokenizer) -> None:
    bare = shards[Variant.NO_PREFIX]
    late = late_windows(bare)
    assert places(bare, late, tokenizer) == {"overlap", "new", "absent"}
    assert not any("\nset" in texts(bare, tokenizer)[window] for window in late)


def test_without_overlap_what_was_logged_before_the_cut_is_absent(
    shards: dict[Variant, Shard], tokenizer: Tokenizer
) -> None:
    cut = shards[Variant.NO_OVERLAP]
    assert places(cut, late_windows(cut), tokenizer) >= {"prefix", "new", "absent"}
    settings = [sum(message.content.count("set ") for message in made.messages) for made in made_transcripts()]
    assert [text.count("\nset") for text in texts(cut, tokenizer)] == [
        settings[document] for document in cut.column("document")
    ]
    # of the history nothing but the newest turn
    assert all(0 < int(cut.column("overlap_tokens")[window]) < 26 for window in late_windows(cut))


def test_truncations_are_the_first_and_the_last_window_and_train_all_of_it(
    shards: dict[Variant, Shard], tokenizer: Tokenizer
) -> None:
    split, whole = shards[Variant.SPLIT], texts(shards[Variant.SPLIT], tokenizer)
    first = [number for number in range(len(split)) if number not in late_windows(split)]
    last = [number for number in range(len(split)) if is_last(split, number)]
    assert texts(shards[Variant.HEAD], tokenizer) == [whole[number] for number in first]
    assert texts(shards[Variant.TAIL], tokenizer) == [whole[number] for number in last]
    tail = shards[Variant.TAIL]
    for number, kept in enumerate(last):
        trained, once = tail.window(number).loss_mask.sum(), split.window(kept).loss_mask.sum()
        assert trained > once
        assert trained == tail.column("trained_tokens")[number]


def test_no_window_is_longer_than_the_policy_allows_and_all_begin_with_the_task(
    shards: dict[Variant, Shard], tokenizer: Tokenizer
) -> None:
    for shard in shards.values():
        assert all(len(shard.window(number).ids) <= POLICY.max_tokens for number in range(len(shard)))
        assert all(text.startswith(f"[gMASK]<sop><|user|>\n{TASK}") for text in texts(shard, tokenizer))


def test_every_word_and_every_fact_is_one_token(tokenizer: Tokenizer) -> None:
    for made in transcripts(COUNT, seed="words"):
        for message in made.messages:
            for line in message.content.splitlines():
                if line.startswith(("set", "log", "say", "ask")):
                    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in line.split()[1:])
