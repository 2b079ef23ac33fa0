"""An episode with a way out: the task's blacklist holds, attempts are counted, kept, and by config end it."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_klong.agent.records import export_records
from megatron_klong.agent.worker import load_model, run
from megatron_klong.trajectory.episode import EpisodeRecord, read_episode
from tests.integration.agent.playing import job, results, settings
from tests.integration.scripted_endpoint import Reply, call, endpoint


@contextmanager
def website() -> Iterator[str]:
    """Something to fetch, on loopback."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "8")
            self.end_headers()
            self.wfile.write(b"fetched\n")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def fetch(url: str) -> dict[str, object]:
    return call("bash", cmd=f"curl -sS -o out -w '%{{http_code}}' --max-time 20 {url}; cat out; rm -f out")


def test_the_tasks_blacklist_holds_and_ends_the_episode(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    task = tmp_path / "t10"
    shutil.copytree(tasks / "t10", task)
    (task / "blacklist.txt").write_text("https://github.com/owner/repo\nforbidden.example.org\n")
    replies = [
        fetch("http://allowed.example.org/a"),
        fetch("http://github.com/other/repo"),
        fetch("http://github.com/OWNER/%72epo/tree/main"),
        fetch("http://127.0.0.1:22/"),
        fetch("http://forbidden.example.org/x"),
        call("bash", cmd="echo not reached"),
    ]
    with website() as origin, endpoint(lambda number, messages: replies[number]) as served:
        addresses = dict.fromkeys(("allowed.example.org", "github.com", "forbidden.example.org"), origin)
        egress = ("--bubblewrap.egress.mode", '"open"', "--bubblewrap.egress.addresses", _toml(addresses))
        config = settings(*egress, "--refused_requests", "2", "--reading", "off", "--turn_limit", "9")
        record = played(tmp_path, tokenizer, task, served.url, config)
    said = results(record)
    assert said[0].startswith("200fetched")
    assert said[1].startswith("200fetched")
    assert said[2].startswith("403")
    assert said[4].startswith("403")
    assert (record.ending, len(record.turns), record.refused_requests) == ("blacklisted", 5, 2)
    assert {(found.kind, found.rule) for found in record.violations} == {
        ("attempted", "https://github.com/owner/repo"),
        ("attempted", "forbidden.example.org"),
    }
    (log,) = (tmp_path / "artifacts").glob("*.requests.jsonl")
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert [request["verdict"] for request in requests].count("allowed") == 2
    assert {request["rule"] for request in requests if request["rule"]} == {
        "https://github.com/owner/repo",
        "forbidden.example.org",
    }


def test_requests_refused_in_an_episode_that_is_cut_are_counted(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    task = tmp_path / "t10"
    shutil.copytree(tasks / "t10", task)
    (task / "blacklist.txt").write_text("forbidden.example.org\n")
    times = ("--timeout", "5s", "--hard_timeout", "6s", "--command_timeout", "5s")

    def script(number: int, messages: list[dict[str, object]]) -> Reply:
        if number < 2:  # waited for, which moves the soft limit behind the hard one
            return 429
        return call("bash", cmd="curl -s --max-time 2 http://forbidden.example.org/x; sleep 1000")

    with endpoint(script) as served:
        config = settings("--bubblewrap.egress.mode", '"open"', *times, "--reading", "off")
        record = played(tmp_path, tokenizer, task, served.url, config)
    assert (record.ending, record.refused_requests) == ("hard_timed_out", 1)


def test_without_it_there_is_no_network(tmp_path: Path, tasks: Path, tokenizer: Path) -> None:
    replies = [fetch("http://allowed.example.org/a")]
    with endpoint(lambda number, messages: replies[number]) as served:
        record = played(tmp_path, tokenizer, tasks / "t10", served.url, settings("--turn_limit", "1"))
    assert "Could not resolve host" in results(record)[0]


def played(folder: Path, tokenizer: Path, task: Path, url: str, config: object) -> EpisodeRecord:
    made = job(folder, tokenizer, task, url, config)  # type: ignore[arg-type]
    made = made.model_copy(update={"artifact_folder": str(folder / "artifacts")})
    run(made, load_model(made))
    (log,) = Path(made.log_folder).glob("*.eval")
    (record,) = export_records(log, Path(made.record_folder))
    return read_episode(record)


def _toml(table: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}" = "{value}"' for key, value in table.items()) + "}"
