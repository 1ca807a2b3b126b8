"""Starts the labelling page: binds the port, prints who may come in by which link, and serves until interrupted.

Everything needs a token, on loopback too: other users of a machine can reach its loopback. Beyond loopback the command says what that
means. Access logs are off, because invitation links are secrets.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from rich.console import Console

from suasion.errors import UsageError, UserError
from suasion.labeling.app import make_app
from suasion.labeling.desk import Desk
from suasion.labeling.store import Store
from suasion.labeling.work import FILES, Purpose, load_work

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def open_desk(run: Path, purpose: Purpose = "labels", prompts: int | None = None) -> Desk:
    """The desk of a run: its work, and its store, which is made if there is none.

    prompts: compare finished models on so many prompts, drawn by the seed; None keeps what was settled before, all at first.
    """
    if prompts is not None and purpose != "evaluation":
        raise UsageError("--prompts goes with --purpose evaluation: training labels are asked for on every rlhf prompt.")
    path = run / FILES[purpose]
    settled = _settled_prompts(path) if prompts is None and purpose == "evaluation" else prompts
    work = load_work(run, purpose, settled)  # before the store: a run that has no work gets no file
    store = Store(path)
    try:
        if settled != store.prompts():
            store.set_prompts(settled)
        return Desk(store, work)
    except BaseException:
        store.close()
        raise


def _settled_prompts(path: Path) -> int | None:
    if not path.is_file():
        return None
    store = Store(path)
    try:
        return store.prompts()
    finally:
        store.close()


def serve(
    run: Path, purpose: Purpose, host: str, port: int, url: str | None, console: Console, prompts: int | None = None
) -> None:
    """Serve until interrupted. url: how people outside reach this server, where that is not http://HOST:PORT. prompts: as in `open_desk`."""
    if host not in LOOPBACK and url is None and host in ("0.0.0.0", "::"):
        raise UsageError(
            f"--host {host} needs --url: say under which address annotators reach this machine, for example https://labels.example.org"
        )
    base = urlsplit(url) if url else None
    if base is not None and (base.scheme not in ("http", "https") or not base.hostname):
        raise UsageError(f"--url {url} is no address. It begins with https:// or http://.")
    listener = listen(host, port)
    port = listener.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    base_url = url.rstrip("/") if url else f"http://{name}:{port}"
    hosts = {host, *(LOOPBACK if host in LOOPBACK else ()), *([base.hostname] if base and base.hostname else ())}
    token = secrets.token_urlsafe(32)
    desk = open_desk(run, purpose, prompts)
    try:
        app = make_app(desk, run.resolve().name, token, hosts, base_url)
        server = uvicorn.Server(
            uvicorn.Config(
                app, access_log=False, log_level="warning", server_header=False, proxy_headers=False, timeout_graceful_shutdown=3
            )
        )
        planned = len(desk.work.planned)
        console.print(f"{planned - desk.missing()} of {planned} labels are there ({desk.store.path}).")
        console.print("Researcher (dashboard, invitations, “Label here myself”), valid until this stops:")
        console.print(f"  {base_url}/r/{token}", soft_wrap=True, markup=False)
        if not hosts <= LOOPBACK:
            console.print(
                f"[yellow]This page can be reached from other machines[/] (host {host}). Nobody comes in without a link; a link works for whoever "
                + (
                    "has it."
                    if base_url.startswith("https:")
                    else "has it or sees it on the wire: put TLS in front (--url https://...)."
                )
            )
        console.print("Stop with Ctrl-C; every answer is saved as it is given.")
        with contextlib.suppress(KeyboardInterrupt):  # the ordinary way to stop it
            server.run(sockets=[listener])
        missing = desk.missing()
        console.print(
            f"Stopped. {planned - missing} of {planned} labels are there; "
            + ("run this again to go on." if missing else "run the recipe again.")
        )
    finally:
        listener.close()
        desk.store.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the port is taken or the host is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another with --port or --host."
        ) from error
    listener.listen(128)
    return listener
