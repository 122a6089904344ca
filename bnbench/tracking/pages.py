"""Which page of the MLflow UI shows a recorded training, known without asking a server."""

from __future__ import annotations

import re

from bnbench.record import Record
from bnbench.study.table import Table
from bnbench.tracking.address import mask
from bnbench.tracking.draft import Definition
from bnbench.tracking.layout import item_name

#: Where `bnbench ui` serves a store that is a database.
LOCAL_UI = "http://127.0.0.1:5000"


def pages_of(record: Record, study_hash: str, table: Table, uri: str) -> dict[str, str]:
    """The addresses of the runs of a study's trainings, by key of the row, as far as they are published.

    A point of a grid has the page of its grid. A store that is a server has its own UI; that of a database
    is where `bnbench ui` serves it. No address holds a user's name or password.
    """
    known = {
        found: Definition(found, when, values)
        for found, name, preset in record.studies()
        if found == study_hash
        for found, when, values in record.registered(name, preset)
        if found == study_hash
    }
    if study_hash not in known or not re.match(r"https?:|sqlite|postgresql|mysql|mssql", uri):
        return {}
    base = re.sub(r"://[^/?#]*@", "://", uri).rstrip("/") if uri.startswith("http") else LOCAL_UI
    runs = record.published(mask(uri))
    found = {}
    for entry in table.entries:
        run, mark = runs.get(item_name(known[study_hash], entry), ("", ""))
        # A run that was begun for another attempt is not this training.
        if run and not mark.startswith("running"):
            found[entry.trial.key] = f"{base}/#/runs/{run}"
    return found
