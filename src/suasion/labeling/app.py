"""The labelling page: FastAPI routes over a `Desk`, server-made HTML, and one small script that the page can do without.

Annotators come in by invitation link, agree, label, undo and come back; researchers watch, invite, exclude, adjudicate and erase. Forms
carry ids only: every text is looked up on the server. A session's secret is a SameSite=Strict, HttpOnly cookie, its CSRF token a
keyed hash of that secret, so that both outlive a restart. Researchers come in by a link that `suasion label serve` prints and that
is valid as long as that process runs.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from suasion.errors import UserError
from suasion.labeling import insight
from suasion.labeling.desk import SKIP_REASONS, Desk
from suasion.labeling.events import State, conflicts, fold
from suasion.labeling.guard import Attempts, Guard, csrf_token
from suasion.labeling.text import prose_to_html, to_html
from suasion.labeling.work import PAGES, text_version
from suasion.progress import duration
from suasion.records import Turn
from suasion.seeding import uniforms

SESSION_SECONDS = 60 * 60 * 24 * 90
STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
RULINGS = ("a", "b", "tie")


class Refused(Exception):
    """A request that gets a page saying why, instead of what it asked for."""

    def __init__(self, status: int, title: str, text: str):
        super().__init__(text)
        self.status, self.title, self.text = status, title, text


async def _form(request: Request) -> dict[str, str]:
    """The fields of a posted form (urlencoded; the guard has bounded its size), the last value of each."""
    fields = parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=50)
    return {name: values[-1] for name, values in fields.items()}


Form = Annotated[dict[str, str], Depends(_form)]


def make_app(desk: Desk, title: str, researcher_token: str, hosts: Collection[str], base_url: str) -> Guard:
    """The page over a desk. hosts: host names it answers to; base_url: how invitation links begin."""
    return Guard(Site(desk, title, researcher_token, base_url).app, hosts)


class Site:
    """Routes and the few things they share."""

    def __init__(self, desk: Desk, title: str, researcher_token: str, base_url: str):
        self.desk, self.title, self.base_url = desk, title, base_url
        self._researcher_token = researcher_token
        self._researchers: set[str] = set()
        self._attempts = Attempts()
        self._numbers: tuple[int, int, dict[str, Any]] | None = None
        suffix = hashlib.sha256(str(desk.store.path.resolve()).encode()).hexdigest()[:8]  # cookies do not tell ports apart
        self.cookie, self.researcher_cookie = f"suasion-{suffix}", f"suasion-researcher-{suffix}"
        self.pages = Environment(
            loader=PackageLoader("suasion.labeling", "pages"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.pages.filters["markdown"] = to_html
        self.pages.filters["prose"] = prose_to_html
        self.pages.filters["time_left"] = time_left
        self.pages.filters["duration"] = duration
        self.pages.globals.update(study=title, speaker=speaker, version=_static_version())
        app = self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(Refused, self._refused)
        app.add_exception_handler(UserError, self._user_error)
        for path, page in (
            ("/", self.home),
            ("/i/{token}", self.invitation),
            ("/task", self.task),
            ("/guidelines", self.guidelines),
            ("/r/{token}", self.enter),
            ("/dashboard", self.dashboard),
            ("/dashboard/live", self.live),
            ("/annotator/{who}", self.annotator),
            ("/adjudicate", self.adjudication),
            ("/static/{name}", self.static),
        ):
            app.get(path)(page)
        for path, action in (
            ("/i/{token}", self.join),
            ("/answer", self.answer),
            ("/undo", self.undo),
            ("/adjudicate", self.adjudicate),
            ("/invite", self.invite),
            ("/label-myself", self.label_myself),
            ("/annotator/{who}", self.change),
        ):
            app.post(path)(action)

    # Annotators

    def home(self, request: Request) -> Response:
        """Lead people to where they left off."""
        if self._session(request):
            return _see("/task")
        if request.cookies.get(self.researcher_cookie) in self._researchers:
            return _see("/dashboard")
        raise Refused(
            403, "Please open your invitation link", "This page is for invited annotators. Open the link that you were sent."
        )

    def invitation(self, request: Request, token: str) -> Response:
        """Consent and content warning. Nothing is stored until the form comes back: link previews join nothing."""
        who = self._invited(request, token)
        settings = self.desk.work.settings
        return self._page(
            "consent.html",
            consent=self.desk.work.consent,
            warning=settings.content_warning,
            guidelines=self.desk.work.guidelines,
            again=who in self.desk.refresh().consents,
        )

    def join(self, request: Request, token: str, form: Form) -> Response:
        """Store the consent and open a session."""
        who = self._invited(request, token)
        if form.get("agree") != "yes":
            raise Refused(400, "Nothing was stored", "You can only take part if you agree. You may close this page.")
        version = text_version(self.desk.work.consent)
        if self.desk.refresh().consents.get(who) != version:
            self.desk.store.append("consent", who, {"version": version})
        return self._with_session(who)

    def task(self, request: Request, did: str = "") -> Response:
        """The next task of this annotator."""
        who, secret = self._annotator(request)
        shown, progress = self.desk.next(who), self.desk.progress(who)
        common: dict[str, Any] = {
            "csrf": csrf_token(secret),
            "progress": progress,
            "did": did,
            "can_undo": bool(self.desk.refresh().of(who)),
            "once": secrets.token_hex(8),
        }
        if shown is None:
            return self._page(
                "done.html",
                **common,
                excluded=who in self.desk.refresh().excluded,
                missing=self.desk.missing(),
                researching=request.cookies.get(self.researcher_cookie) in self._researchers,
            )
        return self._page(
            "task.html",
            **common,
            shown=shown,
            reasons=SKIP_REASONS,
            guidelines=self.desk.work.guidelines,
        )

    def answer(self, request: Request, form: Form) -> Response:
        """Store a label or a skip; the page that follows is the next task."""
        who, _ = self._annotator(request, form)
        try:
            seconds = float(form["seconds"]) if form.get("seconds") else None
            clarity = int(form["clarity"]) if form.get("clarity") else None
        except ValueError as error:
            raise Refused(400, "Not saved", "That form was not this page's.") from error
        reason = form.get("skip", "")
        if reason and reason not in SKIP_REASONS:
            raise Refused(400, "Not saved", "That form was not this page's.")
        if not reason and (not form.get("choice") or clarity is None):
            return _see("/task?did=incomplete")
        choice = "skip" if reason else form["choice"]
        self.desk.answer(who, form.get("task", ""), choice, clarity, seconds, form.get("once", "")[:64], reason)
        return _see("/task?did=" + ("skipped" if reason else "saved"))

    def undo(self, request: Request, form: Form) -> Response:
        """Take the latest answer back and show its task again."""
        who, _ = self._annotator(request, form)
        task = self.desk.undo(who, "undo " + form.get("once", "")[:64])
        return _see("/task?did=" + ("undone" if task else "nothing"))

    def guidelines(self, request: Request) -> Response:
        """The guidelines as a page, for browsers without script."""
        self._annotator(request)
        return self._page("guidelines.html", guidelines=self.desk.work.guidelines)

    # Researchers

    def enter(self, request: Request, token: str) -> Response:
        """Open the researcher's session."""
        self._slow_down(request)
        if not hmac.compare_digest(token.encode(), self._researcher_token.encode()):
            self._attempts.fail(_address(request))
            raise Refused(403, "This link is not valid", "The server prints a new one at every start.")
        secret = secrets.token_urlsafe(32)
        self._researchers.add(secret)
        response = _see("/dashboard")
        response.set_cookie(self.researcher_cookie, secret, httponly=True, samesite="strict", secure=self._secure)
        return response

    def dashboard(self, request: Request) -> Response:
        """Everything a researcher watches."""
        return self._page("dashboard.html", csrf=self._researcher(request), link="", **self._live())

    def live(self, request: Request) -> Response:
        """The part of the dashboard that changes."""
        self._researcher(request)
        return self._page("live.html", **self._live())

    def annotator(self, request: Request, who: str) -> Response:
        """One annotator, and what leaving them out would change."""
        csrf = self._researcher(request)
        person = next((one for one in self.desk.store.annotators() if one.id == who), None)
        if person is None:
            raise Refused(404, "Nobody of that name", "There is no such annotator, or they were erased.")
        state = self._state()
        effect = insight.without_each(state, self.desk.work, [who]).get(who)
        numbers = insight.people(state, self.desk.work, [who])[0]
        return self._page(
            "annotator.html", csrf=csrf, person=person, numbers=numbers, now=insight.overall(state, self.desk.work), then=effect,
            reachable=who in self.desk.store.reachable(), link="", comparing=bool(self.desk.work.models),
        )  # fmt: skip

    def invite(self, request: Request, form: Form) -> Response:
        """A new annotator; the link is shown once."""
        csrf = self._researcher(request, form)
        who = self.desk.store.add_annotator(form.get("name", ""))
        token = self.desk.store.new_token(who, "invitation")
        return self._page("dashboard.html", csrf=csrf, link=f"{self.base_url}/i/{token}", invited=who, **self._live())

    def label_myself(self, request: Request, form: Form) -> Response:
        """A researcher who labels is an annotator like any other, with a session of their own."""
        self._researcher(request, form)
        if self._session(request):
            return _see("/task")
        who = self.desk.store.add_annotator("researcher")
        return _see("/i/" + self.desk.store.new_token(who, "invitation"))

    def change(self, request: Request, who: str, form: Form) -> Response:
        """Exclude, include, withdraw, invite again or erase an annotator."""
        csrf = self._researcher(request, form)
        if who not in {one.id for one in self.desk.store.annotators()}:
            raise Refused(404, "Nobody of that name", "There is no such annotator, or they were erased.")
        action = form.get("action")
        if action == "exclude":
            self.desk.store.append(
                "exclude", "", {"annotator": who, "reason": form.get("reason", "").strip()[:200] or "no reason given"}
            )
        elif action == "include":
            self.desk.store.append("include", "", {"annotator": who})
        elif action == "withdraw":
            self.desk.store.revoke(who)
        elif action == "again":
            token = self.desk.store.new_token(who, "invitation")
            return self._page("dashboard.html", csrf=csrf, link=f"{self.base_url}/i/{token}", invited=who, **self._live())
        elif action == "erase":
            if form.get("confirm") != who:
                raise Refused(400, "Nothing was erased", f"Type {who} to confirm.")
            self.desk.store.erase(who)
            return _see("/dashboard")
        else:
            raise Refused(400, "Nothing was changed", "That form was not this page's.")
        return _see(f"/annotator/{who}")

    def adjudication(self, request: Request) -> Response:
        """The first pair on which people differ, with what they said but not who, in an order of its own.

        The pair's own order must not show: in a comparison of models its first response is always the reference model's.
        """
        csrf = self._researcher(request)
        open_ = {pair: given for pair, given in conflicts(self._state()).items() if pair in self.desk.work.items}
        pair = next(iter(open_), None)
        shown: tuple[tuple[str, str, str], ...] = ()
        if pair:
            item = self.desk.work.items[pair]
            sides = [("a", item.a), ("b", item.b)]
            if uniforms(1, self.desk.work.seed, "adjudication side", pair)[0] < 0.5:
                sides.reverse()
            shown = tuple((name, *side) for name, side in zip(("first", "second"), sides, strict=True))
        names = {label: f"the {name}" for name, label, _ in shown} | {"tie": "a tie"}
        return self._page(
            "adjudicate.html", csrf=csrf, count=len(open_), pair=pair, item=self.desk.work.items[pair] if pair else None, shown=shown,
            given=[names[given.label.label] for given in open_.get(pair or "", [])],
        )  # fmt: skip

    def adjudicate(self, request: Request, form: Form) -> Response:
        """Store a ruling on a pair."""
        self._researcher(request, form)
        pair, label = form.get("pair", ""), form.get("label", "")
        if pair not in self.desk.work.items or label not in RULINGS:
            raise Refused(400, "Nothing was stored", "That form was not this page's.")
        self.desk.store.append("adjudicate", "", {"pair_id": pair, "label": label, "note": form.get("note", "")[:500]})
        return _see("/adjudicate")

    def static(self, name: str) -> Response:
        """The style sheet, the script and the icon."""
        if name not in STATIC:
            raise HTTPException(404)
        return FileResponse(PAGES / name, media_type=STATIC[name], headers={"cache-control": "max-age=86400"})

    # What they share

    @property
    def _secure(self) -> bool:
        return self.base_url.startswith("https:")

    def _state(self) -> State:
        """A state of its own: the desk's goes on changing while this one is read."""
        return fold(self.desk.store.events())

    def _live(self) -> dict[str, Any]:
        """The dashboard's numbers, computed again only when something happened."""
        state = self.desk.refresh()
        key = (state.last, self.desk.store.erasures())
        if self._numbers is None or self._numbers[:2] != key:
            state, work = self._state(), self.desk.work
            self._numbers = (*key, {"all": insight.overall(state, work), "conflicts": len(conflicts(state)), "state": state})
        numbers = self._numbers[2]
        annotators = self.desk.store.annotators()
        return {
            "all": numbers["all"],
            "conflicts": numbers["conflicts"],
            "imported": len(numbers["state"].imported),
            "erased": len(numbers["state"].erasures),
            "missing": self.desk.missing(),
            "planned": len(self.desk.work.planned),
            "people": insight.people(numbers["state"], self.desk.work, [one.id for one in annotators]),
            "names": {one.id: one.name for one in annotators},
            "reachable": self.desk.store.reachable(),
            "consents": numbers["state"].consents,
            "models": insight.model_scores(numbers["state"], self.desk.work) if not self.desk.missing() else [],
            "comparing": bool(self.desk.work.models),
        }

    def _invited(self, request: Request, token: str) -> str:
        self._slow_down(request)
        who = self.desk.store.annotator_of(token, "invitation")
        if who is None:
            self._attempts.fail(_address(request))
            raise Refused(
                403,
                "This link is not valid",
                "It may have been withdrawn, or part of it is missing. Ask the researcher for a new one.",
            )
        return who

    def _slow_down(self, request: Request) -> None:
        if self._attempts.blocked(_address(request)):
            raise Refused(429, "Too many attempts", "Wait a minute, then open your link again.")

    def _session(self, request: Request) -> str | None:
        secret = request.cookies.get(self.cookie)
        return self.desk.store.annotator_of(secret, "session") if secret else None

    def _annotator(self, request: Request, form: dict[str, str] | None = None) -> tuple[str, str]:
        """(annotator, session secret); for posts the CSRF token must fit."""
        who, secret = self._session(request), request.cookies.get(self.cookie, "")
        if who is None:
            raise Refused(
                403,
                "Please open your invitation link",
                "Your session has ended. Your labels are safe; the link brings you back to them.",
            )
        if form is not None:
            _check_csrf(form, secret)
        return who, secret

    def _researcher(self, request: Request, form: dict[str, str] | None = None) -> str:
        """The CSRF token of a researcher's session."""
        secret = request.cookies.get(self.researcher_cookie, "")
        if secret not in self._researchers:
            raise Refused(
                403, "This page is for the researcher", "Open the researcher's link that the server printed when it started."
            )
        if form is not None:
            _check_csrf(form, secret)
        return csrf_token(secret)

    def _with_session(self, who: str) -> Response:
        response = _see("/task")
        response.set_cookie(
            self.cookie,
            self.desk.store.new_token(who, "session"),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=self._secure,
        )
        return response

    def _page(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.pages.get_template(template).render(**values), status)

    def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return self._page("message.html", error.status, title=error.title, text=error.text)

    def _user_error(self, request: Request, error: Exception) -> Response:
        return self._page("message.html", 400, title="That did not work", text=str(error))


def speaker(turn: Turn, n: int) -> str:
    """How the page names who speaks: a position in the thread, never a user's name."""
    if turn.role == "user":
        return turn.name or ("The person to persuade" if n else "The person to persuade (opening)")
    return turn.name or "Another participant"


def time_left(seconds: float) -> str:
    """How much longer, as a person would say it: nobody plans by seconds."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    hours, rest = divmod(minutes if minutes < 60 else 5 * round(minutes / 5), 60)
    return "about " + " ".join(f"{count} {unit}" for count, unit in ((hours, "h"), (rest, "min")) if count)


def _see(path: str) -> Response:
    return RedirectResponse(path, 303)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _check_csrf(form: dict[str, str], secret: str) -> None:
    if not hmac.compare_digest(form.get("csrf", "").encode(), csrf_token(secret).encode()):
        raise Refused(403, "Nothing was stored", "This form belongs to another session. Load the page again.")


def _static_version() -> str:
    """Changes with the style sheet or the script, so that browsers fetch them anew."""
    return hashlib.sha256(b"".join(Path(PAGES / name).read_bytes() for name in sorted(STATIC))).hexdigest()[:10]
