"""What the mirror of searches survives: damage, a full disk, a database that goes away, a bad address."""

from __future__ import annotations

import dataclasses
import json
import resource
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bnbench.engine.mirror import Mirror
from bnbench.engine.storage import open_storage
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study import Entry
from tests.mirrored_study import SEARCH_1, brief, conduct, run, searching, shown
from tests.pilot_study import study


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage that changes each line of a journal, or leaves it out (None)."""

    def damage(path: Path) -> None:
        kept = [change(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept if line is not None))

    return damage


def _other_value(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "value": 0.125} if line.get("value") is not None else line


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def _half(path: Path) -> None:
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[: len(kept) // 2]))


def _more(path: Path) -> None:
    (last,) = path.read_text().splitlines(keepends=True)[-1:]
    path.write_text(path.read_text() + last.replace('"row":"', '"row":"0'))


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (lambda path: path.unlink(), None),
        (lambda path: path.write_bytes(b""), None),
        (_half, None),
        (_cut, "was damaged"),
        (lambda path: path.write_bytes(b"\xff\x00 not a journal\n" * 100), "was damaged"),
        (lambda path: path.write_text('{"op_code": 4, "study_id": 99}\n'), "was damaged"),
        (rewritten(_other_value), "written anew 'pilot/quick · mlp · batch · search 1' and 8 more"),
        (_more, "written anew"),
        (rewritten(lambda line: json.loads(json.dumps(line).replace('"study_hash": "', '"study_hash": "0'))),
         "written anew"),
    ],
)  # fmt: skip
def test_a_bad_mirror_is_written_anew_from_the_record_with_one_note(
    tmp_path: Path, damage: Callable[[Path], None], note: str | None
) -> None:
    other = dataclasses.replace(study(program="sweep"), name="swept")
    run(tmp_path, other)
    run(tmp_path, searching())
    journal = tmp_path / "optuna.journal"
    before = {name: brief(trials) for name, trials in shown(journal).items()}
    damage(journal)
    notes = run(tmp_path, searching())
    assert len(notes) == (note is not None)
    assert (note or "") in "".join(notes)
    assert {name: brief(trials) for name, trials in shown(journal).items()} == before
    assert run(tmp_path, searching()) == []


def test_a_full_disk_is_one_note_and_the_next_run_mends_it(tmp_path: Path) -> None:
    told: list[tuple[str, list[Entry]]] = []

    class Later:
        def tell(self, study_hash: str, entries: list[Entry]) -> None:
            told.append((study_hash, entries))

    record = Record(tmp_path / "bnbench.db")
    # The whole record is there first, so that the mirror alone meets the limit.
    for _ in conduct(record, Later(), searching()):  # type: ignore[arg-type]
        pass
    mirror = Mirror(open_storage(None, tmp_path), record.path, [searching().hash("quick")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        for study_hash, entries in told:
            mirror.tell(study_hash, entries)
        mirror.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record.close()
    (note,) = mirror.notes
    assert "takes no trials now" in note and "File too large" in note and "the next run" in note
    assert (tmp_path / "optuna.journal").stat().st_size == 9000
    (note,) = run(tmp_path, searching())
    assert "was damaged" in note
    assert len(shown(tmp_path / "optuna.journal")[SEARCH_1]) == 10


def test_a_database_that_goes_away_is_one_note(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/optuna.db"
    storage = open_storage(address, tmp_path)
    with sqlite3.connect(tmp_path / "optuna.db") as db:
        db.execute("DROP TABLE trials")
    db.close()
    record = Record(tmp_path / "bnbench.db")
    mirror = Mirror(storage, record.path, [searching().hash("quick")])
    for _ in conduct(record, mirror, searching()):
        pass
    mirror.close()
    assert len(record.table(searching().hash("quick")).of(roles=["own"])) == 4
    record.close()
    (note,) = mirror.notes
    assert "takes no trials now" in note and "\n" not in note


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("sqlite:////no/such/folder/x.db", "unable to open database file"),
        ("postgresql://me:secret@127.0.0.1:1/x", r"postgresql://me:\*\*\*@127"),
        ("nonsense://x", "cannot use --storage nonsense://x"),
        ("/no/such/folder/x.journal", "No such file"),
        ("sqlite:///{runs}/bnbench.db", "other tables"),
        ("sqlite:///{runs}/mlflow.db", "other tables"),
    ],
)
def test_an_address_that_does_not_work_is_refused_at_once_in_one_line(
    tmp_path: Path, address: str, says: str
) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        open_storage(address.format(runs=tmp_path), tmp_path, [f"sqlite:///{tmp_path}/mlflow.db"])
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)


def test_a_file_of_someone_else_is_left_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "mine.journal"
    mine.write_bytes(b"precious\n" * 10)
    with pytest.raises(BadInput, match=r"mine\.journal"):
        open_storage(str(mine), tmp_path)
    assert mine.read_bytes() == b"precious\n" * 10


def test_the_lock_of_a_killed_process_is_not_waited_for(tmp_path: Path) -> None:
    journal = tmp_path / "optuna.journal"
    Path(f"{journal}.lock").symlink_to(journal)
    start = time.monotonic()
    run(tmp_path, searching(trials=1))
    assert time.monotonic() - start < 10
