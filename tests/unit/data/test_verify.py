"""Faults of a shard are found one by one and named; a sound one is said to be sound."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klong.data.inspect import verify_lines
from megatron_klong.data.shard import Shard, ShardError
from megatron_klong.data.verify import verify
from tests.unit.data.small_shards import MADE, PLAIN, small_shard, write
from tests.unit.trajectory.builders import policy


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return small_shard(tmp_path)


def tampered(shard: Shard, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> list[str]:
    """Change the windows or the manifest, make the checksums right again, and verify."""
    prefix = shard.prefix
    arrays = {name: shard.column(name).copy() for name in np.load(f"{prefix}.windows.npz").files}
    manifest = json.loads(Path(f"{prefix}.manifest.json").read_text())
    change(arrays, manifest)
    np.savez(f"{prefix}.windows.npz", **arrays)
    content = Path(f"{prefix}.windows.npz").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][".windows.npz"] = entry
    Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))
    return verify(prefix)[1]


def set_item(name: str, place: Any, value: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], manifest: dict[str, Any]) -> None:
        arrays[name][place] = value

    return change


def add_to(name: str, place: Any, value: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], manifest: dict[str, Any]) -> None:
        arrays[name][place] += value

    return change


def set_manifest(group: str, name: str, value: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], manifest: dict[str, Any]) -> None:
        manifest[group][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_manifest("policy", "max_tokens", 130), "window 0 of document 0: its 138 tokens exceed max_tokens 130"),
        (set_manifest("counts", "turns", 3), "10 turns in the files, 3 by the manifest"),
        (set_manifest("tokenizer", "vocabulary_size", 99), "outside the vocabulary of 99"),
        (set_item("document", 0, 7), "window 0: document 7 is not in the shard"),
        (add_to("trained_tokens", 1, 1), "tokens are to be trained by its segments"),
        (add_to("overlap_tokens", 1, 1), "tokens, its index says"),
        (add_to("new_tokens", 1, -1), "tokens are new in it, its index says"),
        (add_to("prefix_tokens", 1, 2), "its prefix ends inside a segment"),
        (add_to("prefix_tokens", 1, -3), "is shorter than the task"),
        (add_to("ranges", (1, 0), 1), "it does not start with the whole task"),
        (add_to("ranges", (2, 0), 1), "leaves out more than whole turns"),
        (set_item("ranges", (0, 1), 0), "are empty or out of order"),
        (add_to("first_new", 1, -60), "its new part starts at sequence"),
        (add_to("ranges", (2, 1), 40), "outside its document's sequences"),
    ],
)
def test_a_window_that_breaks_a_promise_is_named(
    shard: Shard, change: Callable[[dict[str, Any], dict[str, Any]], None], said: str
) -> None:
    faults = tampered(shard, change)
    assert any(said in fault for fault in faults), faults


def test_a_new_part_that_was_new_before_is_found(shard: Shard) -> None:
    def change(arrays: dict[str, Any], manifest: dict[str, Any]) -> None:
        # the second window again trains the turn it keeps as overlap
        arrays["first_new"][1] = arrays["ranges"][2, 0]
        arrays["new_tokens"][1] += arrays["overlap_tokens"][1]
        arrays["overlap_tokens"][1] = 0

    assert any("its new part starts at sequence" in fault for fault in tampered(shard, change))


_HEADER_BYTES = 34  # of the .idx


@pytest.mark.parametrize(
    ("suffix", "change", "said"),
    [
        (".idx", lambda file, n: file[:-1] + b"\x3f", "mode 63 of a sequence names no kind"),
        (".idx", lambda file, n: swap(file, _HEADER_BYTES + 4 * n + 16, 8), "do not follow each other without gaps"),
        (".idx", lambda file, n: swap(file, _HEADER_BYTES + 12 * n, 8), "do not cover its sequences in order"),
        (".documents.jsonl", lambda file, n: file.splitlines(keepends=True)[0], "2 documents in the index, 1 in"),
    ],
)
def test_an_index_that_contradicts_itself_is_named(
    shard: Shard, suffix: str, change: Callable[[bytes, int], bytes], said: str
) -> None:
    file = Path(f"{shard.prefix}{suffix}")
    content = change(file.read_bytes(), len(shard.index.lengths))
    file.write_bytes(content)
    manifest = json.loads(Path(f"{shard.prefix}.manifest.json").read_text())
    manifest["files"][suffix] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    Path(f"{shard.prefix}.manifest.json").write_text(json.dumps(manifest))
    faults = verify(shard.prefix)[1]
    assert any(said in fault for fault in faults), faults


def swap(content: bytes, place: int, size: int) -> bytes:
    """Two neighbouring numbers in each other's place."""
    first, second = content[place : place + size], content[place + size : place + 2 * size]
    return content[:place] + second + first + content[place + 2 * size :]


def test_a_sound_shard_is_said_to_be_sound(shard: Shard) -> None:
    lines = list(verify_lines(shard.prefix, PLAIN))
    assert lines[0] == f"✓ {shard.prefix} is sound"
    assert "4 windows" in lines[2]


def test_many_faults_are_counted(shard: Shard) -> None:
    tampered(shard, set_manifest("policy", "max_tokens", 60))
    lines = []
    with pytest.raises(ShardError, match=r"sft: 4 faults; delete .*sft\.\* and preprocess again"):  # noqa: PT012
        for line in verify_lines(shard.prefix, PLAIN):
            lines.append(line)
    assert len(lines) == 4
    assert all("exceed max_tokens 60" in line for line in lines)


def test_of_very_many_faults_forty_are_shown(tmp_path: Path) -> None:
    shard = write(tmp_path / "sft", [MADE] * 21, policy(190, reserve=50, keep=60, pin="task"))  # two windows each
    tampered(shard, set_manifest("policy", "max_tokens", 60))
    lines: list[str] = []
    with pytest.raises(ShardError, match="sft: 42 faults"):
        lines.extend(verify_lines(shard.prefix, PLAIN))
    assert (len(lines), lines[-1]) == (41, "  and 2 more")
