"""NeMo's stock Ray server as one command: started, waited for, watched, and stopped with all it started.

    python -m megatron_klong.serve serve.toml --engine nemo_http        this module starts and watches
    python -m megatron_klong.serve.nemo_http JSON                       what it starts: upstream's DeployRay

It is for evaluation. Its replies are text: no token ids, sampling parameters of a batch's first request, words for
tokens in `usage`, so nothing may train on it; the line on stdout and the missing `exact_tokens` in /v1/models say so.
It has no token, no refit and no way to end a request; `seed` and `policy_epoch` have no effect (each start draws from
Megatron's default seed). One machine: a Ray cluster of others is not joined.

It has never run on a GPU here. What is tested (tests/unit/serve/test_nemo_http.py) is this module on a stand-in for
nemo-export-deploy 0.7.0's DeployRay, over real HTTP and with real processes.
"""

import asyncio
import contextlib
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx

from megatron_klong import processes
from megatron_klong.config import ConfigError
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.nemo_deployable import IMPORT_FAULTS, check_config, gpus_needed, not_installed

HEALTH = "/v1/health"
COMPLETIONS = "/v1/completions/"  # with the slash, or it is redirected
_START_SECONDS = 3600.0
_POLL_SECONDS = 0.2
_HEALTH_SECONDS = 5.0
_HEALTH_MISSES = 6  # in a row
_STOP_SECONDS = 30.0
_LINES = 20
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None)


class _Ended(RuntimeError):
    """The stock server does not serve (any more); the message says why."""


def serve_stock(config: ServeConfig, announce: Callable[[dict[str, Any]], None]) -> int:
    """Run it until SIGTERM or SIGINT; the exit status: 0 if so stopped, 1 if it ended by itself.

    `announce` is given its address once it has answered a prompt. Sets signal handlers, so it belongs in the main
    thread. Raises ConfigError, OSError for a port that is taken.
    """
    _check(config)
    with socket.create_server((config.host, config.port)) as taken:
        config = config.model_copy(update={"port": taken.getsockname()[1]})
    with _signalled() as stop, _started(config) as (process, printed):
        try:
            asyncio.run(_serve(config, process, stop, announce))
        except _Ended as error:
            printed.join()
            last = "\n".join(printed.last) or "it printed nothing"
            print(f"NeMo's stock server {error}; the last it printed:\n{last}", file=sys.stderr)
            return 1
    return 0


def _check(config: ServeConfig) -> None:
    check_config(config)
    if config.token_file is not None:
        raise ConfigError("token_file: NeMo's stock server asks for no token; leave it out, and listen on loopback")
    if config.tokenizer is not None:
        raise ConfigError("tokenizer: NeMo's stock server takes the checkpoint's own; leave it out")


@contextlib.contextmanager
def _signalled() -> Iterator[threading.Event]:
    """Set by SIGINT and SIGTERM, also by one that comes while all is being stopped: nothing is left half stopped."""
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _started(config: ServeConfig) -> Iterator[tuple["subprocess.Popen[bytes]", "_Printed"]]:
    """The server as a child; afterwards neither it nor anything that it started is there."""
    # Ray's processes lead sessions of their own: orphaned, they become children of this process and are found
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before = set(_children())
    process = processes.start(
        [sys.executable, "-m", "megatron_klong.serve.nemo_http", config.model_dump_json()],
        output=subprocess.PIPE,
        errors=subprocess.STDOUT,
        environment={"RAY_USAGE_STATS_ENABLED": "0"},  # it would report to its makers
    )
    assert process.stdout is not None
    printed = _Printed(process.stdout)
    try:
        yield process, printed
    finally:
        processes.stop(process, seconds=_STOP_SECONDS)
        while orphans := set(_children()) - before:  # each that goes may leave children of its own
            for orphan in orphans:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(orphan, signal.SIGKILL)
                    os.waitpid(orphan, 0)
        printed.join()


async def _serve(
    config: ServeConfig,
    process: "subprocess.Popen[bytes]",
    stop: threading.Event,
    announce: Callable[[dict[str, Any]], None],
) -> None:
    """Until a signal comes. Raises _Ended."""

    async def stopped() -> None:
        while not stop.is_set():
            await asyncio.sleep(_POLL_SECONDS)

    tasks = [asyncio.ensure_future(work) for work in (stopped(), _exit_of(process), _reached(config, announce))]
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        if not stop.is_set():  # else it may have been signalled, too, and have ended first
            task.result()


async def _reached(config: ServeConfig, announce: Callable[[dict[str, Any]], None]) -> None:
    """Over HTTP: until it answers, and from then on. Raises _Ended."""
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    # the server is named outright: proxies of the environment are for other traffic
    async with httpx.AsyncClient(
        base_url=f"http://{host}:{config.port}", trust_env=False, timeout=_HEALTH_SECONDS
    ) as http:
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _answers(http)
        except TimeoutError:
            raise _Ended(f"did not answer within {_START_SECONDS:g} s") from None
        url = f"http://{config.host}:{config.port}"
        announce({"url": url, "model": config.name, "engine": "nemo_http", "exact_tokens": False})
        await _stays_healthy(http)


async def _exit_of(process: "subprocess.Popen[bytes]") -> None:
    while (status := process.poll()) is None:
        await asyncio.sleep(_POLL_SECONDS)
    raise _Ended(f"exited with {status}")


async def _answers(http: httpx.AsyncClient) -> None:
    """Until it answers a prompt. Its health says nothing of the model: the workers that read it are not waited for."""
    while not await _healthy(http):
        await asyncio.sleep(_POLL_SECONDS)
    body = {"prompt": "a", "max_tokens": 1, "temperature": 0.0, "top_p": 0.0}
    try:
        response = await http.post(COMPLETIONS, json=body, timeout=None)  # it waits for the weights
    except httpx.HTTPError as error:
        await asyncio.sleep(5 * _POLL_SECONDS)  # if it has exited, that is the better message
        raise _Ended(f"broke off its first reply ({type(error).__name__}: {error})") from None
    if response.status_code != httpx.codes.OK:
        raise _Ended(f"answered its first prompt with {response.status_code}: {response.text[:500]}")


async def _stays_healthy(http: httpx.AsyncClient) -> None:
    """For ever. Raises _Ended."""
    misses = 0
    while misses < _HEALTH_MISSES:
        await asyncio.sleep(_HEALTH_SECONDS)
        misses = 0 if await _healthy(http) else misses + 1
    raise _Ended(f"did not answer {HEALTH} {misses} times in a row")


async def _healthy(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get(HEALTH)).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


class _Printed:
    """What a child prints: passed on to our stderr as it comes; `last` keeps its last lines."""

    def __init__(self, output: IO[bytes]) -> None:
        self.last: deque[str] = deque(maxlen=_LINES)
        self._output = output
        self._thread = threading.Thread(target=self._read, name="nemo-output", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait, not for long, for what an ended child has printed: what it left behind may hold its output open."""
        self._thread.join(1.0)

    def _read(self) -> None:
        with self._output:
            for line in self._output:
                text = line.decode(errors="replace").rstrip()
                self.last.append(text)
                print(text, file=sys.stderr, flush=True)


def _children() -> Iterator[int]:
    """Of this process, dead ones included."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            # pid (name) state parent ...; a name may hold anything
            if int(status.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(status.parent.name)


def main(argv: list[str]) -> int:
    """The child: upstream's deployment, which returns at SIGTERM only."""
    config = ServeConfig.model_validate_json(argv[0])
    try:
        _deploy(config)
    except ConfigError as error:
        print(f"megatron_klong.serve.nemo_http: {error}", file=sys.stderr)
        return 2
    return 0


def _deploy(config: ServeConfig) -> None:
    try:
        deployment = importlib.import_module("nemo_deploy.deploy_ray")
        if not deployment.HAVE_RAY:  # one flag for all its imports, whichever failed: this one says which
            importlib.import_module("nemo_deploy.llm.megatronllm_deployable_ray")
            raise ImportError("nemo_deploy.deploy_ray could not import what it deploys")
    except IMPORT_FAULTS as error:
        raise not_installed(error) from error
    layout, gpus = config.layout, gpus_needed(config.layout)
    # "auto" would join whatever cluster runs on this machine, somebody else's too
    deployer = deployment.DeployRay(address="local", num_gpus=gpus, host=config.host, port=config.port)
    deployer.deploy_inframework_model(
        megatron_checkpoint=config.weights,
        num_gpus=gpus,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        sequence_parallel=layout.tensor_parallel > 1,
        model_id=config.name,
        num_cpus_per_replica=1,  # 8 by default, and with fewer in the allocation it would wait for them for ever
        max_batch_size=config.max_requests,
        inference_max_seq_length=config.max_sequence_length,
        buffer_size_gb=config.kv_cache_gib,  # not one of its own parameters; handed on to each worker's deployable
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
