"""The preprocess program: files in, a shard and an honest report out."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from megatron_klong.data.preprocess import RefusedError
from megatron_klong.data.shard import Shard
from tests.conftest import REPOSITORY
from tests.unit.data import builders
from tests.unit.trajectory.template_cases import PLAIN
from tests.unit.trajectory.test_importers import ROW
from tests.unit.trajectory.test_tokenizer import write_tokenizer


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = REPOSITORY / "tools" / "preprocess_trajectories.py"
    return subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tok", control=True)


def test_refusals_are_reported_and_the_rest_is_processed(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "good.json").write_text(json.dumps([ROW]))
    (source / "cut.json").write_text('[{"messages": ')
    (source / "empty.jsonl").write_text("")
    made = run(
        "--input",
        source,
        "--output-prefix",
        tmp_path / "out/s",
        "--tokenizer",
        tokenizer,
        "--max-tokens",
        2048,
        "--overlap-tokens",
        512,
    )
    assert made.returncode == 0, made.stderr
    assert "1 transcripts from 3 files: 2 turns" in made.stdout
    assert "refused, truncated: 1" in made.stdout
    report = json.loads((tmp_path / "out/s.report.json").read_text())
    assert sorted(refusal["reason"] for refusal in report["refusals"]) == ["empty", "truncated"]
    assert report["trained_tokens"] == report["trainable_tokens"] > 0
    assert len(Shard(tmp_path / "out/s")) == report["windows"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent", "--output-prefix", "s"], "absent: no such file or folder of transcripts"),
        (
            ["--input", "in", "--output-prefix", "s", "--max-tokens", "100", "--overlap-tokens", "200"],
            "keep 200 must be",
        ),
        (
            ["--input", "in", "--output-prefix", "s", "--max-tokens", "100", "--overlap-tokens", "20"],
            "no window came out",
        ),
        (["--input", "in", "--output-prefix", "s", "--tokenizer", "nowhere"], "nowhere: no such file"),
    ],
)
def test_what_a_user_gets_wrong_is_named(tmp_path: Path, tokenizer: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps([ROW]))
    program = REPOSITORY / "tools" / "preprocess_trajectories.py"
    made = subprocess.run(
        [sys.executable, str(program), "--tokenizer", str(tokenizer), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert made.returncode == 2
    assert message in made.stderr
    assert "Traceback" not in made.stderr
    assert not list(tmp_path.glob("s.*"))


def test_the_real_openai_messages_become_a_shard(tmp_path: Path, shared_data: Path) -> None:
    made = run(
        "--input",
        shared_data / "trajectories" / "openai_messages",
        "--output-prefix",
        tmp_path / "real",
        "--tokenizer",
        shared_data / "tokenizers" / "gpt-neox-olmo-dolma-v1_5",
        "--add-special-tokens",
        "--max-tokens",
        8192,
        "--overlap-tokens",
        2048,
    )
    assert made.returncode == 0, made.stderr
    report = json.loads((tmp_path / "real.report.json").read_text())
    assert (report["transcripts"], report["turns"], report["refusals"]) == (5, 88, [])
    assert report["windows"] > 10
    assert report["trained_tokens"] == report["trainable_tokens"]
    assert sum(Shard(tmp_path / "real").column("trained_tokens")) == report["trained_tokens"]


# -- exit status, and what programs read


def test_strict_writes_no_shard_and_names_what_was_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = builders.write_inputs(tmp_path / "in", files=2, rows_of_large=2)
    command = builders.arguments(source, tmp_path / "s", tokenizer)
    made = builders.run(*command, "--strict")
    assert made.returncode == 2
    assert "2 inputs refused, so no shard was written" in made.stderr
    assert "cut.json#0: truncated" in made.stderr
    assert not (tmp_path / "s.manifest.json").exists()
    (source / "cut.json").unlink()
    (source / "empty.jsonl").unlink()
    assert builders.run(*command, "--strict").returncode == 0
    assert len(Shard(tmp_path / "s").documents) == 4


def test_of_very_many_refusals_strict_names_twenty(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(23):
        (tmp_path / "in" / f"{number:02}.json").write_text("[{")
    with pytest.raises(RefusedError) as caught:
        builders.make(tmp_path / "in", tmp_path / "s", tokenizer, strict=True)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("23 inputs refused, so no shard was written")
    assert (len(lines), lines[-1]) == (22, "and 3 more")
    assert "19.json#0: truncated" in lines[-2]


def test_the_summary_is_json_for_programs_and_an_aligned_table_for_people(tmp_path: Path, tokenizer: Path) -> None:
    source = builders.write_inputs(tmp_path / "in", files=3, rows_of_large=2)
    command = builders.arguments(source, tmp_path / "s", tokenizer, "--loss-on", "window", "--overwrite")
    made = builders.run(*command, "--json", "--materialize")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report == json.loads((tmp_path / "s.report.json").read_text())
    (counts,) = report["formats"].values()
    for name in ("transcripts", "turns", "tokens", "trained_tokens", "windows"):
        assert counts[name] == report[name] > 0
    often = {int(times): tokens for times, tokens in report["times_trained"].items()}
    assert max(often) > 1
    assert sum(often.values()) == report["trainable_tokens"]
    assert sum(times * tokens for times, tokens in often.items()) == report["trained_tokens"]
    assert report["context_per_unique_token"] > 1
    assert (tmp_path / "s.materialized.idx").exists()

    lines = builders.run(*command).stdout.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("format"))
    table = lines[first : first + 2]
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["format", "transcripts", "turns", "tokens", "trained", "windows", "dropped"]
    assert table[1].split()[1:] == [f"{counts[name]:,}" for name in builders.COUNTED] + ["0"]
    assert any("times on average" in line for line in lines)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_chat_template_with_markers_renders_a_shard(tmp_path: Path, workers: int) -> None:
    words = Tokenizer.from_file(str(write_tokenizer(tmp_path / "plain", control=False) / "tokenizer.json"))
    words.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat.jinja").write_text(PLAIN)
    source = builders.write_inputs(tmp_path / "in", files=2, rows_of_large=2)
    command = builders.arguments(source, tmp_path / "s", tmp_path / "tokenizer.json", "--workers", workers)
    made = builders.run(*command, "--chat-template", tmp_path / "chat.jinja")
    assert made.returncode == 0, made.stderr
    shard = Shard(tmp_path / "s")
    assert shard.manifest["renderer"].startswith("chat@")
    assert set(shard.manifest["tokenizer"]["control_tokens"]) == {"<|im_start|>", "<|im_end|>"}
    window = shard.window(0)
    trained = words.decode(window.ids[window.loss_mask].tolist(), skip_special_tokens=False)
    first = json.loads((source / "000.json").read_text())["messages"]
    assert words.decode(window.ids.tolist(), skip_special_tokens=False).startswith("<|im_start|>system\nwork<|im_end|>")
    assert trained.startswith(first[2]["content"])


def test_what_a_chat_template_cannot_write_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    words = Tokenizer.from_file(str(write_tokenizer(tmp_path / "plain", control=False) / "tokenizer.json"))
    words.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat.jinja").write_text(
        PLAIN.replace("{{ m.role }}", "{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}{{ m.role }}")
    )
    rows = [builders.row(0), builders.row(1), builders.row(2)]
    rows[1]["messages"][1]["content"] = "bad"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = builders.arguments(tmp_path / "in.jsonl", tmp_path / "s", tmp_path / "tokenizer.json")
    made = builders.run(*command, "--chat-template", tmp_path / "chat.jinja", "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    (refused,) = report["refusals"]
    assert report["transcripts"] == 2
    assert refused["reason"] == "malformed"
    assert "openai_messages: row-1#1: messages[1]: " in refused["detail"]
    assert "the template fails: no" in refused["detail"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "in", "--output-prefix", "s"], "--input needs --tokenizer"),
        (["--output-prefix", "s"], "one of the arguments --input --merge is required"),
        (["--merge", "a", "--output-prefix", "s", "--part", "0/2"], "--part is for --input"),
        (["--input", "in", "--output-prefix", "s", "--part", "2/2"], "write K/N with K from 0 to N - 1"),
        (["--input", "in", "--output-prefix", "s", "--workers", "0"], "must be at least 1"),
        (["--merge", "nowhere", "--output-prefix", "s"], "nowhere.report.json: not the report of a shard"),
    ],
)
def test_options_that_do_not_go_together_are_named(arguments: list[str], message: str) -> None:
    made = run(*arguments)
    assert made.returncode == 2
    assert message in made.stderr
    assert "Traceback" not in made.stderr


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: Path) -> None:
    source = builders.write_inputs(tmp_path / "in", files=1, rows_of_large=1)
    (tmp_path / "file").write_text("")
    made = builders.run(*builders.arguments(source, tmp_path / "file" / "s", tokenizer))
    assert made.returncode == 2
    assert "file" in made.stderr
    assert "run the same command again" in made.stderr
    assert "Traceback" not in made.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_too_large_to_write_ends_the_run_and_more_room_lets_it_go_on(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # what it writes would meet the limit too
    source = builders.write_inputs(tmp_path / "in")
    command = builders.arguments(source, tmp_path / "s", tokenizer, "--workers", workers)
    limit = 50_000  # a part is smaller, all of them together are not

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    made = builders.run(*command, preexec_fn=limit_files)
    assert made.returncode == 2
    assert "File too large; give the output room" in made.stderr
    assert "Traceback" not in made.stderr
    assert not (tmp_path / "s.manifest.json").exists()
    assert len(list((tmp_path / "s.parts").glob("*.manifest.json"))) > 1
    builders.make(source, tmp_path / "s", tokenizer)
    builders.make(source, tmp_path / "whole", tokenizer)
    assert builders.content(tmp_path / "s") == builders.content(tmp_path / "whole")


def test_a_full_disk_ends_the_run_and_more_room_lets_it_go_on(tmp_path: Path, tokenizer: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        source = builders.write_inputs(tmp_path / "in", files=20, rows_of_large=60)
        command = builders.arguments(source, disk / "s", tokenizer)
        made = builders.run(*command)
        assert made.returncode == 2
        assert "No space left on device; give the output room" in made.stderr
        assert not (disk / "s.manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        again = builders.run(*command)
        assert again.returncode == 0, again.stderr
        builders.make(source, tmp_path / "whole", tokenizer)
        assert builders.content(disk / "s") == builders.content(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
