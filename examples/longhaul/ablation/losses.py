"""What a trained model makes of held-out late turns, each in the very context the live agent would have had.

That context is a window of the full policy, whatever the model was trained on. Late is what is new in a window behind
the first. Loss in nats a token, measured with teacher forcing: each token is predicted from the right ones before it.

    prefix    answers whose fact stands in the pinned prefix and nowhere else
    overlap   answers whose fact stands in the surviving history and nowhere else
    new       answers whose fact was logged in the window itself
    late      all trained tokens of late turns, the fixed phrases between the answers included
    last      answers of all three places in the last window of each transcript, the one that `tail` trains
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from numpy.typing import NDArray

from examples.longhaul.ablation.table import PLACES, Score
from examples.longhaul.ablation.transcripts import all_facts
from megatron_klong.data.shard import Shard
from megatron_klong.model.build import build_model
from megatron_klong.model.config import LayoutConfig, ModelConfig
from megatron_klong.model.hugging_face import load_hugging_face
from megatron_klong.trajectory.tokenizer import Tokenizer


class AnswerError(ValueError):
    """A vocabulary in which answers cannot be told from other tokens, or an answer that was told nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """position: of the fact that is said.  place: where it was told: prefix, overlap, new, or absent."""

    position: int
    place: str


def fact_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The id of each fact. Raises AnswerError if one is no single token."""
    encoded = [tokenizer.encode(f" {word}{kind}") for word, kind in all_facts()]
    if any(len(ids) != 1 for ids in encoded):
        raise AnswerError("a fact is more than one token; train the tokenizer with a larger vocabulary")
    return frozenset(ids[0] for ids in encoded)


def answers(shard: Shard, window: int, facts: frozenset[int]) -> Iterator[Answer]:
    """The answers that a window trains: facts that the assistant says."""
    found = shard.window(window)
    ids = found.ids.tolist()
    prefix = int(shard.column("prefix_tokens")[window])
    for position in np.flatnonzero(found.loss_mask).tolist():
        if ids[position] in facts:
            told = [place for place in range(position) if ids[place] == ids[position]]
            yield Answer(position=position, place=_place(told, prefix, found.new_start))


def _place(told: list[int], prefix: int, new_start: int) -> str:
    if not told:
        return "absent"
    if told[-1] < prefix:
        return "prefix"
    return "overlap" if told[-1] < new_start else "new"


def score(weights: Path, shard: Shard, tokenizer: Tokenizer) -> dict[str, Score]:
    """By place; `parallel.initialize` comes first. Raises AnswerError for an answer the window does not hold."""
    config = ModelConfig.from_hugging_face(weights)
    model = build_model(config, LayoutConfig())
    load_hugging_face([model], config, weights)
    model.eval()
    facts = fact_ids(tokenizer)
    collected: dict[str, list[NDArray[np.float64]]] = {place: [] for place in PLACES}
    for window in late_windows(shard):
        figures = _token_figures(model, shard.window(window).ids)
        said = list(answers(shard, window, facts))
        if any(answer.place == "absent" for answer in said):
            raise AnswerError(f"window {window} of {shard.prefix}: an answer was told nowhere in its context")
        for answer in said:
            collected[answer.place].append(figures[answer.position][None])
            if is_last(shard, window):
                collected["last"].append(figures[answer.position][None])
        collected["late"].append(figures[shard.window(window).loss_mask])
    return {place: _score(np.concatenate(parts)) for place, parts in collected.items()}


def late_windows(shard: Shard) -> list[int]:
    """Those behind the first of their transcript."""
    documents = shard.column("document").tolist()
    return [number for number in range(1, len(shard)) if documents[number] == documents[number - 1]]


def is_last(shard: Shard, window: int) -> bool:
    """Whether it is the last of its transcript."""
    documents = shard.column("document")
    return window + 1 == len(shard) or bool(documents[window + 1] != documents[window])


@torch.no_grad()
def _token_figures(model: GPTModel, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """[tokens, 2]: loss of each token, and whether it is the likeliest; the first one's are not numbers."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    logits = model(tokens, torch.arange(tokens.shape[1])[None], None)[0, :-1].double()
    labels = tokens[0, 1:]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    figures = torch.stack([losses, (logits.argmax(-1) == labels).double()], 1)
    return np.concatenate([np.full((1, 2), np.nan), figures.numpy()])


def _score(figures: NDArray[np.float64]) -> Score:
    loss, right = figures.mean(0)
    return Score(tokens=len(figures), loss=float(loss), right=float(right))
