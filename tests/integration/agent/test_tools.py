"""Tools as an agent uses them: what they say, and what they leave."""

import io
import tarfile
from pathlib import Path
from typing import Any

import zstandard
from inspect_ai.event import ToolEvent
from inspect_ai.log import read_eval_log

from megatron_klong.agent.collect import collect
from megatron_klong.trajectory.episode import read_episode
from tests.integration.agent.playing import READ, SUBMIT, job, play_script, results, settings
from tests.integration.scripted_endpoint import Reply, call, endpoint, say

TOOLS = ("--tools", '["bash", "python", "read_file_chunk", "search_file", "background", "jobs", "submit"]')


READERS: dict[str, dict[str, str]] = {"read_file_chunk": {}, "search_file": {"query": "a"}}


def test_background_commands_run_on_and_can_be_stopped(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    replies = [
        call("background", cmd="while sleep 0.2; do echo tick; done"),
        call("bash", cmd="(while sleep 0.2; do echo lost >> lost.txt; done) & sleep 0.5"),
        call(
            "bash",
            cmd="sleep 1; cat lost.txt | wc -l > first; sleep 1; cat lost.txt | wc -l > second; cmp first second",
        ),
        call("jobs"),
        call("jobs", stop=1),
        call("bash", cmd="wc -l < /tmp/jobs/1.txt"),
        call("jobs", stop=7),
        call("python", code="import sys; print(sys.version_info.major)"),
        call("search_file", file="/home/paper/paper.md", query="EPOCHS"),
    ]
    config = settings(*TOOLS, "--turn_limit", str(len(replies)), "--reading", "off", "--remind_every_turns", "0")
    record = play_script(tmp_path, tokenizer, tasks / "t10", lambda number, messages: replies[number], config)
    said = results(record)
    assert said[0].startswith("Job 1 runs; what it prints goes to /tmp/jobs/1.txt.")
    assert "exit code" not in said[2]  # what bash leaves running is ended
    assert said[3].startswith("1: runs since")
    assert said[4].startswith("1: ended with exit code 137 after")
    assert int(said[5].split()[0]) >= 5
    assert said[6].startswith("Error: there is no job 7.")
    assert said[7].startswith("3")
    assert " matches. Page 1 of " in said[8]
    assert record.turns[2].tool_seconds > 2 > record.turns[3].tool_seconds


def test_a_long_result_is_whole_in_the_file_that_it_names(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    replies = [
        call("bash", cmd="seq 100000"),
        call("bash", cmd='[ "$(seq 100000)" = "$(cat /tmp/output/1-1.txt)" ] && echo the same'),
    ]
    config = settings("--turn_limit", "2", "--reading", "off")
    record = play_script(tmp_path, tokenizer, tasks / "t10", lambda number, messages: replies[number], config)
    first, second = results(record)
    assert first.startswith("1\n2\n3\n")
    assert first.splitlines()[-1] == "100000"
    assert "characters left out; all of it is in /tmp/output/1-1.txt]" in first
    assert second == "the same"
    (log,) = (tmp_path / "logs").glob("*.eval")
    assert log.stat().st_size < 100_000  # which seq alone has more than
    (sample,) = read_eval_log(str(log)).samples or []
    assert max(len(str(event.result)) for event in sample.events if isinstance(event, ToolEvent)) < 3000


def test_what_is_no_file_is_told_and_the_episode_goes_on(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    made = call("bash", cmd="mkfifo pipe; mkdir folder; touch secret && chmod 000 secret; printf '\\xff\\xfe' > binary")
    files = ["/home/paper/paper.md/x", "pipe", "folder", "secret", "binary", "x" * 300, "", "nul\0", "absent"]
    replies = [made, *(call(name, file=file, **more) for file in files for name, more in READERS.items())]
    config = settings(*TOOLS, "--turn_limit", str(len(replies) + 1), "--reading", "off", "--remind_every_turns", "0")
    replies.append(call("bash", cmd="echo still here"))
    record = play_script(tmp_path, tokenizer, tasks / "t10", lambda number, messages: replies[number], config)
    said = results(record)
    assert record.ending == "turn_limit"
    assert [text for text in said[1:-1] if not text.startswith("Error: ")] == []
    assert said[-1] == "still here"


def test_submit_waits_for_its_time_and_for_all_it_needs(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    commit = "git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm done && sleep 5"
    replies = [SUBMIT, READ, call("bash", cmd="echo true > reproduce.sh"), SUBMIT, call("bash", cmd=commit), SUBMIT]
    needs = ("--submit_needs", '["reading", "reproduce.sh", "commit"]', "--submit_after", "0.2")
    times = ("--timeout", "20s", "--hard_timeout", "25s", "--command_timeout", "15s")
    config = settings(*needs, *times, "--turn_limit", "12")

    def script(number: int, messages: list[dict[str, Any]]) -> Reply:
        return replies[min(number, len(replies) - 1)]

    with endpoint(script) as served:
        made = job(tmp_path, tokenizer, tasks / "t10", served.url, config)
        made = made.model_copy(update={"artifact_folder": str(tmp_path / "artifacts")})
        (finished,) = collect([made], workers=1, output_folder=tmp_path)
    record = read_episode(Path(finished.record))
    said = results(record)
    assert said[0].startswith("Not accepted: the paper is not read yet (0 of ")
    assert "; /home/submission/reproduce.sh is missing; nothing is committed to git in /home/submission." in said[0]
    assert said[3].startswith("Not accepted: nothing is committed to git in /home/submission.")
    assert said[-1].startswith("Submitted.")
    assert record.ending == "finished"
    assert record.seconds > 4
    # what it left is kept
    (kept,) = (tmp_path / "artifacts").iterdir()
    assert kept.name.endswith(".workspace.tar.zst")
    content = zstandard.ZstdDecompressor().decompress(kept.read_bytes(), 1 << 26)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = tar.extractfile("./reproduce.sh")
        assert found is not None
        assert found.read() == b"true\n"


def test_submit_too_early_says_when_it_opens(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    replies = [call("bash", cmd="echo true > reproduce.sh"), SUBMIT]
    config = settings("--submit_after", "0.5", "--turn_limit", "2", "--reading", "off")
    record = play_script(tmp_path, tokenizer, tasks / "t10", lambda number, messages: replies[number], config)
    assert results(record)[1].startswith("Not accepted yet: only ")
    assert "A submission is taken from 50% on, in 2" in results(record)[1]  # of 60 seconds
    assert record.ending == "turn_limit"


def test_sampled_tokens_can_be_the_limit(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    # the scripted endpoint says that each reply has one token
    config = settings("--token_limit", "3", "--reading", "off")
    record = play_script(tmp_path, tokenizer, tasks / "t10", lambda number, messages: say("hm"), config)
    assert (record.ending, len(record.turns)) == ("token_limit", 3)


def test_a_submission_over_its_cap_scores_nothing_and_says_why(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    replies = [call("bash", cmd="head -c 3000000 /dev/urandom > big; echo true > reproduce.sh"), SUBMIT]
    config = settings("--submission_bytes", "1000000", "--reading", "off")
    record = play_script(tmp_path, tokenizer, tasks / "t10", lambda number, messages: replies[number], config)
    assert (record.ending, record.score) == ("finished", 0.0)
