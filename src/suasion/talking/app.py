"""The conversation as a local page: FastAPI routes over a `Talk`, server-made HTML, one small script for streaming.

The same safety as the labelling page: loopback only, a link with a token that the command prints (other users of a machine can reach its
loopback), SameSite=Strict and HttpOnly cookie, CSRF token, no script or style from elsewhere, bounded forms. In blind mode names of models
are not on the wire until they are asked for. Without script the page works too: the replies then come all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import queue
import secrets
import threading
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

from suasion import labeling
from suasion.errors import UserError
from suasion.labeling.guard import Attempts, Guard, csrf_token
from suasion.labeling.server import LOOPBACK, listen
from suasion.talking.talk import LONGEST_MESSAGE, Talk

PAGES = Path(__file__).parent / "pages"
LABELING = Path(labeling.__file__).parent / "pages"
STATIC = {"chat.css": "text/css", "chat.js": "text/javascript", "icon.svg": "image/svg+xml"}
STREAM = "application/x-ndjson"


class Refused(Exception):
    """A request that gets a page saying why, instead of what it asked for."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


async def _form(request: Request) -> dict[str, list[str]]:
    """The fields of a posted form; the guard has bounded its size."""
    return parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=50)


Form = Annotated[dict[str, list[str]], Depends(_form)]


def make_app(talk: Talk, token: str, hosts: Collection[str]) -> Guard:
    """The page over a talk. token: what the printed link holds."""
    return Guard(Page(talk, token).app, hosts)


def serve(talk: Talk, port: int, console: Console) -> None:
    """Serve on loopback until interrupted; prints the link."""
    listener = listen("127.0.0.1", port)
    token = secrets.token_urlsafe(32)
    try:
        config = uvicorn.Config(
            make_app(talk, token, LOOPBACK), access_log=False, log_level="warning", server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=3,
        )  # fmt: skip
        console.print("Talk to the models of this run here, until Ctrl-C:")
        console.print(f"  http://127.0.0.1:{listener.getsockname()[1]}/in/{token}", soft_wrap=True, markup=False)
        with contextlib.suppress(KeyboardInterrupt):  # the ordinary way to stop it
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        talk.stop()
        listener.close()


class Page:
    """Routes and the session."""

    def __init__(self, talk: Talk, token: str):
        self.talk, self._token = talk, token
        self._secret = secrets.token_urlsafe(32)
        self._attempts = Attempts()
        self.cookie = f"suasion-chat-{secrets.token_hex(4)}"  # cookies do not tell ports apart
        self.pages = Environment(
            loader=PackageLoader("suasion.talking", "pages"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        app = self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(Refused, self._refused)
        app.add_exception_handler(UserError, self._user_error)
        app.get("/in/{token}")(self.enter)
        app.get("/")(self.home)
        app.get("/static/{name}")(self.static)
        app.post("/say")(self.say)
        app.post("/stop")(self.stop)
        app.post("/new")(self.new)
        app.post("/reveal")(self.reveal)

    def enter(self, request: Request, token: str) -> Response:
        """Open the session."""
        address = request.client.host if request.client else ""
        if self._attempts.blocked(address):
            raise Refused(429, "Too many attempts. Wait a minute, then open the link again.")
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            self._attempts.fail(address)
            raise Refused(403, "This link is not valid. The command prints a new one at every start.")
        response = RedirectResponse("/", 303)
        response.set_cookie(self.cookie, self._secret, httponly=True, samesite="strict")
        return response

    def home(self, request: Request) -> Response:
        """The conversation so far."""
        self._known(request)
        return self._page()

    async def say(self, request: Request, form: Form) -> Response:
        """One message: as a stream of lines for the script, as the whole page for a browser without it."""
        self._known(request, form)
        message = form.get("message", [""])[-1]
        if request.headers.get("accept") == STREAM:
            return StreamingResponse(self._stream(message), media_type=STREAM)
        await asyncio.to_thread(self.talk.say, message, lambda place, text: None)
        return RedirectResponse("/", 303)

    async def _stream(self, message: str) -> AsyncIterator[str]:
        """JSON lines {place, text} while a reply grows, {place, finish} for each that ended, {error} where there is none."""
        lines: queue.Queue[dict[str, Any] | None] = queue.Queue()

        def speak() -> None:
            try:
                self.talk.say(
                    message,
                    lambda place, text: lines.put({"place": place, "text": text}),
                    lambda place, reply: lines.put({"place": place, "text": reply.text, "finish": reply.finish}),
                )
            except UserError as error:
                lines.put({"error": str(error)})
            finally:
                lines.put(None)

        threading.Thread(target=speak, daemon=True).start()
        ended = False
        try:
            while (line := await asyncio.to_thread(lines.get)) is not None:
                yield json.dumps(line) + "\n"
            ended = True
        finally:
            if not ended:  # the browser went away
                self.talk.stop()

    def stop(self, request: Request, form: Form) -> Response:
        """End the reply that is under way."""
        self._known(request, form)
        self.talk.stop()
        return RedirectResponse("/", 303)

    def new(self, request: Request, form: Form) -> Response:
        """Begin again, with the chosen models."""
        self._known(request, form)
        self.talk.begin(form.get("model", []), "blind" in form)
        return RedirectResponse("/", 303)

    def reveal(self, request: Request, form: Form) -> Response:
        """Names instead of letters."""
        self._known(request, form)
        self.talk.reveal()
        return RedirectResponse("/", 303)

    def static(self, name: str) -> Response:
        """The style sheet, the script, and the labelling page's icon."""
        if name not in STATIC:
            raise HTTPException(404)
        return FileResponse(
            (LABELING if name == "icon.svg" else PAGES) / name, media_type=STATIC[name], headers={"cache-control": "no-cache"}
        )

    def _known(self, request: Request, form: dict[str, list[str]] | None = None) -> None:
        if not hmac.compare_digest(request.cookies.get(self.cookie, "").encode(), self._secret.encode()):
            raise Refused(403, "Open the link that the command printed.")
        if form is not None and not hmac.compare_digest(form.get("csrf", [""])[-1].encode(), csrf_token(self._secret).encode()):
            raise Refused(403, "This form belongs to another session. Load the page again.")

    def _page(self, problem: str = "", status: int = 200) -> HTMLResponse:
        talk = self.talk
        places = range(len(talk.names))
        values = {
            "title": talk.title, "csrf": csrf_token(self._secret), "rounds": talk.rounds, "labels": [talk.label(place) for place in places],
            "finished": talk.finished, "chosen": talk.names, "blind": talk.blind, "revealed": talk.revealed, "problem": problem,
            "longest": LONGEST_MESSAGE,
        }  # fmt: skip
        return HTMLResponse(self.pages.get_template("chat.html").render(**values), status)

    def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return Response(str(error), error.status, media_type="text/plain; charset=utf-8")

    def _user_error(self, request: Request, error: Exception) -> Response:
        return self._page(str(error), 400)
