"""The pages of the UI that show recorded trainings: known from what was published, without a server."""

from pathlib import Path

import pytest

from bnbench.study.table import Table
from bnbench.tracking import open_store, pages_of, publish, tracking_uri
from tests.tracking_records import MAIN, STUDY_HASH, doctored_record, empty_store, runs_of

# MLflow and SQLAlchemy use what each other has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

__all__ = ["empty_store"]  # a fixture


def test_every_published_training_has_the_page_of_its_run(tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    uri = tracking_uri(None, {}, tmp_path)
    store = open_store(uri, tmp_path)
    with doctored_record(tmp_path) as record:
        table = record.table(STUDY_HASH)
        assert pages_of(record, STUDY_HASH, table, uri) == {}
        publish(record, store)
        pages = pages_of(record, STUDY_HASH, table, uri)
        assert pages_of(record, "f" * 12, table, uri) == {}
    assert set(pages) == {e.trial.key for e in table.entries}
    keys = {run.info.run_id: run.data.tags.get("bnbench.key") for run in runs_of(store, MAIN)}
    for entry in table.entries:
        base, run = pages[entry.trial.key].rsplit("/", 1)
        assert base == "http://127.0.0.1:5000/#/runs"
        if entry.role == "own":
            assert keys[run] == entry.trial.key


@pytest.mark.parametrize(
    ("uri", "noted", "base"),
    [
        ("http://me:secret@host:5000", "http://me:***@host:5000", "http://host:5000"),
        ("https://host/mlflow", "https://host/mlflow", "https://host/mlflow"),
        ("postgresql://me:secret@db/x", "postgresql://me:***@db/x", "http://127.0.0.1:5000"),
    ],
)
def test_a_server_shows_its_own_pages_and_no_address_has_a_password(
    tmp_path: Path, uri: str, noted: str, base: str
) -> None:
    with doctored_record(tmp_path, replicates=range(1)) as record:
        table = record.table(STUDY_HASH)
        (own, *_) = table.of(roles=("own",))
        name = f"{STUDY_HASH}/own/{own.cell}/{own.arm}/s0/{own.trial.key}"
        record.note_published(noted, name, "r" * 32, "mark")
        assert pages_of(record, STUDY_HASH, table, uri) == {own.trial.key: f"{base}/#/runs/{'r' * 32}"}
        assert pages_of(record, STUDY_HASH, Table(()), uri) == {}
        assert pages_of(record, STUDY_HASH, table, "databricks") == {}


def test_a_run_that_was_only_begun_is_no_page(tmp_path: Path) -> None:
    uri = "http://host"
    with doctored_record(tmp_path, replicates=range(1)) as record:
        table = record.table(STUDY_HASH)
        (own, *_) = table.of(roles=("own",))
        name = f"{STUDY_HASH}/own/{own.cell}/{own.arm}/s0/{own.trial.key}"
        record.note_published(uri, name, "r" * 32, "running 1.0 5")
        assert pages_of(record, STUDY_HASH, table, uri) == {}
