"""`python -m megatron_klong.serve serve.toml`: serve a policy until SIGTERM or SIGINT.

    python -m megatron_klong.serve examples/quickstart/serve.toml                                one process
    torchrun --nproc-per-node 2 -m megatron_klong.serve serve.toml --layout.tensor_parallel 2    a divided model
    python -m megatron_klong.serve serve.toml --engine nemo_http                                 NeMo's own server

One line of JSON on stdout says where, once requests are answered; all else goes to stderr. Stopped by a signal it
finishes what is in flight (as long as `drain_seconds`) and exits with 0; if the engine fails, with 1.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import uvicorn

from megatron_klong.config import ConfigError, parse_command_line
from megatron_klong.model.checkpoint_folder import MANIFEST
from megatron_klong.model.config import ModelConfig
from megatron_klong.processes import end_with_launcher
from megatron_klong.serve.app import Front
from megatron_klong.serve.config import ServeConfig
from megatron_klong.serve.interface import Engine
from megatron_klong.serve.listener import listen
from megatron_klong.serve.protocol import EngineStopped
from megatron_klong.trajectory.tokenizer import Tokenizer, TokenizerError, load_tokenizer

PROGRAM = "python -m megatron_klong.serve"


def main(argv: list[str]) -> int:
    end_with_launcher()
    asked = parse_command_line(
        ServeConfig, argv, program=PROGRAM, description="Serve a policy over HTTP: token ids in, token ids out."
    )
    if asked.dry_run:
        return 0
    # what libraries print must not stand beside the one line
    announcements = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        if asked.config.engine == "nemo_http":
            from megatron_klong.serve.nemo_http import serve_stock

            return serve_stock(asked.config, lambda line: print(json.dumps(line), file=announcements))
        if os.environ.get("RANK", "0") != "0":
            return _follow(asked.config)
        return _serve(asked.config, announcements)
    except (ConfigError, TokenizerError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the weights were read; later it is a request to finish
        return 130


def _serve(config: ServeConfig, announcements: IO[str]) -> int:
    # taken before the weights are read, so that a port in use is known at once
    listener = listen(config)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    token = _token(config)
    engine = _engine(config, tokenizer)
    engine.start()
    host, port = listener.getsockname()[:2]
    settings = uvicorn.Config(
        Front(config, engine, tokenizer=tokenizer, token=token).app(),
        log_config=None,
        lifespan="off",
        timeout_graceful_shutdown=config.drain_seconds,
        timeout_keep_alive=60,
    )
    server = _Server(settings, {"url": f"http://{host}:{port}", "model": config.name}, announcements)
    engine.on_failure = server.request_exit
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        engine.stop()
    if engine.failure is not None:
        traceback.print_exception(engine.failure)
        print(f"{PROGRAM}: the engine failed: {engine.failure!r}", file=sys.stderr)
        return 1
    return 0


def _follow(config: ServeConfig) -> int:
    """On another rank than 0: do what that one says. It is stopped by it, too; a launcher signals all of them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        _engine(config, None).follow()
    except EngineStopped as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def _engine(config: ServeConfig, tokenizer: Tokenizer | None) -> Engine:
    if config.engine == "nemo":
        from megatron_klong.serve.nemo import NemoEngine

        return NemoEngine(config)
    if not (folder := Path(config.weights) / MANIFEST).is_file():  # said before the imports, which take seconds
        ModelConfig.from_hugging_face(folder.parent)
    # Megatron's engine imports it to log what a server logs otherwise, which takes seconds (see megatron_ready)
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # None: there is no such module
    from megatron_klong.serve.engine import MegatronEngine  # here: --help must not import torch

    return MegatronEngine(config, tokenizer)


def _token(config: ServeConfig) -> str | None:
    if config.token_file is None:
        return None
    lines = Path(config.token_file).read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ConfigError(f"token_file {config.token_file}: its first line is empty; put the token there")
    return lines[0].strip()


class _Server(uvicorn.Server):
    """uvicorn's server, which announces itself and ends a signalled run with 0 instead of by that signal."""

    def __init__(self, config: uvicorn.Config, announcement: dict[str, Any], to: IO[str]) -> None:
        super().__init__(config)
        self._announcement = announcement
        self._to = to

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._to.write(json.dumps(self._announcement) + "\n")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield

    def request_exit(self) -> None:
        """Callable from any thread."""
        self.should_exit = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
