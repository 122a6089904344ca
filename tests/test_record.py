"""Tests of the record: what it keeps, whoever reads, dies or fills the disk meanwhile."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bnbench.record import SCHEMA_VERSION, Record
from bnbench.registry import BadInput
from bnbench.study import Result, Trial
from bnbench.study import trial as trial_module
from bnbench.study.programs import Wanted, programs_of
from tests.pilot_study import drive, invented, study


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "bnbench.db"


@pytest.fixture
def record(path: Path) -> Iterator[Record]:
    record = Record(path)
    yield record
    record.close()


def rows(count: int, first: int = 0) -> list[tuple[Trial, Result]]:
    return [
        (trial, invented(trial))
        for trial in (Trial(seed=seed, curve_points=3) for seed in range(first, first + count))
    ]


def script(code: str, *arguments: object) -> list[str]:
    head = "import sys, time, sqlite3\nfrom pathlib import Path\nfrom bnbench.record import Record\n"
    head += "from bnbench.study import Result, Trial\nfrom bnbench.registry import BadInput\n"
    return [sys.executable, "-c", head + code, *map(str, arguments)]


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(BadInput) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_appended_is_recalled_by_key_to_the_last_bit(record: Record) -> None:
    trial = Trial(norm="group", norm_options={"num_groups": 4})
    result = Result(
        "diverged",
        {"val/acc": 0.1 + 0.2, "a": float("inf")},
        {"step": (1, 2), "x": (1e-310, -0.0)},
        "häßlich",
        {"pid": 7},
    )
    assert record.append([(trial, result), *rows(2)]) == []
    assert record.recall([trial.key, "unknown"]) == {trial.key: result}
    assert record.trial(trial.key) == trial
    assert record.trial("unknown") is None
    assert list(record.rows()) == [(trial, result), *rows(2)]
    assert list(record.rows([trial.key])) == [(trial, result)]


def test_thousands_of_keys_are_recalled_in_one_go(record: Record) -> None:
    many = rows(3000)
    record.append(many)
    statements: list[str] = []
    record._db.set_trace_callback(statements.append)
    found = record.recall([*(trial.key for trial, _ in many), *(trial.key for trial, _ in many), "unknown"])
    assert found == {trial.key: result for trial, result in many}
    assert len(statements) == 7  # 500 keys a query, each found by the index
    plan = record._db.execute("EXPLAIN QUERY PLAN SELECT * FROM rows WHERE key IN ('a', 'b')").fetchall()
    assert "USING INDEX" in str(plan)


def test_the_same_numbers_twice_are_no_fault(record: Record) -> None:
    ((trial, result),) = rows(1)
    later = dataclasses.replace(
        result,
        metrics={**result.metrics, "time/total_s": 99.0, "memory/peak_mib": 1.0},
        curve={name: list(series) for name, series in result.curve.items()},  # type: ignore[misc]
        provenance={"host": "another"},
    )
    assert record.append([(trial, result), (trial, later)]) == []
    assert record.recall([trial.key])[trial.key] == result
    nan = dataclasses.replace(result, metrics={"val/acc": float("nan")})
    assert record.append([(Trial(lr=9), nan), (Trial(lr=9), nan)]) == []


@pytest.mark.parametrize("change", [{"metrics": {"val/acc": 0.5}}, {"curve": {}}, {"metrics": {}}])
def test_two_results_of_one_row_are_a_fault_and_the_first_is_kept(
    record: Record, change: dict[str, Any]
) -> None:
    ((trial, result),) = rows(1)
    record.append([(trial, result)])
    (line,) = record.append([(trial, dataclasses.replace(result, **change))])
    assert trial.key in line and "\n" not in line
    assert record.recall([trial.key])[trial.key] == result


def test_a_failure_is_replaced_and_replaces_nothing(record: Record) -> None:
    ((trial, result),) = rows(1)
    first, second = Result("failed", reason="one"), Result("failed", reason="two")
    assert record.append([(trial, first), (trial, second)]) == []
    assert record.recall([trial.key])[trial.key] == second
    assert record.append([(trial, result)]) == []
    assert record.append([(trial, first)]) == []
    assert record.recall([trial.key])[trial.key] == result


def test_rows_of_another_row_version_are_not_given_out(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.append([(Trial(lr=0.5), invented(Trial(lr=0.5)))])
    monkeypatch.setattr(trial_module, "ROW_VERSION", trial_module.ROW_VERSION + 1)
    assert list(record.rows()) == []
    assert record.recall([Trial(lr=0.5).key]) == {}


def filled(record: Record, study_hash: str = "h", shuffle: int | None = None) -> None:
    lines = [line for _, program in programs_of(study(), "quick") for line in drive(program)[0]]
    requests: dict[str, list[Wanted]] = {}
    for e in lines:
        requests.setdefault(e.role, []).append(Wanted(e.cell, e.arm, e.replicate, e.role, e.trial))
    parts = list(requests.values())
    if shuffle is not None:
        Random(shuffle).shuffle(parts)
        Random(shuffle).shuffle(lines)
    for part in parts:
        record.enroll(study_hash, part)
    record.append([(e.trial, e.result) for e in lines])


def test_a_table_has_one_order_whatever_came_first(tmp_path: Path) -> None:
    tables = []
    for seed in range(4):
        record = Record(tmp_path / str(seed) / "bnbench.db")
        filled(record, shuffle=seed)
        tables.append(record.table("h"))
        record.close()
    assert all(table == tables[0] for table in tables)
    asked = [line for _, program in programs_of(study(), "quick") for line in drive(program)[0]]
    assert {(e.cell, e.arm, e.replicate, e.role, e.trial.key) for e in tables[0].entries} == {
        (e.cell, e.arm, e.replicate, e.role, e.trial.key) for e in asked
    }


def test_the_rows_of_a_place_keep_the_order_in_which_they_were_asked_for(record: Record) -> None:
    rates = [0.3, 0.1, 0.2]
    asked = [Wanted("c", "a", 0, "tune", Trial(lr=lr)) for lr in rates]
    record.append([(row.trial, Result("done")) for row in asked])
    record.enroll("h", asked[:2])
    record.enroll("h", asked)  # a search repeats what it has asked for
    assert [entry.trial.lr for entry in record.table("h").entries] == rates


def test_a_table_holds_what_is_measured_of_its_own_study(record: Record) -> None:
    filled(record)
    assert record.table("other").entries == ()
    missing = Trial(lr=9)
    record.enroll("other", [Wanted("c", "a", 0, "tune", missing)])
    assert record.table("other").entries == ()
    record.append([(missing, invented(missing))])
    assert [e.trial for e in record.table("other").entries] == [missing]


def test_a_new_choice_replaces_the_old_one(record: Record) -> None:
    """A tuning row that failed yesterday and works today may change what is confirmed."""
    old, new, other = Trial(lr=0.1, score_on="test"), Trial(lr=0.3, score_on="test"), Trial(lr=0.2)
    record.append([(trial, invented(trial)) for trial in (old, new, other)])
    record.enroll("h", [Wanted("c", "a", 0, "own", old), Wanted("c", "a", 1, "own", old)])
    record.enroll("h", [Wanted("c", "b", 0, "own", other), Wanted("c", "a", 0, "tune", other)])
    record.enroll("h", [Wanted("c", "a", 0, "own", new)])
    places = [(e.arm, e.replicate, e.role, e.trial.lr) for e in record.table("h").entries]
    assert places == [("a", 0, "own", 0.3), ("a", 0, "tune", 0.2), ("a", 1, "own", 0.1), ("b", 0, "own", 0.2)]


def test_definitions_are_registered_once_in_their_order(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([5.0, 4.0, 3.0])  # a clock that was set back
    monkeypatch.setattr("time.time", lambda: next(times))
    one = study().definition("quick")
    assert record.register("b", one)
    assert record.register("a", {**one, "question": "?"})
    assert not record.register("b", {**one, "question": "changed"})
    assert [(found, values["question"]) for found, _, values in record.registered("pilot", "quick")] == [
        ("b", "Does it help?"), ("a", "?")
    ]  # fmt: skip
    assert record.registered("pilot", "full") == []
    assert record.studies() == [("b", "pilot", "quick"), ("a", "pilot", "quick")]


def test_verdicts_and_what_is_published_are_kept(record: Record) -> None:
    record.register("h", study().definition("quick"))
    assert record.verdicts("h") == [] == record.verdicts("unknown")
    record.keep_verdicts("h", [{"estimate": 0.1 + 0.2}])
    assert record.verdicts("h") == [{"estimate": 0.1 + 0.2}]
    record.note_published("u", "row:1", "run", "mark")
    record.note_published("u", "row:1", "run2", "mark2")
    record.note_published("v", "row:2", "run", "mark")
    assert record.published("u") == {"row:1": ("run2", "mark2")}
    record.forget_published("u", "row:1")
    assert record.published("u") == {}


def test_another_connection_reads_whole_batches_while_one_writes(record: Record, path: Path) -> None:
    sizes: set[int] = set()
    stop = threading.Event()

    def read() -> None:
        other = Record(path)
        ended = False
        while not ended:
            ended = stop.is_set()  # Then it reads once more.
            sizes.add(len(list(other.rows())))
        other.close()

    reader = threading.Thread(target=read)
    reader.start()
    for batch in range(30):
        record.append(rows(10, first=10 * batch))
    stop.set()
    reader.join()
    assert 300 in sizes and all(size % 10 == 0 for size in sizes)


def test_a_batch_that_fails_leaves_nothing(record: Record) -> None:
    good = rows(3)
    bad = (Trial(lr=5), Result("done", {"val/acc": object()}))  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        record.append([*good, bad])
    assert list(record.rows()) == []
    record.append(good)
    assert list(record.rows()) == good


def test_killing_the_writer_leaves_whole_rows(path: Path) -> None:
    code = """
record = Record(Path(sys.argv[1]))
for first in range(0, 10**6, 5):
    seeds = range(first, first + 5)
    record.append([(Trial(seed=seed), Result("done", {"val/acc": float(seed)})) for seed in seeds])
    print(first, flush=True)
"""
    for attempt in range(3):
        file = path.with_name(f"{attempt}.db")
        with subprocess.Popen(script(code, file), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            printed = [process.stdout.readline() for _ in range(20 + 30 * attempt)]
            process.send_signal(signal.SIGKILL)
        record = Record(file)
        found = list(record.rows())
        record.close()
        assert len(found) >= int(printed[-1]) + 5 and len(found) % 5 == 0
        assert all(result.metrics == {"val/acc": float(trial.seed)} for trial, result in found)


def test_killing_whoever_makes_the_record_leaves_one_that_can_be_made(path: Path) -> None:
    """The schema comes in one transaction: here the process dies before its end."""
    path.parent.mkdir()
    code = "import os\nfrom bnbench import record\nrecord._SCHEMA += ' SELECT die();'\n"
    code += "real = sqlite3.connect\ndef connect(*a, **k):\n    db = real(*a, **k)\n"
    code += "    db.create_function('die', 0, lambda: os.kill(os.getpid(), 9))\n    return db\n"
    code += "sqlite3.connect = connect\nRecord(Path(sys.argv[1]))"
    assert subprocess.run(script(code, path)).returncode == -signal.SIGKILL
    record = Record(path)
    assert record.append(rows(2)) == []
    record.close()


def spoiled(path: Path, spoil: Callable[[bytes], bytes]) -> bytes:
    """A record of 200 rows, changed; returns its content."""
    record = Record(path)
    record.append(rows(200))
    record.close()
    path.write_bytes(spoil(path.read_bytes()))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("truncated", lambda data: data[: len(data) // 2]),
        ("truncated", lambda data: data[:5000]),
        ("no database", lambda data: b"these are my notes\n" * 400),
        ("no database", lambda data: b"xy"),
        ("corrupt", lambda data: data[:8192] + bytes(8192) + data[16384:]),
        ("corrupt", lambda data: data[:4096] + b"\xff" * (len(data) - 4096)),
    ],
)
def test_a_damaged_record_is_refused_and_left_alone(
    path: Path, what: str, spoil: Callable[[bytes], bytes]
) -> None:
    before = spoiled(path, spoil)
    said = refusal(lambda: Record(path))
    assert str(path) in said and "damaged: move it away" in said
    assert path.read_bytes() == before


def test_a_row_that_was_changed_by_hand_is_explained(path: Path) -> None:
    spoiled(path, lambda data: data)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE rows SET metrics = '{' WHERE rowid = 5")
        database.execute("UPDATE rows SET status = 'perfect' WHERE rowid = 6")
    database.close()
    record = Record(path)
    assert "damaged: move it away" in refusal(lambda: list(record.rows()))
    for seed in (4, 5):
        key = Trial(seed=seed, curve_points=3).key
        assert "damaged: move it away" in refusal(lambda key=key: record.recall([key]))  # type: ignore[misc]
    record.close()


def test_a_record_of_another_schema_is_refused_and_left_alone(path: Path) -> None:
    spoiled(path, lambda data: data)
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    database.close()
    before = path.read_bytes()
    assert f"has schema version {SCHEMA_VERSION + 1}, this bnbench reads {SCHEMA_VERSION}" in refusal(
        lambda: Record(path)
    )
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    before = path.read_bytes()
    assert "is a database of another program" in refusal(lambda: Record(path))
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.db").mkdir()
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    places = [tmp_path / "file" / "x.db", tmp_path / "folder.db", Path("/proc/self/bnbench.db")]
    for path in places + ([locked / "x.db"] if os.geteuid() else []):
        said = refusal(lambda path=path: Record(path))  # type: ignore[misc]
        assert "--runs" in said and str(path.parent) in said


def test_a_full_disk_is_one_line_and_costs_no_recorded_row(path: Path) -> None:
    code = """
import resource
record = Record(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for seed in range(10_000):
    try:
        record.append([(Trial(seed=seed), Result("done", {"val/acc": float(seed)}, reason="x" * 3000))])
    except BadInput as error:
        print(seed, error, sep="\\n")
        sys.exit(2)
"""
    answer = subprocess.run(script(code, path), capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (2, "")
    count, said = answer.stdout.splitlines()
    assert str(path) in said and "free space on that disk" in said
    record = Record(path)
    assert len(list(record.rows())) == int(count) > 10
    assert record.append(rows(1)) == []
    record.close()


def test_a_lock_of_another_process_is_waited_for(record: Record, path: Path) -> None:
    code = """
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(2)
database.execute("COMMIT")
"""
    with subprocess.Popen(script(code, path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        assert record.recall(["a"]) == {}  # readers do not wait
        assert process.poll() is None
        other = Record(path)
        assert record.append(rows(1)) == []
        assert process.wait() == 0
        assert list(other.rows()) == rows(1)
        other.close()


def test_a_lock_that_never_ends_is_explained(record: Record, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    record._db.execute("PRAGMA busy_timeout=50")
    assert "locked; another process holds it" in refusal(lambda: record.append(rows(1)))
    other.close()
    assert record.append(rows(1)) == []
