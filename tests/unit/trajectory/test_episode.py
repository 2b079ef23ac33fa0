"""Episode records: they round-trip, and a reader refuses what it does not know."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings

from megatron_klong.trajectory.episode import (
    EpisodeError,
    EpisodeRecord,
    MessageRecord,
    PolicyRecord,
    TurnRecord,
    read_episode,
    write_episode,
)
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.replay import prompt_fingerprints, replay
from megatron_klong.trajectory.schema import Message, Transcript
from tests.unit.trajectory.builders import assistant, bash, byte_tokenizer, policy, tool, transcript, transcripts, user

RENDERER = GlmRenderer(byte_tokenizer())
MADE = transcript(user("t"), *(m for n in range(6) for m in (assistant(calls=[bash(f"{n}")]), tool(f"r{n}"))))


def record(made: Transcript = MADE) -> EpisodeRecord:
    rule = policy(120, reserve=40, keep=40)
    prompts = list(prompt_fingerprints(made, RENDERER, rule))
    return EpisodeRecord(
        task="t",
        model="m",
        epoch=1,
        ending="finished",
        error=None,
        score=0.5,
        seconds=1.0,
        windows=1 + max((prompt.window for prompt in prompts), default=-1),
        messages=[MessageRecord.of(message) for message in made.messages],
        tools=list(map(dict, made.tools)),
        turns=[
            TurnRecord(
                window=prompt.window,
                prompt_tokens=prompt.tokens,
                prompt_sha256=prompt.sha256,
                model_seconds=0,
                given_back_seconds=0,
            )
            for prompt in prompts
        ],
        context=PolicyRecord.of(rule),
        tokenizer_sha256="bytes",
        log="l.eval",
        sample="s",
    )


@settings(max_examples=50)
@given(made=transcripts())
def test_records_round_trip_through_their_file(made: Transcript, tmp_path_factory: pytest.TempPathFactory) -> None:
    written = record(made)
    path = write_episode(written, tmp_path_factory.mktemp("records"))
    assert path.name == "t__m__1.episode.json"
    again = read_episode(path)
    assert again == written
    assert again.transcript("x").messages == made.messages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ({"format": "other"}, "format: Input should be 'klong-episode'"),
        ({"version": 2}, "version: Input should be 1"),
        ({"turns": [{}]}, r"turns\.0\.window: Field required"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ],
)
def test_what_it_does_not_know_is_refused_by_field(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "a.episode.json"
    whole = json.loads(record().model_dump_json())
    file.write_text(content if isinstance(content, str) else json.dumps({**whole, **content}))  # type: ignore[dict-item]
    with pytest.raises(EpisodeError, match=message) as caught:
        read_episode(file)
    assert str(file) in str(caught.value)


def test_replay_finds_the_turn_whose_prompt_differs() -> None:
    whole = record()
    assert replay(whole, RENDERER).agrees
    changed = [*whole.messages]
    changed[8] = MessageRecord.of(Message(role=changed[8].role, content="another result"))
    result = replay(whole.model_copy(update={"messages": changed}), RENDERER)
    # Message 8 is the result of turn 3: the prompts from turn 4 on that still show it differ.
    assert result.mismatches[0] == 4
    missing = replay(whole.model_copy(update={"turns": whole.turns[:-1]}), RENDERER)
    assert missing.mismatches == (5,)


def test_replay_wants_the_same_tokenizer() -> None:
    with pytest.raises(ValueError, match="recorded with tokenizer other"):
        replay(record().model_copy(update={"tokenizer_sha256": "other"}), RENDERER)


def test_what_was_not_recorded_is_not_compared() -> None:
    whole = record()
    for missing in ("context", "tokenizer_sha256"):
        result = replay(whole.model_copy(update={missing: None}), RENDERER)
        assert (result.turns, result.windows, result.agrees) == (0, 0, True)
    unsent = TurnRecord(window=None, prompt_tokens=0, prompt_sha256="", model_seconds=0, given_back_seconds=0)
    result = replay(whole.model_copy(update={"turns": [unsent, *whole.turns]}), RENDERER)
    assert (result.turns, result.mismatches) == (len(whole.turns), ())
