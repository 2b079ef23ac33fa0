"""A finished iteration of the bank -> what the trainer is given: its transcripts as a shard, and a lesson.

    ITERATION/shard.*        document n is episode n of the iteration, cut into the windows it was played in
    ITERATION/lesson.json    advantage and weight of each document, which documents each update is made of

Both are made anew from the bank whenever the iteration is trained: nothing is read from them but by that training.
Always (tests/unit/rl/test_experience.py): the ids that stand in the shard where tokens were sampled are the sampled
ids, else it is an error; an episode that is not trained on is counted under the reason why.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.config import Config
from megatron_klong.data.shard import ShardWriter
from megatron_klong.files import write_atomically
from megatron_klong.model.config import ModelConfig
from megatron_klong.rl.advantages import GroupAdvantages, Rollout, group_advantages
from megatron_klong.rl.bank import read_record, read_sampled
from megatron_klong.rl.bank_index import BankedEpisode, BankError, Iteration
from megatron_klong.rl.config import Normalise, RlConfig
from megatron_klong.rl.normalisation import TrainedRollout, token_weights
from megatron_klong.rl.sampled import SampledSegment
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.segments import RenderedTranscript
from megatron_klong.trajectory.windows import split

SHARD, LESSON = "shard", "lesson.json"
NO_SIGNAL = "no_signal"  # all rollouts of the group scored the same: nothing to tell them apart by


class Taught(Config):
    """One document that is trained on; weight: of its tokens, see megatron_klong.rl.normalisation."""

    document: int
    advantage: float
    weight: float


class Update(Config):
    """One update of the weights, on the rollouts of whole groups."""

    documents: tuple[Taught, ...]


class Lesson(Config):
    """What one iteration teaches, and its figures. first_step: updates before it."""

    iteration: Iteration
    timeout_seconds: float
    first_step: int
    updates: tuple[Update, ...]
    episodes: int
    scored: int
    mean_score: float | None
    standard_error: float | None
    mean_turns: float
    windows: int
    trained_tokens: int
    endings: dict[str, int]
    left_out: dict[str, int]

    @property
    def last_step(self) -> int:
        return self.first_step + len(self.updates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """An episode as the shard holds it."""

    episode: BankedEpisode
    windows: int
    trained_tokens: int
    turns: int


def prepare(
    bank: Path, episodes: Sequence[BankedEpisode], folder: Path, renderer: GlmRenderer, config: RlConfig, *, step: int
) -> Lesson:
    """Write shard and lesson of an iteration into `folder`; step: of the present weights. Raises BankError."""
    documents = write_shard(bank, episodes, folder / SHARD, renderer, config)
    lesson = make_lesson(documents, config, step=step)
    write_atomically(folder / LESSON, lesson.model_dump_json(indent=1) + "\n")
    return lesson


def read_lesson(folder: Path) -> Lesson:
    """What `prepare` wrote."""
    return Lesson.model_validate_json((folder / LESSON).read_bytes())


def write_shard(
    bank: Path, episodes: Sequence[BankedEpisode], prefix: Path, renderer: GlmRenderer, config: RlConfig
) -> list[Document]:
    """Render and cut the transcripts of an iteration, in document order."""
    documents = []
    policy = config.episode.context.policy
    vocabulary = ModelConfig.from_hugging_face(config.weights).vocab_size
    with ShardWriter(
        prefix, renderer.tokenizer, policy, renderer=renderer.name, overwrite=True, vocabulary_size=vocabulary
    ) as shard:
        for episode in sorted(episodes, key=lambda episode: episode.document):
            record = read_record(bank, episode)
            transcript = record.transcript(episode.record.path)
            rendered = renderer.transcript(transcript)
            _check_ids(rendered, read_sampled(bank, episode), episode)
            plan = split(rendered, record.context.policy() if record.context else policy)
            shard.add(transcript, rendered, plan)
            documents.append(
                Document(
                    episode=episode,
                    windows=len(plan.windows),
                    trained_tokens=sum(window.trained_tokens for window in plan.windows),
                    turns=transcript.turns,
                )
            )
    return documents


def _check_ids(rendered: RenderedTranscript, sampled: Iterable[SampledSegment], episode: BankedEpisode) -> None:
    """No token is trained that was not sampled, and none other than as it was."""
    segments = rendered.segments
    expected = {number: segment.ids for number, segment in enumerate(segments) if segment.trained}
    found = {segment.segment: segment.ids.tolist() for segment in sampled}
    if expected != found:
        number = min(number for number in {*expected, *found} if expected.get(number) != found.get(number))
        raise BankError(
            f"{episode.record.path}: segment {number} of its transcript is not what was sampled; it was recorded by "
            "another version of this program, or with another tokenizer"
        )


def make_lesson(documents: Sequence[Document], config: RlConfig, *, step: int) -> Lesson:
    """Advantages of every group, and the groups that teach something shared out among the updates."""
    iteration = documents[0].episode.iteration
    stage = config.stage(iteration.stage)
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.episode.task, []).append(document)
    left_out: Counter[str] = Counter()
    taught: list[list[tuple[Document, float]]] = []
    for _, group in sorted(groups.items()):
        found = _advantages(group, config)
        used = [(d, a) for d, a in zip(group, found.advantages, strict=True) if a is not None]
        left_out.update(str(reason) for reason in found.left_out if reason is not None)
        if found.has_signal and used:
            taught.append(used)
        elif used:
            left_out[NO_SIGNAL] += len(used)
    shares = [taught[n :: stage.updates_per_iteration] for n in range(stage.updates_per_iteration)]
    scores = [d.episode.score for d in documents if d.episode.score is not None]
    return Lesson(
        iteration=iteration,
        timeout_seconds=stage.timeout.in_seconds,
        first_step=step,
        updates=tuple(_update(share, config.loss.normalise) for share in shares if share),
        episodes=len(documents),
        scored=len(scores),
        mean_score=statistics.fmean(scores) if scores else None,
        standard_error=statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None,
        mean_turns=statistics.fmean(document.turns for document in documents),
        windows=sum(document.windows for document in documents),
        trained_tokens=sum(document.trained_tokens for group in taught for document, _ in group),
        endings=Counter(str(document.episode.ending) for document in documents),
        left_out=left_out,
    )


def _advantages(group: Sequence[Document], config: RlConfig) -> GroupAdvantages:
    rollouts = [
        Rollout(score=document.episode.score, windows=document.windows, ending=document.episode.ending)
        for document in group
    ]
    outcomes = config.stage(group[0].episode.iteration.stage).outcomes
    return group_advantages(rollouts, baseline=config.baseline, outcomes=outcomes)


def _update(share: Sequence[Sequence[tuple[Document, float]]], normalise: Normalise) -> Update:
    used = [pair for group in share for pair in group]
    weights = token_weights(
        [TrainedRollout(group=d.episode.task, trained_tokens=d.trained_tokens, windows=d.windows) for d, _ in used],
        normalise,
    )
    return Update(
        documents=tuple(
            Taught(document=document.episode.document, advantage=advantage, weight=weight)
            for (document, advantage), weight in zip(used, weights, strict=True)
        )
    )
