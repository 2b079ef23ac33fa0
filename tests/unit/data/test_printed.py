"""Windows, documents and summaries as printed: what is trained, what cannot be seen, and what was asked for."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.data.decoded import Part, document_rows, find_tokenizer, pieces
from megatron_klong.data.inspect import add_inspect_options, inspect_lines
from megatron_klong.data.printed import document_lines, summary_lines, window_lines
from megatron_klong.data.shard import Shard, ShardWriter
from megatron_klong.data.summary import ShardSummary, summarise
from megatron_klong.data.terminal import Span, Style, Terminal
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.phases import Phase
from megatron_klong.trajectory.segments import SegmentKind
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from megatron_klong.trajectory.windows import split
from tests.unit.data.small_shards import COLORED, PLAIN, TOKENIZER, WORK, small_shard, write
from tests.unit.trajectory.builders import assistant, policy, system, transcript, user


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return small_shard(tmp_path)


def lines_of(tmp_path: Path, *messages: Any, terminal: Terminal = PLAIN, window: int = 0) -> list[str]:
    stored = write(tmp_path / "s", [transcript(*messages)], policy(4000, reserve=50, keep=60))
    row = document_rows(stored, 0, TOKENIZER)[0]
    return list(window_lines(stored, window, row, pieces(stored, window, TOKENIZER), terminal, ""))


def test_a_window_shows_what_is_trained_and_what_is_control(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, user("say <|user|>"), assistant("two\n\nlines <think>", reasoning="why"))
    assert lines[0] == "window 0 of 1, document 0: t"
    start = next(number for number, line in enumerate(lines) if line.startswith("preamble"))
    assert lines[start:] == [
        "preamble          2 │ ⟦[gMASK]⟧⟦<sop>⟧",
        "user             14 │ ⟦<|user|>⟧⏎",
        "                    │ say <|user|>",
        lines[start + 3],
        "header            1 │ ⟦<|assistant|>⟧",
        "think             2 ┃ ⏎",
        "                    ┃ ⟦<think>⟧",
        "reasoning         3 ┃ why",
        "think             1 ┃ ⟦</think>⟧",
        "answer           19 ┃ ⏎",
        "                    ┃ two",
        "                    ┃ ",
        "                    ┃ lines <think>",
        "turn end          1 ┃ ⟦<|user|>⟧",
    ]
    assert lines[start + 3].startswith("━━ new: 27 tokens, in no earlier window ━")


def test_colours_say_the_same(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, user("q"), assistant("a"), terminal=COLORED)
    text = "\n".join(lines)
    assert "\x1b[32ma\x1b[0m" in text
    assert "\x1b[2mq\x1b[0m" in text
    assert "\x1b[2;7m<|assistant|>\x1b[0m" in text
    assert "\x1b[7;32m<|user|>\x1b[0m" in text


def test_nothing_in_a_transcript_acts_on_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[31mred \u202eevil \u200b\r\n\ttab \x07"
    lines = lines_of(tmp_path, system(evil), user(evil), assistant(evil))
    text = "".join(lines)
    assert not [character for character in text if not character.isprintable()]
    assert "⟨ESC⟩[31mred ⟨U+202E⟩evil ⟨U+200B⟩⟨CR⟩" in text
    assert "⇥   tab ⟨BEL⟩" in text


def test_ids_and_sources_do_not_act_either(shard: Shard) -> None:
    shard.documents[0] |= {"id": "a\x1b[2Jb\nc", "source": "\u202e"}
    first = next(iter(document_lines(shard, 0, document_rows(shard, 0, TOKENIZER), [0, 1])))
    assert first == "document 0: a⟨ESC⟩[2Jb⏎c, from ⟨U+202E⟩, 5 turns, 2 windows"


def test_left_out_history_is_said(shard: Shard) -> None:
    row = document_rows(shard, 0, TOKENIZER)[1]
    lines = list(window_lines(shard, 1, row, pieces(shard, 1, TOKENIZER), PLAIN, ""))
    assert "                    ┆ 90 tokens left out" in lines  # turns 0 and 1: 40 + 50
    parts = [line for line in lines if line.startswith("━━")]
    assert [part.split(":")[0] for part in parts] == ["━━ prefix", "━━ overlap", "━━ new"]
    assert "phase: debugging 1 of 2" in lines[1]


def test_with_loss_on_the_window_what_is_repeated_is_marked_again(shard: Shard) -> None:
    repeated = [piece for piece in pieces(shard, 1, TOKENIZER) if piece.part is Part.OVERLAP]
    assert not any(piece.trained for piece in repeated)
    shard.manifest["loss_on"] = "window"
    repeated = [piece for piece in pieces(shard, 1, TOKENIZER) if piece.part is Part.OVERLAP]
    assert {piece.kind.name for piece in repeated if piece.trained} == {"ANSWER", "TURN_END"}


def test_a_document_in_no_window_is_said_to_be_in_none(tmp_path: Path) -> None:
    stored = write(tmp_path / "s", [transcript(user("x" * 400), assistant("a"))], policy(200))
    summary = summarise(stored, TOKENIZER)
    assert (summary.windows, summary.documents_without_window, summary.never_trained_tokens) == (0, 1, 3)
    assert summary.fill is None
    assert summary.context_tokens_per_unique_token is None
    assert "no window holds any of it" in list(document_lines(stored, 0, document_rows(stored, 0, TOKENIZER), []))[1]


def test_lines_are_wrapped_by_the_width_of_their_characters() -> None:
    terminal = Terminal(color=False, columns=14)
    spans = [Span("abcdef", Style.TRAINED), Span("日本語の", Style.QUIET)]
    assert list(terminal.wrapped(spans, 2)) == ["abcdef日本語", "の"]
    assert list(Terminal(color=False, columns=None).wrapped(spans, 2)) == ["abcdef日本語の"]
    assert Terminal(color=True, columns=None).paint("x", Style.PLAIN) == "x"


def test_an_accent_takes_no_room_and_never_begins_a_line() -> None:
    accented = "e\u0301"
    lines = list(Terminal(color=False, columns=14).wrapped([Span(accented * 13, Style.PLAIN)], 2))
    assert lines == [accented * 12, accented]


def test_kinds_are_named_in_both_tables(shard: Shard) -> None:
    lines = list(document_lines(shard, 1, document_rows(shard, 1, TOKENIZER), [2, 3]))
    assert lines[1].split()[:2] == ["window", "new"]
    header = next(line for line in lines if "preamble" in line)
    assert "turn end" in header
    assert SegmentKind.TOOLS.name.lower() not in header


# -- the program's parts, in this process


@pytest.fixture
def with_file(tmp_path: Path) -> Shard:
    """A shard whose tokenizer is a file: tmp_path / tokenizer.json. Twenty turns."""
    train_tokenizer(["python a.py"] * 3, vocabulary_size=300, folder=tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    renderer, rule = GlmRenderer(tokenizer), policy(400, reserve=60, keep=90)
    with ShardWriter(tmp_path / "real", tokenizer, rule, renderer=renderer.name, overwrite=False) as made:
        item = transcript(user("task"), *WORK * 4)
        rendered = renderer.transcript(item)
        made.add(item, rendered, split(rendered, rule))
    return Shard(tmp_path / "real")


def shown(shard: Shard, *arguments: str, terminal: Terminal = PLAIN) -> list[str]:
    parser = argparse.ArgumentParser()
    add_inspect_options(parser)
    return list(inspect_lines(parser.parse_args([str(shard.prefix), *arguments]), terminal))


def test_the_summary_says_how_tokens_are_used(with_file: Shard, tmp_path: Path) -> None:
    lines = shown(with_file, "--tokenizer", str(tmp_path))
    summary = summarise(with_file, load_tokenizer(tmp_path))
    assert lines[0] == f"{with_file.prefix}: 1 documents, {summary.windows} windows of at most 400 tokens"
    assert any(line.split()[:3] == ["trained", "once", f"{summary.trained_tokens:,}"] for line in lines)
    assert any(line.split()[:4] == ["debugging", *debugging(summary)] for line in lines)
    table = lines[lines.index("Tokens by kind") + 1 :]
    assert table[0].split() == ["stored", "trainable", "in", "windows", "trained"]
    ends = next(row for row in summary.kinds if row.kind == "turn_end")
    assert next(line for line in table if "turn end" in line).split()[2:6] == ["20", "20", str(ends.in_windows), "20"]
    assert not any("not known" in line for line in lines)


def debugging(summary: ShardSummary) -> list[str]:
    row = next(row for row in summary.phases if row.phase is Phase.DEBUGGING)
    return [str(row.windows), str(row.example), str(row.turns)]


def test_the_summary_without_text_says_why(shard: Shard) -> None:
    lines = shown(shard)
    assert lines[-1].startswith("  not known without the text: ")
    assert lines[-1].endswith("; pass --tokenizer")


def test_what_is_lost_is_in_the_summary(tmp_path: Path) -> None:
    whole = transcript(user("task"), assistant("a", trained=False))
    stored = write(tmp_path / "s", [transcript(user("x" * 400), assistant("a")), whole], policy(200))
    text = "\n".join(summary_lines(summarise(stored, TOKENIZER), COLORED))
    assert "train nothing  1 windows" in text
    assert "in no window   1 documents" in text
    assert "trained never" in text


def test_an_empty_shard_has_a_summary(tmp_path: Path) -> None:
    text = "\n".join(summary_lines(summarise(write(tmp_path / "s", [], policy()), TOKENIZER), PLAIN))
    assert "0 documents, 0 windows" in text
    assert "no window" in text


def test_json_holds_the_whole_summary(with_file: Shard, tmp_path: Path) -> None:
    summary = json.loads("\n".join(shown(with_file, "--json", "--tokenizer", str(tmp_path))))
    assert summary["turns"] == 20
    assert summary["phases"][0]["phase"] == "reading"
    assert summary["window_tokens_per_trained_token"] == summary["window_tokens"] / summary["trained_tokens"]


def test_windows_documents_and_faults_are_asked_for_by_option(with_file: Shard, tmp_path: Path) -> None:
    tokenizer = ("--tokenizer", str(tmp_path))
    assert shown(with_file, "--window", "0", *tokenizer)[0].startswith("window 0 of ")
    assert shown(with_file, "--document", "0", *tokenizer)[0].startswith("document 0: t, from test, 20 turns")
    assert shown(with_file, "--verify")[0].startswith("✓ ")


def test_the_tokenizer_the_manifest_names_is_used_if_it_is_still_the_same(with_file: Shard, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    entry = with_file.manifest["tokenizer"]
    entry["path"] = str(file)
    found, why = find_tokenizer(with_file, None)
    assert found is not None
    assert (found.sha256, why) == (entry["sha256"], "")
    train_tokenizer(["another text"], vocabulary_size=290, folder=tmp_path)
    assert find_tokenizer(with_file, None) == (
        None,
        f"{file} has changed since the shard was written; pass --tokenizer",
    )
    file.unlink()
    assert find_tokenizer(with_file, None) == (None, f"{file}, which the manifest names, is not here; pass --tokenizer")
    del entry["path"]
    assert find_tokenizer(with_file, None) == (None, "the manifest names no tokenizer; pass --tokenizer")


def test_a_document_without_text_says_that_its_phases_are_not_known(shard: Shard) -> None:
    assert shown(shard, "--document", "1")[0].startswith("phases are not known: ")


def test_colours_follow_the_terminal_and_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen, pipe = FakeStream(True), FakeStream(False)
    assert Terminal.of(screen, "auto").color
    assert not Terminal.of(pipe, "auto").color
    assert Terminal.of(pipe, "always").color
    assert not Terminal.of(screen, "never").color
    assert Terminal.of(pipe, "always").columns is None
    assert Terminal.of(screen, "auto").columns
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Terminal.of(screen, "auto").color


class FakeStream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal
