"""Tests of what the record keeps of probes, and of records from before there were any."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnbench.exchange import read_rows, write_rows
from bnbench.probes import Trace
from bnbench.record import SCHEMA_VERSION, Record
from bnbench.registry import BadInput
from bnbench.study import Entry, Result, Trial
from tests.pilot_study import invented
from tests.probe_traces import TRACES

TRIAL = Trial(norm="none", curve_points=3)
PROBED = dataclasses.replace(invented(TRIAL), traces=TRACES)
PLAIN = Trial(norm="group", norm_options={"num_groups": 4})
#: What turns a record of this version into one of an earlier version.
BACK = {
    1: ("ALTER TABLE rows DROP COLUMN traces", "ALTER TABLE members DROP COLUMN number"),
    2: ("ALTER TABLE rows DROP COLUMN traces",),
}


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    record = Record(tmp_path / "bnbench.db")
    yield record
    record.close()


def changed(probe: str, **values: tuple[float, ...]) -> Result:
    """The result with other values of one probe."""
    trace = dataclasses.replace(TRACES[probe], values={**TRACES[probe].values, **values})
    return dataclasses.replace(PROBED, traces={**TRACES, probe: trace})


def old_record(path: Path, version: int, rows: int = 1) -> Record:
    """A record of rows without probes as an earlier version left it, open."""
    trials = [PLAIN, *(Trial(seed=seed) for seed in range(1, rows))]
    entries = [Entry("c", "a", trial.seed, "own", trial, invented(trial)) for trial in trials]
    record = Record(path)
    record.append([(entry.trial, entry.result) for entry in entries])
    record.enroll("h", entries)
    for change in BACK[version]:
        record._db.execute(change)
    record._db.execute(f"PRAGMA user_version={version}")
    return record


def test_traces_are_recalled_to_the_last_bit(record: Record) -> None:
    assert record.append([(TRIAL, PROBED), (PLAIN, invented(PLAIN))]) == []
    record.enroll("h", [Entry("c", "a", 0, "own", TRIAL, PROBED)])
    (entry,) = record.table("h").entries
    ((_, listed), (_, plain)) = record.rows()
    for found in (record.recall([TRIAL.key])[TRIAL.key], listed, entry.result):
        assert repr(found) == repr(PROBED)
        assert list(found.traces) == ["gradient_flow", "landscape"]
    assert plain.traces == {}


def test_what_is_infinite_comes_back_as_not_a_number_and_is_no_fault(record: Record) -> None:
    result = changed("landscape", range=(math.inf,))
    assert record.append([(TRIAL, result), (TRIAL, result)]) == []
    assert math.isnan(record.recall([TRIAL.key])[TRIAL.key].traces["landscape"].values["range"][0])


@pytest.mark.parametrize(
    "other",
    [
        changed("landscape", range=(math.nextafter(0.75, 1),)),
        changed("gradient_flow", ratio=(2.0, 3.0, 0.0)),
        changed("gradient_flow", growth=(1.2, 0.0, 0.1 + 0.2)),
        dataclasses.replace(PROBED, traces={"landscape": TRACES["landscape"]}),
        dataclasses.replace(PROBED, traces={}),
        dataclasses.replace(
            PROBED,
            traces={**TRACES, "landscape": dataclasses.replace(TRACES["landscape"], index=(0.5, 1.0, 4.0))},
        ),
    ],
)
def test_two_results_with_other_traces_are_a_fault_and_the_first_is_kept(
    record: Record, other: Result
) -> None:
    assert record.append([(TRIAL, PROBED), (TRIAL, PROBED)]) == []
    (line,) = record.append([(TRIAL, other)])
    assert TRIAL.key in line
    assert repr(record.recall([TRIAL.key])[TRIAL.key]) == repr(PROBED)


def test_a_repetition_has_the_same_numbers_whatever_its_time_and_place() -> None:
    later = dataclasses.replace(
        PROBED, metrics={**PROBED.metrics, "time/total_s": 99.0}, provenance={"host": "another"}
    )
    assert PROBED.has_same_numbers(later)
    assert not PROBED.has_same_numbers(dataclasses.replace(PROBED, curve={}))
    nan = Result("done", {"val/acc": math.nan})
    assert nan.has_same_numbers(nan) and not nan.has_same_numbers(Result("done", {"val/acc": 0.0}))


def test_a_result_with_traces_comes_back_from_a_worker() -> None:
    assert repr(pickle.loads(pickle.dumps(PROBED))) == repr(PROBED)


def test_traces_go_from_record_to_record_through_a_file(record: Record, tmp_path: Path) -> None:
    record.append([(TRIAL, PROBED), (PLAIN, invented(PLAIN))])
    write_rows(tmp_path / "rows.parquet", record.rows())
    other = Record(tmp_path / "other.db")
    assert other.append(read_rows(tmp_path / "rows.parquet")) == []
    assert repr(list(other.rows())) == repr([(TRIAL, PROBED), (PLAIN, invented(PLAIN))])
    other.close()


@pytest.mark.parametrize("version", BACK)
def test_a_record_of_an_earlier_version_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    path = tmp_path / "bnbench.db"
    old_record(path, version).close()
    record, fresh = Record(path), Record(tmp_path / "fresh.db")
    assert list(record.rows()) == [(PLAIN, invented(PLAIN))]
    assert [entry.trial for entry in record.table("h").entries] == [PLAIN]
    assert record.append([(TRIAL, PROBED)]) == []
    record.enroll("h", [Entry("c", "a", 1, "own", TRIAL, PROBED)])
    assert repr(record.recall([TRIAL.key])[TRIAL.key]) == repr(PROBED)
    for table in ("rows", "members"):
        columns = f"PRAGMA table_info({table})"
        assert record._db.execute(columns).fetchall() == fresh._db.execute(columns).fetchall()
    assert record._db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    record.close()
    fresh.close()


def test_two_processes_may_open_a_record_of_an_earlier_version(tmp_path: Path) -> None:
    """The second has read the version when the first, in a transaction, brings the record up to date."""
    path = tmp_path / "bnbench.db"
    first = old_record(path, 1)

    class Second(Record):
        def _transaction(self):  # type: ignore[no-untyped-def]
            if first._db.execute("PRAGMA user_version").fetchone() == (1,):
                first._open()
            return super()._transaction()

    second = Second(path)
    assert second.append([(TRIAL, PROBED)]) == []
    assert len(list(first.rows())) == 2
    first.close()
    second.close()


def test_a_damaged_record_of_an_earlier_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bnbench.db"
    old_record(path, 2, rows=200).close()
    before = path.read_bytes()[:-4096] + bytes(4096)  # a page that no change of the schema looks at
    path.write_bytes(before)
    with pytest.raises(BadInput, match="damaged: move it away"):
        Record(path)
    assert path.read_bytes() == before


def test_broken_traces_are_explained(tmp_path: Path) -> None:
    record = Record(tmp_path / "bnbench.db")
    record.append([(TRIAL, PROBED)])
    record._db.execute("UPDATE rows SET traces = '{'")
    with pytest.raises(BadInput, match=re.escape("damaged: move it away")):
        record.recall([TRIAL.key])
    record.close()


def test_the_record_holds_plain_json(record: Record) -> None:
    record.append([(TRIAL, PROBED)])
    with sqlite3.connect(record.path) as database:
        ((text,),) = database.execute("SELECT traces FROM rows")
    database.close()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["gradient_flow"]["values"]["growth"] == [1.2, None, 0.1 + 0.2]
    assert Trace.from_json(found["landscape"]).series == TRACES["landscape"].series
