"""The batch interfaces of OpenAI and of Anthropic on loopback: a batch ends at the n-th look at it; requests are answered as the test says."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Outcome = tuple[int, Any]  # status and body of one request; status 0: the batch expired before its turn
NEVER = 10**9
OFTEN = {"type": "message_batch", "created_at": "2026-01-01T00:00:00Z", "expires_at": "2026-01-02T00:00:00Z"}


@dataclass
class Batches:
    """What was sent so far. looks: how often a batch is looked at before it has ended; faults: statuses of the next requests, used up in order."""

    answer: Callable[[dict[str, Any]], Outcome]
    looks: int = 1
    faults: list[int] = field(default_factory=list)
    failed: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    url: str = ""

    def requests(self) -> list[dict[str, Any]]:
        """Bodies of all requests of all batches."""
        return [body for rows in self.batches.values() for _, body in rows]


class _Handler(BaseHTTPRequestHandler):
    served: Batches

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        served = self.served
        served.calls.append(f"POST {self.path}")
        if served.faults and (status := served.faults.pop(0)):
            return self._send({"error": "fault"}, status)
        if self.path == "/v1/files":
            name = f"file-{len(served.files)}"
            assert b'name="purpose"\r\n\r\nbatch' in data.replace(b"content-disposition", b"Content-Disposition")
            served.files[name] = re.search(rb"\r\n\r\n(\{.*\}\n)\r\n--", data, re.DOTALL)[1]
            return self._send(
                {"id": name, "object": "file", "bytes": len(data), "created_at": 0, "filename": "f", "purpose": "batch"}
            )
        asked = json.loads(data)
        name = f"batch-{len(served.batches)}"
        if self.path == "/v1/batches":
            assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
            rows = [json.loads(line) for line in served.files[asked["input_file_id"]].splitlines()]
            assert {(row["method"], row["url"]) for row in rows} == {("POST", "/v1/chat/completions")}
            served.batches[name] = [(row["custom_id"], row["body"]) for row in rows]
        else:
            served.batches[name] = [(row["custom_id"], row["params"]) for row in asked["requests"]]
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", key) for key, _ in served.batches[name])  # what Anthropic takes
        return self._send(self._state(name))

    def do_GET(self) -> None:
        served = self.served
        served.calls.append(f"GET {self.path}")
        if served.faults and (status := served.faults.pop(0)):
            return self._send({"error": "fault"}, status)
        if (file := re.fullmatch(r"/v1/files/(\w+)-(batch-\d+)/content", self.path)) is not None:
            good = file[1] == "output"
            rows = []
            for key, body in served.batches[file[2]]:
                status, said = served.answer(body)
                if (status == 200) == good:
                    response = {"status_code": status, "request_id": "r", "body": said} if status else None
                    rows.append(
                        {
                            "id": "x",
                            "custom_id": key,
                            "response": response,
                            "error": None if status else {"code": "batch_expired"},
                        }
                    )
            return self._bytes("".join(json.dumps(row) + "\n" for row in reversed(rows)).encode())
        if (results := re.fullmatch(r"/v1/messages/batches/(batch-\d+)/results", self.path)) is not None:
            kinds = {200: "succeeded", 0: "expired"}
            rows = []
            for key, body in served.batches[results[1]]:
                status, said = served.answer(body)
                result: dict[str, Any] = {"type": kinds.get(status, "errored")}
                if status == 200:
                    result["message"] = said
                elif status:
                    kind = "invalid_request_error" if status == 400 else "api_error"
                    result["error"] = {"type": "error", "error": {"type": kind, "message": str(said)}}
                rows.append({"custom_id": key, "result": result})
            return self._bytes("".join(json.dumps(row) + "\n" for row in reversed(rows)).encode())
        name = self.path.rsplit("/", 1)[-1]
        if name not in served.batches:
            return self._send({"error": "no such batch"}, 404)
        served.seen[name] = served.seen.get(name, 0) + 1
        return self._send(self._state(name))

    def _state(self, name: str) -> dict[str, Any]:
        ended = self.served.seen.get(name, 0) > self.served.looks
        if "/messages/" in self.path:
            counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
            url = f"{self.served.url}/messages/batches/{name}/results" if ended else None
            return {
                **OFTEN,
                "id": name,
                "processing_status": "ended" if ended else "in_progress",
                "request_counts": counts,
                "results_url": url,
            }
        state = {
            "id": name,
            "object": "batch",
            "created_at": 0,
            "completion_window": "24h",
            "endpoint": "/v1/chat/completions",
            "input_file_id": "f",
        }
        if self.served.failed:
            return {
                **state,
                "status": "failed",
                "errors": {"object": "list", "data": [{"code": "x", "message": self.served.failed}]},
            }
        files = {"output_file_id": f"output-{name}", "error_file_id": f"errors-{name}"} if ended else {}
        return {**state, "status": "completed" if ended else "in_progress", **files}

    def _send(self, value: Any, status: int = 200) -> None:
        self._bytes(json.dumps(value).encode(), status, "application/json")

    def _bytes(self, payload: bytes, status: int = 200, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@contextmanager
def serving_batches(answer: Callable[[dict[str, Any]], Outcome], **settings: Any) -> Iterator[Batches]:
    """Serve on a free port; `url` is the address up to and with /v1."""
    served = Batches(answer, **settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
