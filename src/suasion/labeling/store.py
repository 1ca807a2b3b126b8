"""labels.db: the events of the labelling page, in SQLite, beside the stages of a run.

Events are append-only: a trigger refuses to change or delete one, and only an erasure, which leaves a tombstone, lifts it. Writes are
committed with synchronous=FULL before anybody is told "saved", so that neither kill -9 nor a power cut loses an acknowledged label.
Of invitation links and sessions only SHA-256 hashes are stored (tokens carry 256 random bits, so a plain hash is enough); a reader
of the file can open nobody's page. A request key makes a repeated request harmless: the same click is stored once.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.labeling.events import Event, EventKind, Task
from suasion.records import canonical_json

FILE = "labels.db"
EVALUATION_FILE = "labels-evaluation.db"  # the same kind of store, for the blind comparison of finished models
SCHEMA_VERSION = 1
SCHEMA = """
create table meta (key text primary key, value text not null) strict;
create table annotators (id text primary key, name text not null, created text not null) strict;
create table tokens (
  hash text primary key, annotator text not null references annotators(id), kind text not null check (kind in ('invitation', 'session')),
  created text not null
) strict;
create table guidelines (version text primary key, text text not null, created text not null) strict;
create table tasks (id text primary key, kind text not null, pair_id text not null, expected text) strict;
create table texts (pair_id text primary key, body text not null) strict;
create table events (
  n integer primary key autoincrement, at text not null, kind text not null, annotator text not null, request text not null unique,
  body text not null
) strict;
create trigger events_stay before update on events begin select raise(abort, 'events are append-only'); end;
create trigger events_remain before delete on events when not exists (select 1 from meta where key = 'erasing')
begin select raise(abort, 'events are append-only'); end;
"""


@dataclass(frozen=True)
class Annotator:
    """Somebody who labels. `name` is the researcher's note and leaves the file with nothing else."""

    id: str
    name: str
    created: str


class Store:
    """One open labels.db. Safe to share between threads; other processes may append at the same time."""

    def __init__(self, path: Path):
        """Open or create. Raises UserError where the file is not such a store."""
        self.path = path
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = full")
            self._db.execute("pragma foreign_keys = on")
            self._db.execute("pragma secure_delete = on")
            with self.transaction():
                version = self._db.execute("pragma user_version").fetchone()[0]
                if version == 0:
                    for statement in _statements(SCHEMA):
                        self._db.execute(statement)
                    self._db.execute(f"pragma user_version = {SCHEMA_VERSION}")
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} cannot be opened as a store of labels ({error}). Move it away, or restore a copy of it."
            ) from error
        if version not in (0, SCHEMA_VERSION):
            raise UserError(f"{path} was made by another version of suasion (format {version}); this one reads {SCHEMA_VERSION}.")
        path.chmod(0o600)
        if self._meta("scrub", ""):  # an erasure was stopped between its commit and the end of its cleaning
            self._scrub()

    def close(self) -> None:
        """Close the file; SQLite then folds its write-ahead log into it."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and on disk when it ends."""
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")

    # People

    def annotators(self) -> list[Annotator]:
        """All of them, in the order in which they were added."""
        with self._lock:
            rows = self._db.execute("select id, name, created from annotators order by rowid").fetchall()
        return [Annotator(*row) for row in rows]

    def add_annotator(self, name: str) -> str:
        """A new annotator; returns the id, which counts up and is never given again."""
        with self.transaction():
            number = int(self._meta("annotators", "0")) + 1
            self._set_meta("annotators", str(number))
            identity = f"annotator-{number}"
            self._db.execute("insert into annotators values (?, ?, ?)", (identity, name.strip()[:80], _now()))
        return identity

    def ensure_annotator(self, identity: str) -> None:
        """Make sure that an annotator of this id exists: labels that are imported keep theirs."""
        with self.transaction():
            self._db.execute("insert or ignore into annotators values (?, '', ?)", (identity, _now()))
            number = identity.removeprefix("annotator-")
            if number.isdigit():
                self._set_meta("annotators", str(max(int(number), int(self._meta("annotators", "0")))))

    def new_token(self, annotator: str, kind: str) -> str:
        """A secret for an invitation link or a session; only its hash is kept."""
        token = secrets.token_urlsafe(32)
        with self.transaction():
            self._db.execute("insert into tokens values (?, ?, ?, ?)", (_hash(token), annotator, kind, _now()))
        return token

    def annotator_of(self, token: str, kind: str) -> str | None:
        """Whose token this is, None where it is nobody's."""
        with self._lock:
            row = self._db.execute("select annotator from tokens where hash = ? and kind = ?", (_hash(token), kind)).fetchone()
        return row[0] if row else None

    def revoke(self, annotator: str) -> None:
        """End every invitation and session of an annotator."""
        with self.transaction():
            self._db.execute("delete from tokens where annotator = ?", (annotator,))

    def reachable(self) -> frozenset[str]:
        """Annotators with an invitation or a session: those who may still label."""
        with self._lock:
            return frozenset(row[0] for row in self._db.execute("select distinct annotator from tokens"))

    # What is asked

    def set_plan(self, tasks: Iterable[Task]) -> None:
        """Record the tasks of a plan; those already recorded stay."""
        with self.transaction():
            self._db.executemany(
                "insert or ignore into tasks values (?, ?, ?, ?)", [(t.id, t.kind, t.pair_id, t.expected) for t in tasks]
            )

    def tasks(self) -> list[Task]:
        """The tasks recorded so far, of all plans."""
        with self._lock:
            rows = self._db.execute("select id, kind, pair_id, expected from tasks order by rowid").fetchall()
        return [Task(*row) for row in rows]

    def prompts(self) -> int | None:
        """On how many prompts, drawn at random, finished models are compared; None stands for all."""
        with self._lock:
            return int(value) if (value := self._meta("prompts", "")) else None

    def set_prompts(self, count: int | None) -> None:
        """Set how many prompts finished models are compared on. Raises UserError once somebody has answered: the draw comes first."""
        with self.transaction():
            if self._db.execute("select 1 from events where kind in ('label', 'skip', 'import') limit 1").fetchone():
                raise UserError(
                    f"{self.path} holds answers on {self._meta('prompts', 'all')} prompts: their number cannot be changed any more. Leave "
                    "--prompts out, or move the file away and begin anew."
                )
            self._db.execute("delete from tasks")
            self._set_meta("prompts", "" if count is None else str(count))

    def set_guideline(self, version: str, text: str) -> None:
        """Keep the text that annotators read under its version."""
        with self.transaction():
            self._db.execute("insert or ignore into guidelines values (?, ?, ?)", (version, text, _now()))

    def guideline(self, version: str) -> str | None:
        """The text of a version that annotators once read."""
        with self._lock:
            row = self._db.execute("select text from guidelines where version = ?", (version,)).fetchone()
        return row[0] if row else None

    def texts(self) -> dict[str, dict[str, Any]]:
        """Pair id -> texts of imported pairs, which stand in no stage of the run."""
        with self._lock:
            return {pair: json.loads(body) for pair, body in self._db.execute("select pair_id, body from texts")}

    # Events

    def append(self, kind: EventKind, annotator: str, body: dict[str, Any], request: str | None = None) -> int:
        """Write one event and return its number once it is on disk. A request key that was seen before returns the old number."""
        return self.append_all([(kind, annotator, body, request)])[0]

    def append_all(
        self, rows: Iterable[tuple[EventKind, str, dict[str, Any], str | None]], texts: dict[str, dict[str, Any]] | None = None
    ) -> list[int]:
        """Write several events in one transaction, with the texts of imported pairs: all or none."""
        numbers = []
        with self.transaction():
            for pair, text in (texts or {}).items():
                self._db.execute("insert or ignore into texts values (?, ?)", (pair, canonical_json(text)))
            for kind, annotator, body, request in rows:
                key = request or secrets.token_hex(16)
                done = self._db.execute(
                    "insert into events (at, kind, annotator, request, body) values (?, ?, ?, ?, ?) on conflict (request) do nothing",
                    (_now(), kind, annotator, key, canonical_json(body)),
                )
                if done.rowcount:
                    numbers.append(int(done.lastrowid or 0))
                else:
                    numbers.append(int(self._db.execute("select n from events where request = ?", (key,)).fetchone()[0]))
        return numbers

    def events(self, after: int = 0) -> list[Event]:
        """Events with a number above `after`, in order. Raises UserError where the file is damaged."""
        try:
            with self._lock:
                rows = self._db.execute(
                    "select n, at, kind, annotator, body from events where n > ? order by n", (after,)
                ).fetchall()
            return [Event(n, at, kind, annotator, json.loads(body)) for n, at, kind, annotator, body in rows]
        except (sqlite3.DatabaseError, ValueError) as error:
            raise UserError(
                f"{self.path} is damaged ({error}). Restore a copy of it, or move it away and label again."
            ) from error

    def erasures(self) -> int:
        """How often somebody was erased: a reader that has seen another number must read all events again."""
        with self._lock:
            return int(self._meta("erasures", "0"))

    def erase(self, annotator: str) -> int:
        """Remove everything an annotator left, physically, and leave a tombstone. Returns how many events went.

        The pages of the file that held them are overwritten (secure_delete), the file is rebuilt, and the write-ahead log emptied.
        """
        with self.transaction():
            self._set_meta("erasing", annotator)
            gone = self._db.execute("delete from events where annotator = ?", (annotator,)).rowcount
            about = "kind in ('exclude', 'include') and json_extract(body, '$.annotator') = ?"  # the reasons are about them too
            self._db.execute(f"delete from events where {about}", (annotator,))
            self._db.execute("delete from meta where key = 'erasing'")
            self._db.execute("delete from tokens where annotator = ?", (annotator,))
            self._db.execute("delete from annotators where id = ?", (annotator,))
            self._set_meta("erasures", str(int(self._meta("erasures", "0")) + 1))
            self._set_meta("scrub", annotator)
            self._db.execute(
                "insert into events (at, kind, annotator, request, body) values (?, 'erase', '', ?, ?)",
                (_now(), secrets.token_hex(16), canonical_json({"annotator": annotator, "events": gone})),
            )
        self._scrub()
        return gone

    def _scrub(self) -> None:
        """Rebuild the file and empty the write-ahead log. Raises UserError where a reader in another process holds the log."""
        with self._lock:
            self._db.execute("vacuum")
            busy = self._db.execute("pragma wal_checkpoint(truncate)").fetchone()[0]
            if busy:
                raise UserError(
                    f"{self.path}: the labels are erased, but another program reads the file, so that old bytes still stand in its write-ahead "
                    f"log. Close that program; the next suasion label command on this run cleans up."
                )
            self._db.execute("delete from meta where key = 'scrub'")

    def _meta(self, key: str, default: str) -> str:
        row = self._db.execute("select value from meta where key = ?", (key,)).fetchone()
        return row[0] if row else default

    def _set_meta(self, key: str, value: str) -> None:
        self._db.execute("insert into meta values (?, ?) on conflict (key) do update set value = excluded.value", (key, value))


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; a trigger's body keeps its semicolons."""
    statement = ""
    for part in script.split(";"):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            if statement.strip(" \n;"):
                yield statement
            statement = ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
