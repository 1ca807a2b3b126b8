"""What stands between the network and the labelling page (and the chat page): pure ASGI, so that it costs next to nothing a request.

`Guard` answers hosts that the server was not started for (DNS rebinding) and bodies that are too large before anything reads them,
refuses posts from another origin, and puts the security headers on every response: no script, style, image or frame from anywhere
but this server. `Attempts` slows down whoever guesses tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

BODY_LIMIT = 16 * 1024  # bytes; the largest form is an adjudication with its note
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (
        b"referrer-policy",
        b"same-origin",
    ),  # invitation links must not travel; no-referrer would hide the origin of our own forms too
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
]
PRIVATE = (b"cache-control", b"no-store")


class Attempts:
    """At most `limit` failures in `window` seconds from one address."""

    def __init__(self, limit: int = 10, window: float = 60.0, clock: Callable[[], float] = time.monotonic):
        self.limit, self.window, self._clock = limit, window, clock
        self._failures: dict[str, deque[float]] = {}

    def blocked(self, address: str) -> bool:
        """Whether this address has failed too often lately."""
        failures = self._failures.get(address)
        if not failures:
            return False
        while failures and self._clock() - failures[0] > self.window:
            failures.popleft()
        return len(failures) >= self.limit

    def fail(self, address: str) -> None:
        """Count one failure. The table forgets its oldest address beyond 10,000, so that it cannot be filled."""
        if address not in self._failures and len(self._failures) >= 10_000:
            del self._failures[next(iter(self._failures))]
        failures = self._failures.setdefault(address, deque(maxlen=self.limit))
        failures.append(self._clock())


class Guard:
    """See the module's docstring. hosts: names in the Host header that are this server's."""

    def __init__(self, app: App, hosts: Collection[str]):
        self.app = app
        self.hosts = frozenset(hosts)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        static = scope["path"].startswith("/static/")

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS, *([] if static else [PRIVATE])]
            await send(message)

        refusal = self._refusal(scope["method"], headers)
        if refusal:
            await _plain(guarded, *refusal)
            return
        body = b""
        if scope["method"] == "POST":
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > BODY_LIMIT:
                    await _plain(guarded, 413, "That is too much at once.")
                    return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, guarded)

    def _refusal(self, method: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = headers.get(b"host", "")
        if urlsplit(f"//{host}").hostname not in self.hosts:
            return (
                421,
                "This server does not answer under that name. Start it with --host (or, for the labelling page, --url) for it.",
            )
        if method not in ("GET", "HEAD", "POST"):
            return 405, "Not allowed."
        if method == "POST":
            origin = headers.get(b"origin")
            if (origin is not None and urlsplit(origin).netloc != host) or headers.get(b"sec-fetch-site", "same-origin") not in (
                "same-origin",
                "none",
            ):
                return 403, "Forms are accepted from this server's own pages only."
            length = headers.get(b"content-length", "0")
            if not length.isdigit() or int(length) > BODY_LIMIT:
                return 413, "That is too much at once."
        return None


def csrf_token(secret: str) -> str:
    """A session's CSRF token: a keyed hash of the cookie's secret, so that it outlives a restart wherever the secret does."""
    return hmac.new(secret.encode(), b"csrf", hashlib.sha256).hexdigest()


async def _plain(send: Send, status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": text.encode()})
