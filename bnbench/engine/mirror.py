"""The searches and grids of a record as Optuna studies, for people and optuna-dashboard."""

from __future__ import annotations

import contextlib
import datetime
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bnbench.engine.search import frozen
from bnbench.engine.storage import Storage
from bnbench.record import Record
from bnbench.study.programs import TUNING_SEEDS
from bnbench.study.space import Range, Space, point_of
from bnbench.study.table import Entry
from bnbench.tracking import mask
from bnbench.tracking.draft import Definition, is_grid, place_name, span
from bnbench.tracking.layout import item_home, item_name
from bnbench.tracking.publish import definitions
from bnbench.tracking.store import one_line

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial


class Mirror:
    """Shows what programs have got: an Optuna study a search, and one for the grids of an arm in a cell.

    Its thread has its own connection to the record, at `record_path`, and nothing waits for it. What a
    storage has and the record has not, or has otherwise, is written anew, an Optuna study at a time; nothing
    is ever read from it for a search. Of a
    study that was registered more than once the definition of `current`, else the last one, is shown; the
    preset smoke is not. `tracking` is the MLflow whose runs are named.
    """

    def __init__(
        self, storage: Storage, record_path: Path, current: Iterable[str] = (), tracking: str | None = None
    ) -> None:
        self._storage = storage
        self._record_path = record_path
        self._current = frozenset(current)
        self._tracking = tracking
        self._told: queue.SimpleQueue[tuple[str, list[Entry]] | None] = queue.SimpleQueue()
        self._deadline = math.inf
        self._differed: set[str] = set()
        self._problem = ""
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def tell(self, study_hash: str, entries: Iterable[Entry]) -> None:
        """Tell of all rows of one request of a program. Returns at once."""
        if tuned := [e for e in entries if e.role in ("tune", "sweep")]:
            self._told.put((study_hash, tuned))

    def close(self, timeout: float = 60.0) -> None:
        """Compare all with the record, name the MLflow runs, for at most so many seconds, and end."""
        self._deadline = time.monotonic() + timeout
        self._told.put(None)
        self._thread.join(timeout)

    @property
    def notes(self) -> list[str]:
        """What had to be mended, and what could not be written, in one line each."""
        lines = [self._storage.notice, self._problem]
        if found := sorted(self._differed):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            lines.append(f"{self._storage.shown} was not as the record is: written anew {found[0]!r}{more}")
        return [line for line in lines if line]

    def _work(self) -> None:
        try:
            with contextlib.closing(Record(self._record_path)) as record:
                self._serve(record)
        except Exception as error:
            self._problem = (
                f"the Optuna storage {self._storage.shown} takes no trials now"
                f" ({mask(one_line(error, self._storage.shown))}); they are in the record,"
                " and the next run adds them"
            )

    def _serve(self, record: Record) -> None:
        board = _Board(self._storage.optuna, self._differed)
        told: dict[str, Counter[_Search]] = {}
        known: dict[str, Definition] = {}
        links: dict[str, str] = {}
        while (news := self._told.get()) is not None:
            study_hash, entries = news
            if study_hash not in told:
                known = self._known(record)
                board.drop_others(known.values())
                links = self._links(record)
            rows = Counter((e.cell, e.arm, e.replicate) for e in entries)
            told[study_hash] = told.get(study_hash, Counter()) | rows
            if study_hash in known:
                for name, trials in _studies(known[study_hash], entries, links).items():
                    board.put(name, known[study_hash], trials)
        links = self._links(record)
        for study_hash, definition in self._known(record).items():
            of_run = told.get(study_hash, Counter()) if study_hash in self._current else None
            entries = _in_order(record.table(study_hash).of(roles=["tune", "sweep"]), of_run)
            for name, trials in _studies(definition, entries, links).items():
                if time.monotonic() < self._deadline:
                    board.put(name, definition, trials, whole=True)

    def _known(self, record: Record) -> dict[str, Definition]:
        """The definitions that are shown, one for a study and preset."""
        chosen: dict[str, Definition] = {}
        for definition in definitions(record).values():
            before = chosen.get(definition.experiment)
            if before is None or before.study_hash not in self._current:
                chosen[definition.experiment] = definition
        return {d.study_hash: d for d in chosen.values() if d.values["preset"] != "smoke"}

    def _links(self, record: Record) -> dict[str, str]:
        """How the run of each published item is found, by the item's name."""
        if self._tracking is None:
            return {}
        page = f"{self._tracking}/#/runs/" if self._tracking.startswith("http") else ""
        published = record.published(self._tracking).items()
        return {name: f"{page}{run}" for name, (run, mark) in published if not mark.startswith("running")}


#: Cell, arm and replicate.
_Search = tuple[str, str, int]


def _in_order(entries: Iterable[Entry], told: Counter[_Search] | None) -> list[Entry]:
    """The rows that programs have got; all, where none of them ran.

    What comes after these is a batch of which only some rows may be there, out of order.
    """
    seen: Counter[_Search] = Counter()
    kept = []
    for entry in entries:
        where = (entry.cell, entry.arm, entry.replicate)
        seen[where] += 1
        if told is None or seen[where] <= told[where]:
            kept.append(entry)
    return kept


def _studies(
    definition: Definition, entries: Iterable[Entry], links: Mapping[str, str] = MappingProxyType({})
) -> dict[str, list[FrozenTrial]]:
    """The trials of some rows by the names of their Optuna studies, such as
    `recipe/quick · mlp-mnist1d · batch · search 1`.
    """
    found: dict[str, list[FrozenTrial]] = {}
    rates = definition.values["lr"]
    head = f"{definition.values['name']}/{definition.values['preset']}"
    for entry in entries:
        name = f"{head} · {entry.cell} · {entry.arm}"
        space: Space
        if not is_grid(definition, entry):
            space = definition.spaces[entry.cell, entry.arm]
            searched = entry.replicate - TUNING_SEEDS
            name += f" · search {searched + 1}" if searched >= 0 else f" · replicate {entry.replicate}"
        elif len(rates) > 1:
            space = (Range("lr", rates[0], rates[-1]),)
        else:
            continue  # Nothing is chosen from one rate.
        trials = found.setdefault(name, [])
        trials.append(_trial(definition, entry, space, len(trials), links))
    return found


def _trial(
    definition: Definition, entry: Entry, space: Space, number: int, links: Mapping[str, str]
) -> FrozenTrial:
    result = entry.result
    attributes = {
        "row": entry.trial.key,
        "status": result.status,
        "replicate": entry.replicate,
        "mlflow": f"{item_home(definition, entry)[0]}: {place_name(definition, entry, number)}",
    }
    if link := links.get(item_name(definition, entry)):
        attributes["mlflow_run"] = link
    if result.status != "done":
        attributes["reason"] = result.brief
    curve = zip(result.curve.get("step", ()), result.curve.get("val/acc", ()), strict=False)
    trial = frozen(
        space,
        point_of(space, entry.trial),
        None if result.status == "failed" else result.metrics["val/acc"],
        attributes,
        {int(step): value for step, value in curve if math.isfinite(value)},
    )
    start, end = (datetime.datetime.fromtimestamp(at / 1000) for at in span(entry))
    trial.datetime_start, trial.datetime_complete = start, end
    return trial


class _Board:
    """What an Optuna storage shows of a record. Names of what differed from it are added to `differed`."""

    def __init__(self, storage: BaseStorage, differed: set[str]) -> None:
        self._storage = storage
        self._differed = differed
        self._studies: dict[str, optuna.Study] = {}
        self._there: dict[str, list[FrozenTrial]] = {}

    def drop_others(self, shown: Iterable[Definition]) -> None:
        """Delete what is of other definitions of the studies that are shown."""
        import optuna

        hashes = {definition.experiment: definition.study_hash for definition in shown}
        for study in optuna.get_all_study_summaries(self._storage, include_best_trial=False):
            wanted = hashes.get(study.user_attrs.get("experiment", ""))
            if wanted is not None and study.user_attrs.get("study_hash") != wanted:
                self._delete(study.study_name)
                self._differed.add(study.study_name)

    def put(
        self, name: str, definition: Definition, trials: Sequence[FrozenTrial], *, whole: bool = False
    ) -> None:
        """Add those of the trials that are missing; write all anew where what is there is not as they are.

        Unless they are the `whole`, others may be there too.
        """
        there, wanted = self._look(name, definition), {_row(trial): trial for trial in trials}
        common = [_row(trial) for trial in there if _row(trial) in wanted]
        different = (whole and len(common) < len(there)) or any(
            # One that had failed has been trained again.
            _content(trial) != _content(wanted[row]) and trial.state.name != "FAIL"
            for trial in there
            if (row := _row(trial)) in wanted
        )
        same = common == list(wanted)[: len(common)] and all(
            _content(trial) == _content(wanted[row])
            and (not whole or _link(wanted[row]) in (None, _link(trial)))
            for trial in there
            if (row := _row(trial)) in wanted
        )
        if different:
            self._differed.add(name)
        if different or not same:
            self._delete(name)
            common = []
        self._add(name, definition, trials[len(common) :])

    def _look(self, name: str, definition: Definition) -> list[FrozenTrial]:
        """The trials of an Optuna study; one that is half made, or of another definition, is deleted."""
        import optuna

        if name not in self._there:
            with contextlib.suppress(KeyError):
                study = optuna.load_study(study_name=name, storage=self._storage)
                self._studies[name] = study
                if study.user_attrs.get("study_hash") == definition.study_hash:
                    self._there[name] = study.get_trials(deepcopy=False)
                else:
                    self._delete(name)
        return self._there.get(name, [])

    def _add(self, name: str, definition: Definition, trials: Sequence[FrozenTrial]) -> None:
        import optuna

        if name not in self._studies and trials:
            study = optuna.create_study(storage=self._storage, study_name=name, direction="maximize")
            study.set_metric_names(["val/acc"])
            study.set_user_attr("experiment", definition.experiment)
            study.set_user_attr("study_hash", definition.study_hash)
            self._studies[name] = study
        if trials:
            self._studies[name].add_trials(trials)
            self._there[name] = [*self._there.get(name, ()), *trials]

    def _delete(self, name: str) -> None:
        import optuna

        optuna.delete_study(study_name=name, storage=self._storage)
        self._studies.pop(name, None)
        self._there.pop(name, None)


def _row(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get("row")


def _link(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get("mlflow_run")


def _content(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.state, trial.values, trial.params
