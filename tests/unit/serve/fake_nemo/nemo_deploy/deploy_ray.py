"""See nemo_deploy. In the environment, FAKE_NEMO says what goes wrong, FAKE_NEMO_RECORD where it notes its arguments.

Like Ray, it leaves a process in a session of its own; like upstream's deployment, it is healthy before its model is.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_FAULT = os.environ.get("FAKE_NEMO", "")
HAVE_RAY = _FAULT != "no ray"


class DeployRay:
    def __init__(
        self,
        address: str = "auto",
        num_cpus: int | None = None,
        num_gpus: int = 1,
        include_dashboard: bool = False,
        ignore_reinit_error: bool = True,
        runtime_env: dict[str, Any] | None = None,
        host: str = "0.0.0.0",
        port: int | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self._made_with = {"address": address, "num_gpus": num_gpus, "host": host, "port": port}
        self._daemon = subprocess.Popen(["sleep", "1000"], start_new_session=True)

    def deploy_inframework_model(
        self,
        megatron_checkpoint: str,
        num_gpus: int = 1,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        expert_tensor_parallel_size: int = 1,
        context_parallel_size: int = 1,
        sequence_parallel: bool = False,
        model_id: str = "megatron-model",
        num_cpus_per_replica: float = 8,
        num_replicas: int = 1,
        enable_cuda_graphs: bool = False,
        enable_flash_decode: bool = False,
        legacy_ckpt: bool = False,
        max_batch_size: int = 32,
        inference_max_seq_length: int = 4096,
        random_seed: int | None = None,
        test_mode: bool = False,
        model_type: str = "gpt",
        micro_batch_size: int | None = None,
        batch_wait_timeout_s: float = 0.1,
        legacy_model_format: bool = False,
        **model_config_kwargs: Any,
    ) -> None:
        called_with = {name: value for name, value in locals().items() if name != "self"}
        # what reaches the constructor of each worker's MegatronLLMDeployable by name, of all that could be written here
        assert model_config_kwargs.keys() <= {
            "buffer_size_gb",
            "params_dtype",
            "inference_batch_times_seqlen_threshold",
        }
        record = {"made": self._made_with, "called": called_with, "pids": [os.getpid(), self._daemon.pid]}
        Path(os.environ["FAKE_NEMO_RECORD"]).write_text(json.dumps(record))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if _FAULT == "stubborn" else lambda *_: sys.exit(0))
        if _FAULT == "dies":
            print("CUDA out of memory", flush=True)  # which upstream logs before it exits
            sys.exit(1)
        if _FAULT == "never":
            time.sleep(1000)
        server = ThreadingHTTPServer((self.host, self.port or 0), _handler(model_id))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while not test_mode:
            signal.pause()


def _handler(model_id: str) -> type[BaseHTTPRequestHandler]:
    asked = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        """MegatronRayDeployable's four routes; starlette redirects to those that end with a slash."""

        def do_GET(self) -> None:
            if _FAULT == "deaf" and asked.is_set():
                self.answer(503, {})
            elif self.path == "/v1/health":
                self.answer(200, {"status": "healthy"})
            else:
                entry = {"id": model_id, "object": "model", "created": 0}
                self.answer(200, {"data": [entry], "object": "list"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self.path.endswith("/"):
                self.send_response(307)
                self.send_header("location", self.path + "/")
                self.send_header("content-length", "0")
                self.end_headers()
            elif _FAULT == "no model":
                self.answer(500, {"detail": "Error during inference: The actor died"})
            elif not isinstance(body["prompt"], str):
                self.answer(500, {"detail": "Error during inference: 'list' object has no attribute 'split'"})
            else:
                asked.set()
                logprobs = {"token_logprobs": None, "top_logprobs": None}
                choice = {"text": "b", "index": 0, "logprobs": logprobs, "finish_reason": "length"}
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                reply = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": model_id}
                self.answer(200, {**reply, "choices": [choice], "usage": usage})

        def answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler
