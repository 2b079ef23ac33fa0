"""A real HTTP endpoint in OpenAI's chat format whose replies a test writes: it stands in for the large model only."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

type Reply = dict[str, Any] | int | Fault  # an assistant message, an HTTP status that means failure, or worse
type Script = Callable[[int, list[dict[str, Any]]], Reply]  # number of the request from 0, its messages


class Fault(StrEnum):
    """What a server may do instead of answering."""

    HANG = "hang"  # never answers
    CUT = "cut"  # closes the connection in the middle of the answer
    GARBAGE = "garbage"  # answers 200 with something that is not JSON
    EMPTY = "empty"  # a reply in which nothing is said
    TOO_LONG = "too long"  # 400, in OpenAI's words


def call(name: str, reasoning: str | None = "hm", **arguments: object) -> dict[str, Any]:
    """An assistant message with one tool call."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    calls = [{"id": "c", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "reasoning_content": reasoning, "tool_calls": calls}


def say(text: str, reasoning: str | None = None) -> dict[str, Any]:
    """An assistant message without a tool call."""
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


@dataclass
class Endpoint:
    """Where it listens, and every request body it was sent."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def endpoint(script: Script) -> Iterator[Endpoint]:
    """Serve `script` on a free loopback port."""
    served = Endpoint(url="")
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(body)
            reply = script(len(served.requests) - 1, body["messages"])
            if reply is Fault.HANG:
                over.wait()
                return
            status, sent = _answer(reply)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            if reply is Fault.CUT:
                self.close_connection = True
                sent = sent[: len(sent) // 2]
            self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def _answer(reply: Reply) -> tuple[int, bytes]:
    """Status and body."""
    match reply:
        case Fault.GARBAGE:
            return 200, b'{"id": "x", "choices": [{"ind'
        case Fault.TOO_LONG:
            error = {"message": "This model's maximum context length is 100 tokens.", "code": "context_length_exceeded"}
            return 400, json.dumps({"error": {**error, "type": "invalid_request_error", "param": "messages"}}).encode()
        case Fault():
            return 200, json.dumps(_completion(say(""))).encode()
        case int():
            return reply, json.dumps({"error": {"message": "scripted"}}).encode()
    return 200, json.dumps(_completion(reply)).encode()


def _completion(message: dict[str, Any]) -> dict[str, Any]:
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
