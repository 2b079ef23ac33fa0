"""NeMo's stock server as a child, on a stand-in for upstream's DeployRay (fake_nemo): real processes, real HTTP."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_klong.config import ConfigError
from megatron_klong.serve.client import Client, ServerError
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.nemo_http import serve_stock
from megatron_klong.serve.protocol import Completion, CompletionRequest, ProtocolError, ReplyError
from tests.conftest import REPOSITORY
from tests.ports import free_port

FAKE = Path(__file__).parent / "fake_nemo"
PROGRAM = """
import json, sys
from megatron_klong.serve import nemo_http
from megatron_klong.serve.config import ServeConfig
for name, value in json.loads(sys.argv[2]).items():
    assert hasattr(nemo_http, name)
    setattr(nemo_http, name, value)
announce = lambda line: print(json.dumps(line), flush=True)
sys.exit(nemo_http.serve_stock(ServeConfig.model_validate_json(sys.argv[1]), announce))
"""
WAIT = 60.0


@dataclass
class Launcher:
    """The program that starts the server, and what it has printed."""

    process: "subprocess.Popen[str]"
    folder: Path

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors()
        return dict(json.loads(line))

    def ended(self) -> int:
        return self.process.wait(WAIT)

    def errors(self) -> str:
        return (self.folder / "errors").read_text()

    def record(self) -> dict[str, Any]:
        """How the stock server was called, and which processes there are of it."""
        file = self.folder / "record"
        until(lambda: file.exists() and file.read_text().endswith("}"))
        return dict(json.loads(file.read_text()))


def until(true: Any) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    (tmp_path / "run_config.yaml").write_text("model:\n  bf16: true\n")
    return ServeConfig(weights=str(tmp_path), precision="bf16", kv_cache_gib=20, port=free_port())


@pytest.fixture
def launch(tmp_path: Path, config: ServeConfig) -> Iterator[Any]:
    launched: list[Launcher] = []

    def start(fault: str = "", *, python_path: Path = FAKE, **constants: float) -> Launcher:
        constants = {"_HEALTH_SECONDS": 0.5, "_HEALTH_MISSES": 2, "_STOP_SECONDS": 20.0, **constants}
        environment = {"PYTHONPATH": str(python_path), "FAKE_NEMO": fault, "FAKE_NEMO_RECORD": str(tmp_path / "record")}
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, config.model_dump_json(), json.dumps(constants)],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        launched.append(Launcher(process, tmp_path))
        return launched[-1]

    yield start
    for one in launched:
        one.process.kill()
        one.process.wait()
        if (tmp_path / "record").exists():
            for pid in filter(alive, one.record()["pids"]):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_announced_when_it_answers_and_stopped_with_all_it_started(
    launch: Any, config: ServeConfig, number: int
) -> None:
    launcher = launch()
    url = f"http://127.0.0.1:{config.port}"
    assert launcher.line() == {"url": url, "model": "policy", "engine": "nemo_http", "exact_tokens": False}
    assert httpx.get(url + "/v1/health", trust_env=False).json() == {"status": "healthy"}
    pids = launcher.record()["pids"]
    assert all(map(alive, pids))
    launcher.process.send_signal(number)
    assert launcher.ended() == 0
    assert not any(map(alive, pids))


def test_the_stock_server_is_given_what_was_configured(launch: Any, config: ServeConfig) -> None:
    launcher = launch()
    launcher.line()
    record = launcher.record()
    assert record["made"] == {"address": "local", "num_gpus": 1, "host": "127.0.0.1", "port": config.port}
    called = record["called"]
    assert (called["megatron_checkpoint"], called["model_id"], called["max_batch_size"]) == (
        config.weights,
        "policy",
        32,
    )
    assert (called["inference_max_seq_length"], called["model_config_kwargs"]) == (4096, {"buffer_size_gb": 20})


def test_nothing_can_be_trained_on_it(launch: Any) -> None:
    url = launch().line()["url"]

    async def run() -> None:
        async with Client(url) as client:
            with pytest.raises(ServerError, match="307"):
                await client.complete(CompletionRequest(prompt_token_ids=(1, 2), max_tokens=1))
            with pytest.raises(ProtocolError, match="max_model_len"):
                await client.max_sequence_length()

    asyncio.run(run())
    prompts: tuple[Any, ...] = ([1, 2], "a")
    of_ids, of_text = (
        httpx.post(url + "/v1/completions/", json={"prompt": prompt, "max_tokens": 1}, trust_env=False)
        for prompt in prompts
    )
    assert of_ids.status_code == 500
    with pytest.raises(ReplyError):
        Completion.from_wire(of_text.json())


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("dies", "exited with 1; the last it printed:\nCUDA out of memory"),
        ("no model", "answered its first prompt with 500: .*The actor died"),
        ("no ray", "(?s)exited with 2.*transformer_engine.*requirements-gpu.txt"),
    ],
)
def test_a_server_that_does_not_come_up_is_an_error_that_quotes_it(launch: Any, fault: str, named: str) -> None:
    launcher = launch(fault)
    assert launcher.ended() == 1
    assert launcher.process.stdout.read() == ""
    assert re.search(named, launcher.errors()), launcher.errors()
    if fault != "no ray":
        assert not any(map(alive, launcher.record()["pids"]))


def test_where_nemo_is_not_installed_the_cure_is_named(launch: Any, tmp_path: Path) -> None:
    launcher = launch(python_path=tmp_path)
    assert launcher.ended() == 1
    assert "No module named 'nemo_deploy'" in launcher.errors()
    assert "requirements-gpu.txt" in launcher.errors()
    assert "--engine megatron" in launcher.errors()


def test_a_server_that_is_killed_later_is_noticed(launch: Any) -> None:
    launcher = launch()
    launcher.line()
    pids = launcher.record()["pids"]
    os.kill(pids[0], signal.SIGKILL)
    assert launcher.ended() == 1
    assert "exited with -9" in launcher.errors()
    assert not any(map(alive, pids))


def test_a_server_that_no_longer_answers_is_noticed(launch: Any) -> None:
    launcher = launch("deaf")
    launcher.line()
    assert launcher.ended() == 1
    assert "did not answer /v1/health 2 times in a row" in launcher.errors()
    assert not any(map(alive, launcher.record()["pids"]))


def test_a_server_that_takes_too_long_is_given_up(launch: Any) -> None:
    launcher = launch("never", _START_SECONDS=1.0)
    assert launcher.ended() == 1
    assert "did not answer within 1 s" in launcher.errors()


def test_it_is_stopped_while_it_starts(launch: Any) -> None:
    launcher = launch("never")
    pids = launcher.record()["pids"]
    launcher.process.terminate()
    assert launcher.ended() == 0
    assert not any(map(alive, pids))


def test_a_server_that_does_not_stop_is_killed(launch: Any) -> None:
    launcher = launch("stubborn", _STOP_SECONDS=1.0)
    launcher.line()
    launcher.process.terminate()
    time.sleep(0.5)
    launcher.process.terminate()  # a second signal does not leave it half stopped
    assert launcher.ended() == 0
    assert not any(map(alive, launcher.record()["pids"]))


def test_the_server_does_not_outlive_a_launcher_that_is_killed(launch: Any) -> None:
    launcher = launch()
    launcher.line()
    launcher.process.kill()
    server = launcher.record()["pids"][0]
    until(lambda: not alive(server))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"token_file": "token"}, "token_file"),
        ({"tokenizer": "tokenizer.json"}, "tokenizer"),
        ({"kv_cache_gib": 0.5}, "kv_cache_gib"),
        ({"weights": "/nowhere"}, "weights /nowhere"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_started(
    config: ServeConfig, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        serve_stock(config.model_copy(update=settings), announce=lambda line: pytest.fail("started"))
