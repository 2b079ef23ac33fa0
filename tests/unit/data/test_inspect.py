"""Looking at shards: sums counted twice over, damage named by file, the right tokenizer or none."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Tokenizer

from megatron_klong.data.decoded import Part, document_rows, find_tokenizer, pieces
from megatron_klong.data.inspect import Inspection, damage_named, verify_lines, without_suffix
from megatron_klong.data.printed import document_lines, window_lines
from megatron_klong.data.shard import Shard, ShardError
from megatron_klong.data.summary import summarise
from megatron_klong.data.verify import verify
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.phases import Phase
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.split_plan import split_rows
from megatron_klong.trajectory.tokenizer import TokenizerError, load_template_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from megatron_klong.trajectory.windows import split
from tests.unit.data.small_shards import COMMANDS, MADE, PLAIN, RENDERER, RESULTS, TOKENIZER, small_shard, write
from tests.unit.trajectory.builders import assistant, bash, policies, policy, tool, transcript, transcripts, user


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return small_shard(tmp_path)


def test_a_small_shard_is_what_one_counts_by_hand(shard: Shard) -> None:
    # Turn: header 1, think 3, answer 17 + command, end 1, result 5 + its text; see test_split_plan.
    #   0: 27 + 8 + 5 = 40   1: 27 + 11 + 12 = 50   2: 27 + 18 + 0 = 45   3: 27 + 11 + 11 = 49   4: 27 + 19 + 0 = 46
    # Before turn 3 the context is 8 + 135 and 50 would not fit 190 any more; keep 60 holds turn 2 (45), not 1 and 2.
    # 8 + 45 + 49 + 50 <= 190, so turns 3 and 4 are one window.
    answers = [17 + len(command) for command in COMMANDS]
    results = [5 + len(result) for result in RESULTS]
    summary = summarise(shard, TOKENIZER)
    assert (summary.documents, summary.turns, summary.windows) == (2, 10, 4)
    assert summary.trainable_tokens == summary.trained_tokens == 2 * (sum(answers) + 5)
    assert summary.tokens == 2 * (8 + sum(answers) + sum(results) + 5 * 5)
    rows = {row.kind: row for row in summary.kinds}
    assert rows["answer"].stored == rows["answer"].trained == 2 * sum(answers)
    # The first window ends with the end of turn 2; the second holds it again, with its result.
    assert rows["answer"].in_windows == 2 * (sum(answers) + answers[2])
    assert rows["observation"].in_windows == 2 * (sum(results[:4]))
    assert rows["header"].trainable == rows["header"].trained == 0
    assert summary.times_trained == {1: summary.trained_tokens}
    assert (summary.prefix_tokens, summary.overlap_tokens) == (4 * 8, 2 * 45)
    assert summary.fill is not None
    # Windows end with an end token: without the results, 5 and 5 tokens, of turns 2 and 4.
    assert summary.fill.smallest == pytest.approx((8 + 40 + 50 + 45 - 5) / 190)
    assert summary.fill.largest == pytest.approx((8 + 45 + 49 + 46 - 5) / 190)
    assert summary.ends == {"overflow": 2, "finished": 2}
    # A window's last result is in no window: 2 x 5 of the tokens are in none.
    assert summary.distinct_window_tokens == summary.tokens - 2 * 5
    phases = {row.phase: (row.windows, row.example, row.turns) for row in summary.phases}
    assert phases == {
        Phase.READING: (0, None, 2),
        Phase.RUNNING: (0, None, 2),
        Phase.DEBUGGING: (4, 0, 4),
        Phase.WRITING: (0, None, 2),
    }


def test_with_loss_on_the_window_the_overlap_is_counted_twice(shard: Shard) -> None:
    shard.manifest["loss_on"] = "window"
    answers = [17 + len(command) + 1 for command in COMMANDS]  # with the token that ends the turn
    # The second window of each document begins with turn 2 again: see above.
    summary = summarise(shard, TOKENIZER)
    assert summary.times_trained == {1: 2 * (sum(answers) - answers[2]), 2: 2 * answers[2]}


@settings(max_examples=30)
@given(first=transcripts(), second=transcripts(), rule=policies())
def test_any_shard_is_sound_and_adds_up(
    first: Transcript, second: Transcript, rule: ContextPolicy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = write(tmp_path_factory.mktemp("shard") / "s", [first, second], rule)
    assert verify(made.prefix)[1] == []
    summary = summarise(made, TOKENIZER)
    kinds: Counter[str] = Counter()
    trained = tokens = 0
    for number in range(len(made)):
        window = made.window(number)
        tokens += len(window.ids)
        trained += int(window.loss_mask.sum())
        shown = list(pieces(made, number, TOKENIZER))
        kinds.update({piece.kind.name.lower(): 0 for piece in shown})
        for piece in shown:
            kinds[piece.kind.name.lower()] += piece.tokens
        assert "".join(run.text for piece in shown for run in piece.runs) == TOKENIZER.decode(window.ids.tolist())
        assert sum(piece.tokens for piece in shown if piece.trained) == window.loss_mask.sum()
        new = sum(piece.tokens for piece in shown if piece.part is Part.NEW)
        assert new == made.column("new_tokens")[number]
    assert (summary.window_tokens, summary.trained_tokens) == (tokens, trained)
    assert {row.kind: row.in_windows for row in summary.kinds if row.in_windows} == +kinds
    assert sum(summary.times_trained.values()) == summary.trainable_tokens
    assert sum(row.trainable_tokens for row in summary.phases) == summary.trainable_tokens
    assert sum(row.windows for row in summary.phases) == summary.windows
    json.dumps(summary.as_json())


@settings(max_examples=30)
@given(made=transcripts(), rule=policies())
def test_a_stored_document_has_the_split_plan_it_was_cut_by(
    made: Transcript, rule: ContextPolicy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stored = write(tmp_path_factory.mktemp("shard") / "s", [MADE, made], rule)
    rendered = RENDERER.transcript(made)
    # without phases: calls of generated messages spell control tokens, which text cannot tell from real ones
    expected = split_rows(rendered, made, split(rendered, rule))
    found = document_rows(stored, 1, None)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("first_message", "last_message", "first_turn", "last_turn", "end", "prefix_tokens"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert (ours.overlap_tokens, ours.new_tokens) == (theirs.overlap_tokens, theirs.new_tokens)
        assert ours.tokens_by_kind == theirs.tokens_by_kind
        assert (ours.shared_with_previous, ours.shared_with_next) == (
            theirs.shared_with_previous,
            theirs.shared_with_next,
        )
        assert ours.phase is None


def test_phases_from_stored_text_are_those_of_the_messages(shard: Shard) -> None:
    rendered = RENDERER.transcript(MADE)
    rule = policy(190, reserve=50, keep=60, pin="task")
    assert document_rows(shard, 1, TOKENIZER) == split_rows(rendered, MADE, split(rendered, rule))


def test_a_long_result_is_read_at_both_ends(tmp_path: Path) -> None:
    made = transcript(
        user("task"),
        assistant(calls=[bash("python a.py")]),
        tool("x" * 5000 + "\nexit code 1"),
        assistant(calls=[bash("sed -i s/x/y/ a.py")]),
    )
    stored = write(tmp_path / "s", [made], policy(9000, reserve=50, keep=60))
    assert document_rows(stored, 0, TOKENIZER)[0].turns_by_phase == {Phase.RUNNING: 1, Phase.DEBUGGING: 1}


# -- opening


def test_damage_is_named_by_file(shard: Shard) -> None:
    file = Path(f"{shard.prefix}.windows.npz")
    content = bytearray(file.read_bytes())
    content[40:80] = bytes(40)
    file.write_bytes(content)
    with pytest.raises(ShardError, match=r"sft\.windows\.npz: checksum differs .* preprocess again"):
        Inspection(shard.prefix, None)


def test_a_broken_manifest_is_named(shard: Shard) -> None:
    file = Path(f"{shard.prefix}.manifest.json")
    manifest = json.loads(file.read_text())
    del manifest["files"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"sft: cannot be read \(KeyError: 'files'\); preprocess again"):
        Inspection(shard.prefix, None)


def test_a_manifest_that_lacks_what_a_reader_needs_is_named_though_all_checksums_are_right(shard: Shard) -> None:
    file = Path(f"{shard.prefix}.manifest.json")
    manifest = json.loads(file.read_text())
    del manifest["policy"]["max_tokens"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"sft: cannot be read \(KeyError: 'max_tokens'\); preprocess again"):
        list(verify_lines(shard.prefix, PLAIN))


def test_what_is_found_damaged_is_told_as_it_was_found(shard: Shard) -> None:
    file = Path(f"{shard.prefix}.bin")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ShardError, match=r"sft\.bin: checksum differs from the manifest's; delete .*sft\.\*"):
        list(verify_lines(shard.prefix, PLAIN))
    Path(f"{shard.prefix}.manifest.json").write_text("{")
    with pytest.raises(ShardError, match=r"sft\.manifest\.json: not JSON .* delete .*sft\.\* and preprocess again"):
        list(verify_lines(shard.prefix, PLAIN))


def test_a_fault_of_ours_is_not_blamed_on_the_shard(shard: Shard) -> None:
    with pytest.raises(ZeroDivisionError), damage_named(shard.prefix):
        raise ZeroDivisionError


def test_a_number_that_is_not_there_is_refused_with_those_that_are(shard: Shard) -> None:
    inspection = Inspection(shard.prefix, None)
    with pytest.raises(ShardError, match="no window 4; its windows are numbered 0 to 3"):
        list(inspection.window_lines(4, PLAIN))
    with pytest.raises(ShardError, match="no document -1; its documents are numbered 0 to 1"):
        list(inspection.document_lines(-1))


@pytest.mark.parametrize("name", ["data/sft", "data/sft.bin", "data/sft.windows.npz", "data/sft.manifest.json"])
def test_the_name_of_a_file_serves_as_the_prefix(name: str) -> None:
    assert without_suffix(Path(name)) == Path("data/sft")


# -- tokenizers


def test_the_tokenizer_is_the_one_the_shard_was_written_with(shard: Shard, tmp_path: Path) -> None:
    found, why = find_tokenizer(shard, None)
    assert found is None
    assert why.endswith("; pass --tokenizer")
    train_tokenizer(["some text"], vocabulary_size=300, folder=tmp_path / "other")
    with pytest.raises(ShardError, match=r"tokenizer\.json: not the tokenizer .*sft was written with"):
        find_tokenizer(shard, tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"broken/tokenizer\.json: not a Hugging Face tokenizer\.json"):
        find_tokenizer(shard, tmp_path / "broken")


def test_ids_are_shown_without_a_tokenizer(shard: Shard) -> None:
    row = document_rows(shard, 0, None)[0]
    lines = list(window_lines(shard, 0, row, pieces(shard, 0, None), PLAIN, "pass --tokenizer"))
    assert "token ids instead of text: pass --tokenizer" in lines
    assert any(line.endswith("│ 257 258") for line in lines), "[gMASK]<sop> of the byte tokenizer"
    assert list(document_lines(shard, 0, document_rows(shard, 0, None), [0, 1]))[2].split()[4] == "?"


def test_a_tokenizer_of_another_template_is_found_by_its_hash(shard: Shard, tmp_path: Path) -> None:
    train_tokenizer(["some text"], vocabulary_size=300, folder=tmp_path)
    file = tmp_path / "tokenizer.json"
    made = Tokenizer.from_file(str(file))
    made.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    made.save(str(file))
    written = load_template_tokenizer(file, "<|im_start|>assistant<|im_end|>")
    shard.manifest["tokenizer"].update(
        path=str(file), sha256=written.sha256, control_tokens=dict(written.control), vocabulary_size=302
    )
    found, why = find_tokenizer(shard, None)
    assert why == ""
    assert found is not None
    assert found.control == written.control
    assert find_tokenizer(shard, file)[0] is not None
