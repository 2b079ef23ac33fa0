"""Merging: the shard that all input would have made at once, or a refusal that names what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_klong.data.loss_on import LossOn
from megatron_klong.data.merge import merge_shards
from megatron_klong.data.preprocess import merge, preprocess
from megatron_klong.data.shard import Shard, ShardError, ShardWriter
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.tokenizer import Tokenizer
from megatron_klong.trajectory.windows import split
from tests.unit.data import builders
from tests.unit.data.test_shard import MADE, TOKENIZER
from tests.unit.trajectory.builders import policy, transcript, user

RULE = policy(120, reserve=40, keep=40)
NOT_ONE_WINDOW = transcript(user("only a task"))


def write(
    prefix: Path,
    made: list[Transcript],
    *,
    tokenizer: Tokenizer = TOKENIZER,
    rule: ContextPolicy = RULE,
    loss_on: LossOn = "new",
    **how: int,
) -> Path:
    renderer = GlmRenderer(tokenizer)
    with ShardWriter(
        prefix,
        tokenizer,
        rule,
        renderer=renderer.name,
        overwrite=False,
        loss_on=loss_on,
        **how,  # type: ignore[arg-type]
    ) as shard:
        for item in made:
            rendered = renderer.transcript(item)
            shard.add(item, rendered, split(rendered, rule))
    return prefix


@pytest.mark.parametrize(
    "pieces", [[[MADE], [MADE, MADE]], [[], [MADE], [NOT_ONE_WINDOW], [], [MADE, MADE]], [[MADE] * 3]]
)
def test_merged_is_what_one_writer_would_have_written(tmp_path: Path, pieces: list[list[Transcript]]) -> None:
    parts = [write(tmp_path / f"part{n}", made) for n, made in enumerate(pieces)]
    whole = write(tmp_path / "whole", [item for made in pieces for item in made])
    merge_shards(parts, tmp_path / "merged", overwrite=False)
    for suffix in builders.SUFFIXES[:-1]:
        made, expected = (prefix.with_name(prefix.name + suffix) for prefix in (tmp_path / "merged", whole))
        assert made.read_bytes() == expected.read_bytes(), suffix
    merged, read = Shard(tmp_path / "merged"), Shard(whole)
    assert len(merged) == len(read) > 3
    for number in range(len(read)):
        np.testing.assert_array_equal(merged.window(number).ids, read.window(number).ids)


def test_shards_made_apart_and_merged_equal_one_made_at_once(tmp_path: Path) -> None:
    source = builders.write_inputs(tmp_path / "in", files=4, rows_of_large=3)
    files = sorted(source.iterdir())
    for name, inputs in (("a", files[:3]), ("b", files[3:]), ("whole", files)):
        preprocess(inputs, tmp_path / name, TOKENIZER, RULE)
    report = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert builders.content(tmp_path / "merged") == builders.content(tmp_path / "whole")
    assert (report.transcripts, report.files, len(report.refusals)) == (7, 7, 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rule": policy(140, reserve=40, keep=40)}, "b: another context policy than"),
        ({"loss_on": "window"}, r"b: another loss_on than .* \(window instead of new\)"),
        ({"vocabulary_size": 70_000}, "b: tokens of another type than"),
        ({"vocabulary_size": 300}, "b: another vocabulary size than"),
    ],
)
def test_shards_that_differ_are_refused_with_what_differs(
    tmp_path: Path, other: dict[str, object], message: str
) -> None:
    first, second = write(tmp_path / "a", [MADE]), write(tmp_path / "b", [MADE], **other)  # type: ignore[arg-type]
    with pytest.raises(ShardError, match=message):
        merge_shards([first, second], tmp_path / "merged", overwrite=False)
    assert not list(tmp_path.glob("merged*"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", [MADE]), write(tmp_path / "b", [MADE])
    file = tmp_path / "b.manifest.json"
    manifest = json.loads(file.read_text())
    manifest["tokenizer"]["sha256"] = "others"
    file.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"another tokenizer than .* preprocess one of them again"):
        merge_shards([first, second], tmp_path / "merged", overwrite=False)


@pytest.mark.parametrize("suffix", builders.SUFFIXES[:4])
def test_a_damaged_part_is_named_and_what_was_there_stays(tmp_path: Path, suffix: str) -> None:
    parts = [write(tmp_path / "a", [MADE]), write(tmp_path / "b", [MADE])]
    merge_shards(parts[:1], tmp_path / "merged", overwrite=False)
    file = tmp_path / f"b{suffix}"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ShardError, match=f"b{suffix}: checksum differs"):
        merge_shards(parts, tmp_path / "merged", overwrite=True)
    assert len(Shard(tmp_path / "merged").documents) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_nothing_to_merge_and_merging_into_oneself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no shard to merge"):
        merge_shards([], tmp_path / "m", overwrite=False)
    shard = write(tmp_path / "a", [MADE])
    with pytest.raises(ShardError, match="is one of the shards to merge"):
        merge_shards([shard], tmp_path / "a", overwrite=True)
    assert len(Shard(shard).documents) == 1


def test_the_program_merges_and_replaces_only_when_told(tmp_path: Path) -> None:
    source = builders.write_inputs(tmp_path / "in", files=2, rows_of_large=1)
    for name in ("a", "b"):
        preprocess([source], tmp_path / name, TOKENIZER, RULE)
    command = ("--merge", tmp_path / "a", tmp_path / "b", "--output-prefix", tmp_path / "m", "--json")
    made = builders.run(*command)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["transcripts"] == len(Shard(tmp_path / "m").documents) == 6
    again = builders.run(*command)
    assert again.returncode == 2
    assert "m.bin: exists already" in again.stderr
    assert builders.run(*command, "--overwrite").returncode == 0
    (tmp_path / "b.report.json").unlink()
    lacking = builders.run(*command, "--overwrite")
    assert lacking.returncode == 2
    assert "b.report.json: not the report of a shard" in lacking.stderr
