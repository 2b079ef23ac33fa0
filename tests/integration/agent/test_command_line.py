"""As a user types it: `inspect eval megatron_klong/paper_replication`, with a server of ours and nothing else."""

import subprocess
import sys
from pathlib import Path

from megatron_klong.agent.records import export_records
from megatron_klong.trajectory.episode import read_episode
from megatron_klong.trajectory.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY
from tests.integration.agent.playing import last_number, policy
from tests.unit.serve.scripted import call, serving

INSPECT = Path(sys.executable).with_name("inspect")


def inspect_eval(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(INSPECT), "eval", "megatron_klong/paper_replication", "--display", "none", *arguments]
    command += ["--log-dir", str(folder), "--log-format", "eval"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)


def test_a_server_names_its_tokenizer_and_the_task_plays(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)

    def reply(tail: str) -> str:
        done = last_number(r"step (\d+) done", tail)
        return call("bash", cmd=f"echo step {done + 1} done > /home/submission/reproduce.sh; cat reproduce.sh")

    engine = policy(loaded, reply)
    file = str(tokenizer / "tokenizer.json")
    with serving(engine, tokenizer=loaded, tokenizer_file=file, max_sequence_length=131072) as url:
        made = inspect_eval(
            tmp_path,
            *("-T", f"tasks={tasks / 't10'}", "-T", "timeout=2h", "-T", "turn_limit=3"),
            *("--model", f"klong/{url}", "--sandbox", "bubblewrap"),
        )
    assert made.returncode == 0, made.stdout + made.stderr
    (log,) = tmp_path.glob("*.eval")
    (record,) = export_records(log, tmp_path / "records")
    episode = read_episode(record)
    assert (episode.ending, episode.error, len(episode.turns)) == ("turn_limit", None, 3)
    assert "step 3 done" in episode.messages[-1].content


def test_another_model_needs_a_tokenizer_and_is_told_so(tmp_path: Path, tasks: Path) -> None:
    made = inspect_eval(tmp_path, "-T", f"tasks={tasks / 't10'}", "--model", "mockllm/model")
    (log,) = tmp_path.glob("*.eval")
    (record,) = export_records(log, tmp_path / "records")
    assert "with -T tokenizer=FILE" in (read_episode(record).error or ""), made.stdout


def test_a_tokenizer_that_is_not_the_servers_is_refused(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    file, other = tokenizer / "tokenizer.json", tmp_path / "other.json"
    other.write_text(file.read_text() + "\n")
    loaded = load_tokenizer(tokenizer)
    engine = policy(loaded, lambda tail: call("bash", cmd="true"))
    with serving(engine, tokenizer=loaded, tokenizer_file=str(file), max_sequence_length=131072) as url:
        made = inspect_eval(
            tmp_path,
            *("-T", f"tasks={tasks / 't10'}", "-T", f"tokenizer={other}"),
            *("--model", f"klong/{url}", "--sandbox", "bubblewrap"),
        )
    (log,) = tmp_path.glob("*.eval")
    (record,) = export_records(log, tmp_path / "records")
    assert f"{other} is not the model's" in (read_episode(record).error or ""), made.stdout
