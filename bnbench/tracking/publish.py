"""Sending what the record has to MLflow, once: what it has already is looked up, never guessed."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copy2, copytree
from types import MappingProxyType

from bnbench.record import Record
from bnbench.tracking.draft import (
    CURVES,
    Definition,
    Draft,
    Point,
    is_grid,
    live_draft,
    live_note,
    live_points,
    search_title,
)
from bnbench.tracking.layout import Item, item_home, item_name, items
from bnbench.tracking.live import Live, Place
from bnbench.tracking.store import Store, one_line

#: MLflow's largest batch is 1,000 metrics, parameters and tags together.
_BATCH = 800
#: Errors about one run; after any other the rest is not tried.
_ABOUT_ONE_RUN = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


@dataclass(frozen=True)
class Counts:
    """How many runs were sent, how many could not be, and the first error."""

    published: int = 0
    left: int = 0
    error: str = ""

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.published + other.published, self.left + other.left, self.error or other.error)


def publish(
    record: Record,
    store: Store,
    *,
    artifacts: Mapping[str, Sequence[Path]] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Counts:
    """Send all that is recorded and not there yet, and end as killed what an earlier process left running.

    `artifacts` are files for the verdict runs, by study hash. A call that ends early, or that meets a
    server that is down, leaves a rest that the next call sends. One process at a time may do this.
    """
    session = Session(record, store)
    counts = session.end_running()
    for study_hash, _, _ in record.studies():
        counts += session.publish(study_hash, (artifacts or {}).get(study_hash, ()), stop=stop)
    return counts


class Session:
    """One process's view of what an MLflow store has of a record.

    Each run carries its lasting name and the record's as tags, so a run whose making was cut off is found
    again and completed, and one that a person deleted, or that was lost, is missed and made anew.
    """

    def __init__(self, record: Record, store: Store) -> None:
        self._record = record
        self._store = store
        self._client = store.client
        self._record_id = _record_id(record)
        self._definitions: dict[str, Definition] = {}
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}
        self._marks: dict[str, str] = {}
        self._known: set[str] = set()

    def _definition(self, study_hash: str) -> Definition:
        if study_hash not in self._definitions:
            self._definitions = definitions(self._record)
        return self._definitions[study_hash]

    def shown_as(self, place: Place) -> str:
        """The lasting name of the run that shows a training."""
        return item_name(self._definition(place.study_hash), place)

    def publish(
        self,
        study_hash: str,
        artifacts: Sequence[Path] = (),
        *,
        unfinished: bool = True,
        stop: Callable[[], bool] = lambda: False,
    ) -> Counts:
        """Send what is new of one definition."""
        definition = self._definition(study_hash)
        table, verdicts = self._record.table(study_hash), self._record.verdicts(study_hash)
        try:
            self._look(definition)
        except Exception as error:
            return Counts(0, len(table.entries), one_line(error, self._store.uri))
        missing = [
            item
            for item in items(definition, table, verdicts, artifacts, unfinished=unfinished)
            if not self._has(item)
        ]
        counts = Counts()
        for place, item in enumerate(missing):
            if stop():
                return counts + Counts(0, len(missing) - place)
            try:
                self._send(definition, item)
            except Exception as error:
                text = one_line(error, self._store.uri)
                if getattr(error, "error_code", "") not in _ABOUT_ONE_RUN:
                    return counts + Counts(0, len(missing) - place, text)
                self._known.discard(study_hash)  # A person may have deleted the run: look again next time.
                counts += Counts(0, 1, f"{item.name}: {text}")
            else:
                counts += Counts(1)
        return counts

    def show_running(self, study_hash: str, running: Sequence[tuple[Place, Live]]) -> None:
        """Show how far the trainings of one run are: a confirmed one, or those of one grid."""
        try:
            self._show(self._definition(study_hash), running)
        except Exception:
            self._known.discard(study_hash)  # A person may have deleted the run: look again next time.
            raise

    def _show(self, definition: Definition, running: Sequence[tuple[Place, Live]]) -> None:
        self._look(definition)
        place, live = running[0]
        name = item_name(definition, place)
        in_grid = is_grid(definition, place)
        attempt = None if in_grid else repr(live.started)
        run, last = self._continued(name, attempt)
        if run is None:
            draft = live_draft(definition, place, live)
            run = self._create(definition, name, *item_home(definition, place), draft)
            self._log(run, (), draft.params)
        if in_grid:
            note = live_note(running)
            if self._marks.get(name) != f"running {note}":
                self._client.set_tag(run, "mlflow.note.content", note)
                self._client.update_run(run, status="RUNNING")
                self._note(name, f"running {note}")
        elif points := live_points(live, last):
            self._log(run, points)
            self._note(name, f"running {attempt} {max(point.step for point in points)}")

    def is_recorded(self, key: str) -> bool:
        """Whether a row has a result that is not a failure."""
        found = self._record.recall([key])
        return key in found and found[key].status != "failed"

    def end_running(self) -> Counts:
        """End all runs that are shown as running as killed: nothing trains them any more."""
        try:
            for item, (run, mark) in self._record.published(self._store.shown).items():
                if mark.startswith("running"):
                    self._kill(run)
                    self._forget(item)
        except Exception as error:
            return Counts(error=one_line(error, self._store.uri))
        return Counts()

    def _has(self, item: Item) -> bool:
        """Whether an item is there as it should be; files of a verdict that are not given now may stay."""
        noted = self._marks.get(item.name, "")
        return noted == item.mark or noted.startswith(f"{item.mark}+")

    def _look(self, definition: Definition) -> None:
        """Learn, once, which runs of a definition are there."""
        if definition.study_hash in self._known:
            return
        ours = f"{definition.study_hash}/"
        self._runs = {item: run for item, run in self._runs.items() if not item.startswith(ours)}
        self._marks = {item: mark for item, mark in self._marks.items() if not item.startswith(ours)}
        names = [definition.experiment]
        if definition.values["program"] == "search":
            names.append(definition.tuning)
        homes = [self._experiment(definition, name) for name in names]
        wanted = f"tags.`bnbench.record` = '{self._record_id}'"
        wanted += f" AND tags.`bnbench.study_hash` = '{definition.study_hash}'"
        noted = self._record.published(self._store.shown)
        there: dict[str, str] = {}
        token: str | None = None
        while True:
            page = self._client.search_runs(homes, wanted, max_results=1000, page_token=token)
            for run in page:
                item, run_id, status = run.data.tags["bnbench.item"], run.info.run_id, run.info.status
                if noted.get(item, ("",))[0] == run_id:
                    there[item] = run_id
                elif status == "RUNNING" and run.data.tags.get("bnbench.status") == "running":
                    self._kill(run_id)
                elif status != "KILLED":
                    there.setdefault(item, run_id)
            token = page.token
            if not token:
                break
        for item, (run_id, mark) in noted.items():
            if item.startswith(ours):
                if there.get(item) == run_id:
                    self._marks[item] = mark
                else:
                    self._record.forget_published(self._store.shown, item)
        self._runs |= there
        self._known.add(definition.study_hash)

    def _experiment(self, definition: Definition, name: str) -> str:
        if name in self._experiments:
            return self._experiments[name]
        found = self._client.get_experiment_by_name(name)
        if found is None:
            about = "How the arms were tuned: " if name == definition.tuning else ""
            tags = {
                "mlflow.note.content": f"{about}{definition.values['question']}",
                # Keeps MLflow's page from guessing whether this is about language models.
                "mlflow.experimentKind": "custom_model_development",
            }
            folder = self._store.artifacts
            number: str = self._client.create_experiment(name, artifact_location=folder, tags=tags)
        else:
            number = found.experiment_id
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(number)
        self._experiments[name] = number
        return number

    def _send(self, definition: Definition, item: Item) -> None:
        draft = item.draft()
        run, last = self._continued(item.name, item.attempt)
        new = run is None
        if run is None:
            run = self._create(definition, item.name, item.experiment, item.parent, draft)
        # What was shown live is there already, at the times at which it was measured.
        points = tuple(p for p in draft.points if p.key not in CURVES or p.step > last or p.time == draft.end)
        self._log(run, points, draft.params, {} if new else draft.tags)
        self._attach(run, draft)
        self._client.set_terminated(run, draft.status, draft.end)
        self._note(item.name, item.mark)

    def _continued(self, name: str, attempt: str | None) -> tuple[str | None, int]:
        """The run to go on with, and the step up to which its curve was sent live (-1: not live).

        A run of another attempt ends: killed if it was running, deleted if its result was replaced.
        """
        run, mark = self._runs.get(name), self._marks.get(name, "")
        if run is None or not mark or attempt is None:
            return run, -1
        if mark.startswith("running "):
            _, started, last = mark.split(" ")
            if started in (attempt, "any"):
                return run, int(last)
            self._kill(run)
        else:
            for child in [item for item in self._runs if item.startswith(f"{name}/")]:
                self._client.delete_run(self._runs[child])
                self._forget(child)
            self._client.delete_run(run)
        self._forget(name)
        return None, -1

    def _create(
        self, definition: Definition, name: str, experiment: str, parent: str | None, draft: Draft
    ) -> str:
        tags = {**draft.tags, "bnbench.item": name, "bnbench.record": self._record_id}
        if parent is not None:
            there = self._runs.get(parent)
            tags["mlflow.parentRunId"] = there or self._reserve(definition, parent, experiment, draft)
        made = self._client.create_run(
            self._experiment(definition, experiment), draft.start or None, tags, draft.name
        )
        run: str = made.info.run_id
        self._runs[name] = run
        if draft.status == "RUNNING":
            self._note(name, "running None -1")
        return run

    def _reserve(self, definition: Definition, parent: str, experiment: str, child: Draft) -> str:
        """Make the run of an arm or a search before it is whole, so that what runs is shown below it."""
        cell, arm = child.tags["bnbench.cell"], child.tags["bnbench.arm"]
        own = ["bnbench.key", "bnbench.trial", "mlflow.note.content"]
        if experiment == definition.tuning:
            role, replicate = child.tags["bnbench.role"], int(child.tags["bnbench.replicate"])
            level, name = "search", search_title(cell, arm, role, replicate)
        else:
            own += ["bnbench.role", "bnbench.replicate"]
            level, name = "arm", f"{cell} · {arm}"
        tags = {k: v for k, v in child.tags.items() if k not in own}
        tags |= {"bnbench.level": level, "bnbench.status": "running"}
        draft = Draft(name, tags, child.start, child.start, status="RUNNING")
        run = self._create(definition, parent, experiment, None, draft)
        self._note(parent, "running any -1")
        return run

    def _log(
        self,
        run: str,
        points: Sequence[Point],
        params: Mapping[str, str] = MappingProxyType({}),
        tags: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Add metrics, parameters and tags. To repeat it adds nothing."""
        from mlflow.entities import Metric, Param, RunTag

        now = round(time.time() * 1000)
        metrics = [Metric(p.key, p.value, now if p.time is None else p.time, p.step) for p in points]
        first = ([Param(*pair) for pair in params.items()], [RunTag(*pair) for pair in tags.items()])
        for start in range(0, max(len(metrics), 1), _BATCH):
            self._client.log_batch(run, metrics[start : start + _BATCH], *(first if start == 0 else ()))

    def _attach(self, run: str, draft: Draft) -> None:
        if not draft.files:
            return
        with tempfile.TemporaryDirectory(prefix="bnbench-") as folder:
            for name, content in draft.files.items():
                target = Path(folder, name)
                if isinstance(content, str):
                    target.write_text(content)
                elif content.is_dir():
                    copytree(content, target)
                else:
                    copy2(content, target)
            self._client.log_artifacts(run, folder)

    def _kill(self, run: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_tag(run, "bnbench.status", "killed")
            self._client.set_terminated(run, "KILLED")
        except MlflowException as error:
            if error.error_code not in _ABOUT_ONE_RUN:
                raise  # Otherwise a person has deleted it.

    def _note(self, name: str, mark: str) -> None:
        self._record.note_published(self._store.shown, name, self._runs[name], mark)
        self._marks[name] = mark

    def _forget(self, name: str) -> None:
        self._record.forget_published(self._store.shown, name)
        self._runs.pop(name, None)
        self._marks.pop(name, None)


def definitions(record: Record) -> dict[str, Definition]:
    """All registered definitions by their hash, those of one study and preset oldest first."""
    return {
        found: Definition(found, registered, values)
        for name, preset in dict.fromkeys((name, preset) for _, name, preset in record.studies())
        for found, registered, values in record.registered(name, preset)
    }


def _record_id(record: Record) -> str:
    """A name of the record that stays, so that two records on one server never share a run."""
    noted = record.published("")
    if "record" not in noted:
        record.note_published("", "record", uuid.uuid4().hex[:12], "")
        noted = record.published("")
    return noted["record"][0]
