"""Publishing beside the training: a thread of the coordinator that never makes it wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bnbench.record import Record
from bnbench.tracking.live import Live, Place, read_live
from bnbench.tracking.publish import Counts, Session
from bnbench.tracking.store import Store, one_line

_LONGEST_WAIT = 60.0


class Publisher:
    """Sends what is recorded to MLflow while training goes on, and shows long trainings as they run.

    Its thread has its own connection to the record, at `record_path`, which must be there. A server that is
    slow or down delays nothing: it is tried again after 10, 20, 40 and then every 60 seconds, what is
    missing stays in the record, and :attr:`problem` says so in one line until it works again.
    """

    def __init__(self, store: Store, record_path: Path, runs: Path, *, look_every: float = 10.0) -> None:
        self._store = store
        self._record_path = record_path
        self._live = runs / "live"
        self._look_every = look_every
        self._lock = threading.Lock()
        self._studies: dict[str, tuple[Path, ...]] = {}
        self._waiting: set[str] = set()
        self._places: dict[str, list[Place]] = {}
        self._counts = Counts()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self.problem = ""

    def start(self) -> None:
        """Begin. What an earlier coordinator left as running is ended as killed."""
        self._clear_live()
        self._thread.start()

    def expect(self, places: Iterable[Place]) -> None:
        """Tell where the rows that are about to be trained belong, so that long ones can be shown."""
        with self._lock:
            for place in places:
                known = self._places.setdefault(place.trial.key, [])
                if place not in known:
                    known.append(place)

    def notify(self, study_hash: str, artifacts: Sequence[Path] = ()) -> None:
        """Tell that a study has new rows or verdicts, or files for its verdict run. Returns at once."""
        with self._lock:
            self._studies[study_hash] = tuple(artifacts) or self._studies.get(study_hash, ())
            self._waiting.add(study_hash)

    def close(self, timeout: float = 60.0) -> Counts:
        """Send the rest for at most so many seconds, and end; what is left is in the record."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        return self._counts

    def _work(self) -> None:
        try:
            record = Record(self._record_path)
            try:
                self._serve(Session(record, self._store))
            finally:
                record.close()
        except Exception as error:
            self._report(one_line(error, self._store.uri))

    def _serve(self, session: Session) -> None:
        self._report(session.end_running().error)
        wait = self._look_every
        while not self._closing.is_set():
            if not self._closing.wait(wait):
                shown = self._show_running(session)
                self._report(self._send(session, unfinished=False) or shown)
                wait = min(2 * wait, _LONGEST_WAIT) if self.problem else self._look_every
        self._clear_live()
        error = self._send(session, unfinished=True)
        self._report(error or session.end_running().error)

    def _send(self, session: Session, *, unfinished: bool) -> str:
        """Publish the studies that have news, at the end all; an error keeps them waiting."""
        with self._lock:
            waiting = [*self._studies] if unfinished else sorted(self._waiting)
            studies = dict(self._studies)
            self._waiting.clear()
        left, error = 0, ""
        for study_hash in waiting:
            counts = session.publish(
                study_hash, studies[study_hash], unfinished=unfinished, stop=self._is_late
            )
            left, error = left + counts.left, error or counts.error
            self._counts = Counts(self._counts.published + counts.published, left, error)
            if counts.left:
                with self._lock:
                    self._waiting.add(study_hash)
        return error

    def _show_running(self, session: Session) -> str:
        with self._lock:
            places = dict(self._places)
        groups: dict[tuple[str, str], list[tuple[Place, Live]]] = {}
        try:
            for path in sorted(self._live.glob("*.jsonl")):
                live = read_live(path)
                if session.is_recorded(path.stem):
                    path.unlink(missing_ok=True)
                elif live is not None:
                    for place in places.get(path.stem, ()):
                        groups.setdefault((place.study_hash, session.shown_as(place)), []).append(
                            (place, live)
                        )
            for (study_hash, _), running in groups.items():
                session.show_running(study_hash, running)
        except Exception as error:
            return one_line(error, self._store.uri)
        return ""

    def _clear_live(self) -> None:
        for path in self._live.glob("*.jsonl"):
            path.unlink(missing_ok=True)

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _report(self, error: str) -> None:
        self.problem = error and (
            f"MLflow at {self._store.shown} takes no runs now ({error}); they are in the record,"
            " and are sent when it works again or by `bnbench publish`"
        )
