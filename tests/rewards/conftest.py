"""A local HTTP server that speaks the OpenAI chat format and does what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Answer:
    """What the server does with one request. `content` None leaves the message without one."""

    content: str | None = "Fine.\nVerdict: 7"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # instead of a chat completion
    cut: int = 0  # bytes that the body is short of its Content-Length
    delay: float = 0.0
    finish_reason: str = "stop"
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    reasoning: str = ""


@dataclass
class Server:
    """`url` for base_url; what came in: requests, their headers, when, and how many at a time at most."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_a_time: int = 0

    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@pytest.fixture
def says() -> type[Answer]:
    """What the server may be told to say; a fixture, as tests cannot import each other."""
    return Answer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`with serve(answer) as server`."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return chat_server


@contextmanager
def chat_server(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Server]:
    """Serves `answer(request, how many came before)` until the block ends."""
    server, lock, now = Server(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.requests)
                server.requests.append(request)
                server.headers.append({key.lower(): value for key, value in self.headers.items()})
                server.times.append(time.monotonic())
                now[0] += 1
                server.most_at_a_time = max(server.most_at_a_time, now[0])
            try:
                self._send(answer(request, number))
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up
            finally:
                with lock:
                    now[0] -= 1

        def _send(self, said: Answer) -> None:
            time.sleep(said.delay)
            message = {"role": "assistant", "content": said.content, "reasoning_content": said.reasoning}
            choice = {"index": 0, "message": message, "finish_reason": said.finish_reason}
            body = said.raw
            if body is None:
                body = json.dumps({"choices": [choice], **({"usage": said.usage} if said.usage else {})}).encode()
            self.send_response(said.status)
            self.send_header("Content-Length", str(len(body) + said.cut))
            for key, value in said.headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = bool(said.cut)

        def log_message(self, *_: object) -> None:
            pass

    class Http(ThreadingHTTPServer):
        request_queue_size = 128  # of 5, a burst of connections loses some, and waits a second for them

    with Http(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
