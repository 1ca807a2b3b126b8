"""A real HTTP server on loopback that speaks chat completions and counts what it is asked; how it answers is a function of the test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """How one request is answered. text: the message; body: other bytes instead; cut: the connection ends in the middle."""

    text: str = ""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    finish: str = "stop"
    refusal: str | None = None
    usage: tuple[int, int] | None = (100, 10)
    seconds: float = 0.0
    cut: bool = False


@dataclass
class Served:
    """What was asked so far, in order, and when."""

    answer: Callable[[dict[str, Any], int], Reply]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    die: Callable[[], None] = lambda: None  # from now on nobody answers there


class _Handler(BaseHTTPRequestHandler):
    served: Served
    anthropic = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.served.lock:
            number = len(self.served.bodies)
            self.served.bodies.append(body)
            self.served.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.served.paths.append(self.path)
            self.served.times.append(time.monotonic())
            self.served.active += 1
            self.served.most_active = max(self.served.most_active, self.served.active)
        try:
            reply = self.served.answer(body, number)
            time.sleep(reply.seconds)
            self._send(reply)
        except OSError:  # the client is gone
            pass
        finally:
            with self.served.lock:
                self.served.active -= 1

    def _send(self, reply: Reply) -> None:
        payload = reply.body if reply.body is not None else json.dumps(self._message(reply)).encode()
        self.send_response(reply.status)
        for name, value in (("content-type", "application/json"), *reply.headers):
            self.send_header(name, value)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2] if reply.cut else payload)

    def _message(self, reply: Reply) -> dict[str, Any]:
        if self.path.endswith("/messages"):
            return {
                "id": "m", "type": "message", "role": "assistant", "model": "fake", "stop_reason": reply.finish,
                "content": [{"type": "text", "text": reply.text}],
                "usage": {"input_tokens": reply.usage[0], "output_tokens": reply.usage[1]} if reply.usage else {},
            }  # fmt: skip
        message = {"role": "assistant", "content": reply.text, "refusal": reply.refusal}
        answer: dict[str, Any] = {
            "id": "c", "object": "chat.completion", "created": 0, "model": "fake",
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
        }  # fmt: skip
        if reply.usage:
            answer["usage"] = {
                "prompt_tokens": reply.usage[0],
                "completion_tokens": reply.usage[1],
                "total_tokens": sum(reply.usage),
            }
        return answer


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Served]:
    """Serve on a free port; `url` is the address up to and with /v1."""
    served = Served(answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()

    def die() -> None:
        server.shutdown()
        server.server_close()

    served.die = die
    try:
        yield served
    finally:
        die()
