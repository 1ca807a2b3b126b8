"""What was asked of servers, what they answered and what it cost: one SQLite file that outlives a kill.

An answer is found again by the hash of its whole request (server, model, every message, every setting), so that a run that goes on
pays only for what it has not got. Before a request leaves, its highest possible price is written down; when the answer is there the
real price takes its place, in one transaction with the answer. What a killed process had in flight therefore stays on the bill of
its scope, at the highest price, and a cap holds across restarts. Keys never come here: they are no part of a request's body.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.records import canonical_json

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, made REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sent (
  id INTEGER PRIMARY KEY, scope TEXT NOT NULL, key TEXT NOT NULL, worst REAL NOT NULL, paid REAL, made REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS sent_scope ON sent (scope);
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, server TEXT NOT NULL, sent TEXT NOT NULL, made REAL NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Answer:
    """What a server said. finish: stop, length, refusal or other. tokens None: the server did not count them. cost in US dollars.

    alternatives: for each token of the text, the likeliest tokens there with their log-probabilities; empty where not told.
    """

    text: str
    finish: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost: float = 0.0
    alternatives: tuple[tuple[tuple[str, float], ...], ...] = ()
    tokens: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As it stands in the cache."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Answer:
        """The answer that `to_json` wrote."""
        fields = json.loads(text)
        fields["alternatives"] = tuple(tuple((token, value) for token, value in place) for place in fields["alternatives"])
        fields["tokens"] = tuple(fields["tokens"])
        return cls(**fields)


@dataclass(frozen=True)
class Missing:
    """No answer, and why."""

    reason: str


def request_key(server: str, body: dict[str, Any]) -> str:
    """SHA-256 over a whole request: equal requests have equal answers."""
    return hashlib.sha256(canonical_json({"server": server, "body": body}).encode()).hexdigest()


class Ledger:
    """The cache and the bill. One process may use it from several threads, several processes may share the file."""

    def __init__(self, path: Path, scope: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.scope = path, scope
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=FULL")  # a paid answer survives the machine, not only the process
            self._base.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} is no usable cache of grader requests ({error}). Delete it: what it holds is paid for again."
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def answer(self, *keys: str) -> Answer | None:
        """The stored answer to a request that goes by these keys (one for each server that could answer it), None where there is none."""
        for key in keys:
            if (found := self._stored(key)) is not None:
                return Answer.from_json(found)
        return None

    def _stored(self, key: str) -> str | None:
        """The JSON under a key; of a key that only names another one, what stands there."""
        with self._lock:
            row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None or row[0].startswith("{"):
            return None if row is None else str(row[0])
        return self._stored(json.loads(row[0]))

    def spent(self) -> float:
        """US dollars of this scope: what was paid, and for requests whose end nobody knows the most that they can have cost."""
        with self._lock:
            row = self._base.execute(
                "SELECT COALESCE(SUM(COALESCE(paid, worst)), 0) FROM sent WHERE scope = ?", (self.scope,)
            ).fetchone()
        return float(row[0])

    def reserve(self, key: str, worst: float, cap: float | None) -> int | None:
        """Put a request on the bill at its highest price, before it is sent. None where the cap would not hold: then nothing is written."""
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                spent = self._base.execute(
                    "SELECT COALESCE(SUM(COALESCE(paid, worst)), 0) FROM sent WHERE scope = ?", (self.scope,)
                ).fetchone()[0]
                if cap is not None and spent + worst > cap:
                    self._base.execute("ROLLBACK")
                    return None
                cursor = self._base.execute(
                    "INSERT INTO sent (scope, key, worst, made) VALUES (?, ?, ?, ?)", (self.scope, key, worst, time.time())
                )
                self._base.execute("COMMIT")
            except sqlite3.Error:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise
        assert cursor.lastrowid is not None  # an INSERT into a table with a rowid gives one
        return cursor.lastrowid

    def settle(self, sent: int, keys: Sequence[str], answer: Answer) -> None:
        """The answer is there: store it and put its real price on the bill, both or neither.

        It stands under the first key; the others, of servers of the same pool, name that one. So it is found again whichever of them are left.
        """
        first, *others = keys
        rows = [(first, answer.to_json(), time.time()), *((key, json.dumps(first), time.time()) for key in others)]
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            self._base.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
            self._base.execute("UPDATE sent SET paid = ? WHERE id = ?", (answer.cost, sent))
            self._base.execute("COMMIT")

    def open_batch(self, batch: str, server: str, sent: Mapping[str, int]) -> None:
        """A provider has taken a batch. sent: key -> entry on the bill of each of its requests."""
        with self._lock:
            self._base.execute(
                "INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?)", (batch, server, json.dumps(dict(sent)), time.time())
            )

    def batches(self, server: str) -> list[tuple[str, dict[str, int]]]:
        """Batches that a server has taken and of which nobody has seen the end, oldest first: (id, as given to `open_batch`)."""
        with self._lock:
            rows = self._base.execute("SELECT id, sent FROM batches WHERE server = ? ORDER BY made, id", (server,)).fetchall()
        return [(batch, json.loads(sent)) for batch, sent in rows]

    def close_batch(self, batch: str) -> None:
        """Everything that a batch brought is settled."""
        with self._lock:
            self._base.execute("DELETE FROM batches WHERE id = ?", (batch,))

    def release(self, sent: int) -> None:
        """The server did not take the request (no connection, refused, overloaded): it costs nothing."""
        with self._lock:
            self._base.execute("UPDATE sent SET paid = 0 WHERE id = ?", (sent,))
