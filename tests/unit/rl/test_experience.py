"""From the bank to what the trainer is given: ids as sampled, advantages and weights by hand, rows that hold them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.config import Duration
from megatron_klong.model.presets import tiny
from megatron_klong.rl.bank import BankWriter
from megatron_klong.rl.bank_index import BankError, Iteration
from megatron_klong.rl.config import PolicyLossConfig, RlConfig, StageConfig, TrainerConfig
from megatron_klong.rl.experience import NO_SIGNAL, prepare
from megatron_klong.rl.rows import ExperienceRows
from megatron_klong.rl.sampled_turns import by_segment
from megatron_klong.serve.config import EngineConfig
from megatron_klong.serve.turns import SampledTurn, TurnStore
from megatron_klong.trajectory.episode import EpisodeRecord, MessageRecord, PolicyRecord, TurnRecord
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Message, Role
from tests.unit.trajectory.builders import byte_tokenizer, policy, sampled, tool, user

RENDERER = GlmRenderer(byte_tokenizer())
ITERATION = Iteration(stage="s", number=0)
RULE = policy(160, reserve=30, keep=60, pin="task")


@dataclass(frozen=True)
class Played:
    """An episode to be banked: replies as text and the role token that ended them; None: cut by its length."""

    task: str
    rollout: int
    score: float | None
    replies: Sequence[tuple[str, str | None]]
    ending: str = "finished"


def record_and_turns(played: Played) -> tuple[EpisodeRecord, TurnStore]:
    store = TurnStore()
    messages = [user("task")]
    turns = []
    for number, (text, end) in enumerate(played.replies):
        reply = sampled(text, end)
        ids = reply.body if reply.end is None else (*reply.body, reply.end)
        key = f"{played.task}-{played.rollout}-{number}"
        store.add(
            SampledTurn(
                key=key,
                prompt_tokens=10,
                prompt_sha256="",
                ids=ids,
                log_probs=tuple(-0.01 * (played.rollout + number + place) for place in range(len(ids))),
                stopped=reply.end is not None,
                policy_epoch=((0, 3), (12, 4)),
            )
        )
        messages += [Message(role=Role.ASSISTANT, content=text, sampled=reply), tool(f"result {number}")]
        turns.append(
            TurnRecord(key=key, window=0, prompt_tokens=1, prompt_sha256="", model_seconds=0.0, given_back_seconds=0.0)
        )
    record = EpisodeRecord(
        task=played.task,
        model="policy",
        epoch=played.rollout,
        ending=played.ending,
        error=None,
        score=played.score,
        seconds=1.0,
        windows=1,
        messages=[MessageRecord.of(message) for message in messages],
        tools=[],
        turns=turns,
        context=PolicyRecord.of(RULE),
        tokenizer_sha256="bytes",
        log="l",
        sample="s",
    )
    return record, store


def config(folder: Path, updates: int = 1) -> RlConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny(300).to_hugging_face()))
    stage = StageConfig(
        name="s",
        timeout=Duration("20m"),
        hard_timeout=Duration("30m"),
        iterations=1,
        tasks_per_iteration=4,
        rollouts_per_task=2,
        updates_per_iteration=updates,
    )
    return RlConfig(
        weights=str(folder),
        tasks="t",
        stages=(stage,),
        loss=PolicyLossConfig(normalise="per_trajectory"),
        engine=EngineConfig(max_sequence_length=131072),
        trainer=TrainerConfig(row_tokens=131072),
    )


def bank(folder: Path, episodes: Sequence[Played]) -> None:
    with BankWriter(folder, checkpoint_step=0) as writer:
        for played in episodes:
            record, turns = record_and_turns(played)
            writer.add(ITERATION, record, by_segment(record, turns, RENDERER))


def lesson_of(folder: Path, episodes: Sequence[Played], updates: int = 1):  # type: ignore[no-untyped-def]
    bank(folder / "bank", episodes)
    with BankWriter(folder / "bank", checkpoint_step=0) as writer:
        banked = writer.contents.episodes[ITERATION]
    run = config(folder / "weights", updates)
    return prepare(folder / "bank", banked, folder / "iteration", RENDERER, run, step=5)


TWO_GROUPS = [
    Played("a", 1, 0.9, [("one", "<|observation|>"), ("two", "<|observation|>")]),
    Played("b", 1, 0.2, [("same", "<|observation|>")]),
    Played("a", 2, 0.3, [("three", "<|user|>"), ("fourfour", None)]),
    Played("b", 2, 0.2, [("same", "<|observation|>")]),
]


def test_log_probabilities_and_epochs_follow_their_tokens_into_segments() -> None:
    record, turns = record_and_turns(TWO_GROUPS[2])
    segments = by_segment(record, turns, RENDERER)
    rendered = RENDERER.transcript(record.transcript("x")).segments
    assert [rendered[segment.segment].kind.name for segment in segments] == ["ANSWER", "SAMPLED_END", "ANSWER"]
    assert [segment.ids.tolist() for segment in segments] == [
        list(b"three"),
        [byte_tokenizer().control["<|user|>"]],
        list(b"fourfour"),
    ]
    # prompt of 10 tokens: token 12 of prompt and reply, where the fourth policy takes over, is the reply's third
    assert segments[0].epochs.tolist() == [3, 3, 4, 4, 4]
    assert segments[1].log_probs.tolist() == pytest.approx([-0.01 * (2 + 0 + 5)])
    assert segments[2].log_probs.tolist() == pytest.approx([-0.01 * (2 + 1 + place) for place in range(8)])


def test_a_group_that_scored_the_same_teaches_nothing_and_is_counted(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path, TWO_GROUPS)
    (update,) = lesson.updates
    # baseline of a: (0.9 + 0.3) / 2; weights: all tokens / (2 rollouts * own tokens)
    tokens = (3 + 1 + 3 + 1, 5 + 1 + 8)
    assert [taught.document for taught in update.documents] == [0, 2]
    assert [taught.advantage for taught in update.documents] == pytest.approx([0.3, -0.3])
    assert [taught.weight for taught in update.documents] == pytest.approx([sum(tokens) / (2 * n) for n in tokens])
    assert lesson.left_out == {NO_SIGNAL: 2}
    assert (lesson.first_step, lesson.last_step) == (5, 6)
    assert (lesson.episodes, lesson.scored, lesson.trained_tokens) == (4, 4, sum(tokens))
    assert lesson.mean_score == pytest.approx(0.4)
    assert lesson.windows == 1 + 1 + 2 + 1  # the turn that was ended for another role ends its window


def test_updates_share_the_groups_and_none_is_empty(tmp_path: Path) -> None:
    episodes = [Played(task, n, 0.1 * n, [("go", "<|observation|>")]) for task in "abc" for n in (1, 2)]
    lesson = lesson_of(tmp_path, episodes, updates=2)
    assert [[taught.document for taught in update.documents] for update in lesson.updates] == [[0, 1, 4, 5], [2, 3]]
    nothing = lesson_of(tmp_path / "other", [Played("a", n, 0.5, [("go", None)]) for n in (1, 2)], updates=2)
    assert nothing.updates == ()
    assert nothing.last_step == 5


def test_episodes_out_of_the_loss_are_counted_under_their_reason(tmp_path: Path) -> None:
    episodes = [
        Played("a", 1, 0.0, [("x", None)]),
        Played("a", 2, 1.0, [("y", None)]),
        Played("a", 3, None, [("z", None)], ending="hard_timed_out"),
        Played("a", 4, 0.5, []),
    ]
    lesson = lesson_of(tmp_path, episodes)
    assert lesson.left_out == {"ending": 1, "no_windows": 1}
    assert [taught.advantage for taught in lesson.updates[0].documents] == pytest.approx([-0.5, 0.5])
    assert lesson.endings == {"finished": 3, "hard_timed_out": 1}


def test_ids_that_are_not_those_of_the_transcript_are_refused(tmp_path: Path) -> None:
    record, turns = record_and_turns(TWO_GROUPS[0])
    segments = by_segment(record, turns, RENDERER)
    segments[1].ids[0] += 1
    with BankWriter(tmp_path / "bank", checkpoint_step=0) as writer:
        banked = writer.add(ITERATION, record, segments)
    with pytest.raises(BankError, match=r"segment \d+ of its transcript is not what was sampled"):
        prepare(tmp_path / "bank", [banked], tmp_path / "i", RENDERER, config(tmp_path / "w"), step=0)


replies = st.lists(
    st.tuples(
        st.text("ab c", min_size=1, max_size=40),
        st.sampled_from(["<|observation|>", "<|user|>", "<|endoftext|>", None]),
    ),
    max_size=6,
)


@settings(max_examples=25)
@given(st.lists(replies, min_size=2, max_size=5), st.integers(1, 3))
def test_each_sampled_token_is_the_label_of_one_place_with_its_own_figures(
    tmp_path_factory: pytest.TempPathFactory, episodes: list[list[tuple[str, str | None]]], parts: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    played = [Played("a", n + 1, 0.1 * n, texts) for n, texts in enumerate(episodes)]
    lesson = lesson_of(folder, played)
    rows = ExperienceRows(folder / "bank", folder / "iteration", row_tokens=200)
    for update in lesson.updates:
        shares = [rows.batches(update, part=part, parts=parts) for part in range(parts)]
        assert len({len(share) for share in shares}) == 1
        found = []
        for batch in (batch for share in shares for batch in share):
            assert batch.advantages is not None
            assert batch.token_weights is not None
            assert batch.rollout_log_probs is not None
            columns = (batch.labels, batch.advantages, batch.token_weights, batch.rollout_log_probs)
            found += list(zip(*(column[batch.loss_mask].tolist() for column in columns), strict=True))
            assert not torch.isnan(batch.rollout_log_probs).any()
        expected = []
        for taught in update.documents:
            record, turns = record_and_turns(played[taught.document])
            for segment in by_segment(record, turns, RENDERER):
                for token, log_prob in zip(segment.ids, segment.log_probs, strict=True):
                    expected.append((int(token), taught.advantage, taught.weight, float(log_prob)))
        assert np.allclose(sorted(found), sorted(expected), atol=1e-6)
