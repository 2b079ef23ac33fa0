"""Sources opened and divided: nothing of a held-out task is trained, whoever brings it."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_klong.data.blend import Blend
from megatron_klong.data.mixture import open_mixture
from megatron_klong.data.shard import ShardError, ShardWriter
from megatron_klong.data.sources import ShardSource, SourceConfig
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.windows import split
from tests.unit.trajectory.builders import assistant, bash, byte_tokenizer, policy, tool, transcript, user


def shard(prefix: Path, tasks: list[str]) -> SourceConfig:
    """A transcript a task, of two to four windows."""
    renderer, rule = GlmRenderer(byte_tokenizer()), policy(200)
    with ShardWriter(prefix, byte_tokenizer(), rule, renderer=renderer.name, overwrite=False) as writer:
        for number, task in enumerate(tasks):
            turns = [m for n in range(8 + number % 4) for m in (assistant(calls=[bash(f"{task} {n}")]), tool(f"{n}"))]
            made = replace(transcript(user(f"do {task}"), *turns, assistant("done")), task=task)
            rendered = renderer.transcript(made)
            writer.add(made, rendered, split(rendered, rule))
    return SourceConfig(shards=(str(prefix),))


def text_of(side: Blend) -> bytes:
    """All tokens of the windows, which are bytes here."""
    return b" ".join(
        bytes(int(token) % 256 for token in part.source.window(int(number)).ids)
        for part in side.parts
        for number in part.windows
    )


def test_a_held_out_task_is_trained_by_no_source(tmp_path: Path) -> None:
    tasks = [f"t{number:03}" for number in range(40)]
    configs = {
        "code": shard(tmp_path / "code", tasks[:30]),
        "more": shard(tmp_path / "more", tasks[10:]).model_copy(update={"validation_share": 0.0}),
    }
    made = open_mixture(configs, row_tokens=256, seed=0, validation_share=0.2)
    assert made.validation is not None
    keys = [
        {(part.name, part.source.keys[int(part.source.document[n])]) for part in side.parts for n in part.windows}
        for side in (made.train, made.validation)
    ]
    trained, held = ({key for _, key in side} for side in keys)
    assert not trained & held
    assert trained | held == {f"task:{task}" for task in tasks}
    assert 3 <= len(held & {f"task:{task}" for task in tasks[:30]}) <= 12
    # what code holds out of the tasks that both have is measured on more's windows too
    shared = {key for name, key in keys[1] if name == "more"}
    assert shared == {key for key in held if key in {f"task:{task}" for task in tasks[10:30]}}
    windows = sum(len(ShardSource(config.shards)) for config in configs.values())
    assert len(made.train) + len(made.validation) == windows


def test_a_source_may_be_for_validation_alone(tmp_path: Path) -> None:
    configs = {
        "train": shard(tmp_path / "train", ["a", "b", "c"]),
        "held": shard(tmp_path / "held", ["b", "z"]).model_copy(update={"validation_share": 1.0}),
    }
    made = open_mixture(configs, row_tokens=256, seed=0)
    assert [part.name for part in made.train.parts] == ["train"]
    assert made.validation is not None
    assert b"do b" not in text_of(made.train)
    assert b"do a" in text_of(made.train)
    assert [part.name for part in made.validation.parts] == ["train", "held"]


def test_without_a_share_nothing_is_held_out(tmp_path: Path) -> None:
    made = open_mixture({"a": shard(tmp_path / "a", ["x", "y"])}, row_tokens=256, seed=0)
    assert made.validation is None
    assert made.vocabulary_size == byte_tokenizer().vocabulary_size


def test_a_source_that_is_held_out_whole_by_accident_is_named(tmp_path: Path) -> None:
    configs = {"a": shard(tmp_path / "a", ["x"]), "b": shard(tmp_path / "b", ["y"])}
    with pytest.raises(ShardError, match="nothing in it is to be trained, or all of its tasks are held out"):
        open_mixture(configs, row_tokens=256, seed=0, validation_share=0.5)
