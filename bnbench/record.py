"""The record: one SQLite table of rows by key, with the studies that they belong to.

It is the truth of a `runs/` folder; what people browse in MLflow is published from it. One process writes.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from bnbench.registry import BadInput
from bnbench.study.programs import Wanted, turns
from bnbench.study.table import Entry, Result, Role, Status, Table, read_traces
from bnbench.study.trial import Trial, trial_from

SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    key TEXT PRIMARY KEY, trial TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    metrics TEXT NOT NULL, curve TEXT NOT NULL, provenance TEXT NOT NULL,
    traces TEXT NOT NULL DEFAULT '{}');
CREATE TABLE IF NOT EXISTS studies (
    hash TEXT PRIMARY KEY, name TEXT NOT NULL, preset TEXT NOT NULL, definition TEXT NOT NULL,
    registered REAL NOT NULL, verdicts TEXT NOT NULL DEFAULT '[]');
CREATE TABLE IF NOT EXISTS members (
    study TEXT NOT NULL, cell TEXT NOT NULL, arm TEXT NOT NULL, replicate INTEGER NOT NULL,
    role TEXT NOT NULL, key TEXT NOT NULL, number INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (study, cell, arm, replicate, role, key));
CREATE TABLE IF NOT EXISTS published (
    uri TEXT NOT NULL, item TEXT NOT NULL, run_id TEXT NOT NULL, content TEXT NOT NULL,
    PRIMARY KEY (uri, item));
"""
#: What each version has more than the one before, the second first: the order of a search, and traces.
_CHANGES = (
    "ALTER TABLE members ADD COLUMN number INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE rows ADD COLUMN traces TEXT NOT NULL DEFAULT '{}'",
)
_RESULT = "status, reason, metrics, curve, provenance, traces"


class Record:
    """Rows with their results, by key, over all studies.

    Raises BadInput where the file is not a record, is corrupt, or was written by a newer version; the file
    is then left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"cannot make the folder {path.parent}: {error.strerror}; name another with --runs"
            ) from None
        # Autocommit: every method that writes opens its own transaction.
        with self._explained():
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            with self._explained():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        """Check what is there, and write the schema where nothing is."""
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables:
            raise BadInput(f"{self.path} is a database of another program; name another folder with --runs")
        if version not in range(SCHEMA_VERSION + 1):
            raise BadInput(
                f"{self.path} has schema version {version}, this bnbench reads {SCHEMA_VERSION};"
                " use the bnbench that wrote it, or another folder (--runs)"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        (fault,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if fault != "ok":
            raise sqlite3.DatabaseError(f"malformed ({' '.join(fault.split())})")
        if version == 0:
            # In one transaction: who is killed in between leaves an empty file, not half a record.
            self._db.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
            )
        elif version < SCHEMA_VERSION:
            with self._transaction() as db:
                # Read again: another process may have been first.
                (version,) = db.execute("PRAGMA user_version").fetchone()
                for change in _CHANGES[version - 1 :]:
                    db.execute(change)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            text = str(error)
            if isinstance(error, json.JSONDecodeError) or re.search("malformed|not a database|UTF-8", text):
                remedy = "it is damaged: move it away and run again, or merge a copy with `bnbench import`"
            elif "full" in text or "I/O" in text:
                remedy = "free space on that disk and run again"
            elif "locked" in text:
                remedy = "another process holds it; wait for it to end"
            else:
                remedy = "check that the folder is there and writable, or name another with --runs"
            raise BadInput(f"cannot use the record {self.path}: {text}; {remedy}") from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def recall(self, keys: Iterable[str]) -> dict[str, Result]:
        """The results of those of the keys that are there."""
        found: dict[str, Result] = {}
        wanted = list(dict.fromkeys(keys))
        with self._explained():
            for start in range(0, len(wanted), 500):
                part = wanted[start : start + 500]
                select = f"SELECT key, {_RESULT} FROM rows WHERE key IN ({','.join('?' * len(part))})"
                for key, *columns in self._db.execute(select, part):
                    found[key] = _result(columns)
        return found

    def append(self, rows: Iterable[tuple[Trial, Result]]) -> list[str]:
        """Add rows; a key that is there stays, unless it had failed.

        Returns one line for every key whose two results disagree: the same row must give the same numbers.
        """
        faults = []
        with self._transaction() as db:
            for trial, result in rows:
                old = self.recall([trial.key]).get(trial.key)
                if old is not None and old.status != "failed":
                    if result.status != "failed" and not old.has_same_numbers(result):
                        faults.append(
                            f"row {trial.key} was measured twice with different numbers; the first is kept"
                        )
                    continue
                db.execute(
                    "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        trial.key,
                        json.dumps(trial.changed()),
                        result.status,
                        result.reason,
                        json.dumps(dict(result.metrics)),
                        json.dumps({k: list(v) for k, v in result.curve.items()}),
                        json.dumps(dict(result.provenance)),
                        json.dumps(result.plain_traces()),
                    ),
                )
        return faults

    def rows(self, keys: Iterable[str] | None = None) -> Iterator[tuple[Trial, Result]]:
        """All rows, or those of some keys; not those that were trained under another ROW_VERSION."""
        wanted = None if keys is None else set(keys)
        with self._explained():
            for key, text, *columns in self._db.execute(
                f"SELECT key, trial, {_RESULT} FROM rows ORDER BY rowid"
            ):
                if wanted is None or key in wanted:
                    trial = trial_from(json.loads(text), f"row {key}")
                    if trial.key == key:
                        yield trial, _result(columns)

    def trial(self, key: str) -> Trial | None:
        """The row of a key, if it is there."""
        with self._explained():
            row = self._db.execute("SELECT trial FROM rows WHERE key = ?", (key,)).fetchone()
        return None if row is None else trial_from(json.loads(row[0]), f"row {key}")

    def register(self, study_hash: str, definition: Mapping[str, Any]) -> bool:
        """Write down a definition before its first trial; False if it was there."""
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO studies (hash, name, preset, definition, registered)"
                " VALUES (?, ?, ?, ?, ?)",
                (study_hash, definition["name"], definition["preset"], json.dumps(definition), time.time()),
            )
        return cursor.rowcount == 1

    def registered(self, name: str, preset: str) -> list[tuple[str, float, dict[str, Any]]]:
        """Hash, time and definition of every registered version of a study, oldest first."""
        with self._explained():
            found = self._db.execute(
                "SELECT hash, registered, definition FROM studies"
                " WHERE name = ? AND preset = ? ORDER BY rowid",
                (name, preset),
            ).fetchall()
        return [(study, when, json.loads(text)) for study, when, text in found]

    def studies(self) -> list[tuple[str, str, str]]:
        """Hash, name and preset of all registered definitions."""
        with self._explained():
            return self._db.execute("SELECT hash, name, preset FROM studies ORDER BY rowid").fetchall()

    def enroll(self, study_hash: str, rows: Iterable[Wanted]) -> None:
        """Note which rows belong to a study, and where.

        All rows of a place (cell, arm, replicate and role) come together and replace those that were there: a
        row that had failed and now is trained may have changed the learning rate that is confirmed. Their
        order in a place is kept.
        """
        places = [
            (study_hash, row.cell, row.arm, row.replicate, row.role, row.trial.key, number)
            for row, number in turns(rows)
        ]
        with self._transaction() as db:
            db.executemany(
                "DELETE FROM members WHERE study = ? AND cell = ? AND arm = ? AND replicate = ? AND role = ?",
                {place[:-2] for place in places},
            )
            db.executemany("INSERT OR IGNORE INTO members VALUES (?, ?, ?, ?, ?, ?, ?)", places)

    def table(self, study_hash: str) -> Table:
        """The table of a study, from what is recorded, in one order whatever came first."""
        entries = []
        with self._explained():
            for number, cell, arm, replicate, role, trial, *columns in self._db.execute(
                f"SELECT number, cell, arm, replicate, role, trial, {_RESULT}"
                " FROM members JOIN rows USING (key) WHERE study = ?",
                (study_hash,),
            ):
                line = (cell, arm, replicate, _role(role), trial_from(json.loads(trial)), _result(columns))
                entries.append((number, Entry(*line)))
        entries.sort(
            key=lambda n: (
                n[1].cell,
                n[1].arm,
                n[1].replicate,
                n[1].role,
                n[0],
                n[1].trial.lr,
                n[1].trial.key,
            )
        )
        return Table(tuple(entry for _, entry in entries))

    def keep_verdicts(self, study_hash: str, verdicts: list[dict[str, Any]]) -> None:
        """Store the verdicts of a definition."""
        with self._transaction() as db:
            db.execute("UPDATE studies SET verdicts = ? WHERE hash = ?", (json.dumps(verdicts), study_hash))

    def verdicts(self, study_hash: str) -> list[dict[str, Any]]:
        """The stored verdicts of a definition."""
        with self._explained():
            row = self._db.execute("SELECT verdicts FROM studies WHERE hash = ?", (study_hash,)).fetchone()
        return [] if row is None else json.loads(row[0])

    def published(self, uri: str) -> dict[str, tuple[str, str]]:
        """Run id and content mark of everything that a tracking server has been sent."""
        with self._explained():
            rows = self._db.execute(
                "SELECT item, run_id, content FROM published WHERE uri = ?", (uri,)
            ).fetchall()
        return {item: (run_id, content) for item, run_id, content in rows}

    def note_published(self, uri: str, item: str, run_id: str, content: str) -> None:
        """Remember that a tracking server has this content of an item, as this run."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO published VALUES (?, ?, ?, ?)", (uri, item, run_id, content))

    def forget_published(self, uri: str, item: str) -> None:
        """Forget an item whose run is gone from the tracking server."""
        with self._transaction() as db:
            db.execute("DELETE FROM published WHERE uri = ? AND item = ?", (uri, item))


def _result(columns: list[str]) -> Result:
    status, reason, metrics, curve, provenance, traces = columns
    return Result(
        status=_status(status),
        reason=reason,
        metrics=json.loads(metrics),
        curve={k: tuple(v) for k, v in json.loads(curve).items()},
        traces=read_traces(json.loads(traces)),
        provenance=json.loads(provenance),
    )


def _status(text: str) -> Status:
    known: dict[str, Status] = {"done": "done", "diverged": "diverged", "failed": "failed"}
    if text not in known:
        raise sqlite3.DatabaseError(f"malformed (status {text!r})")
    return known[text]


def _role(text: str) -> Role:
    known = {role: role for role in get_args(Role)}
    if text not in known:
        raise sqlite3.DatabaseError(f"malformed (role {text!r})")
    found: Role = known[text]
    return found
