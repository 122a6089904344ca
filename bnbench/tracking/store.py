"""Opening the MLflow store: made once, by the coordinator, before any worker starts."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import urllib.error
import urllib.request
from collections.abc import MutableMapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnbench.registry import BadInput
from bnbench.tracking.address import mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

#: Without the first three, a call to a server that is down blocks for 246 s; with them, for 7 s.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Store:
    """An MLflow that answers.

    `artifacts` is the folder for files as a URI, None where the server chooses; `notice` is one line for
    the person, if something had to be mended.
    """

    client: MlflowClient
    uri: str
    artifacts: str | None
    notice: str = ""

    @property
    def shown(self) -> str:
        """The address without passwords."""
        return mask(self.uri)


def open_store(uri: str, runs: Path) -> Store:
    """Open the tracking store of an address, and make its schema where it is a new database.

    A corrupt `runs/mlflow.db` is moved aside, since everything in it can be published again; any other
    store is left as it is. Raises BadInput where a server is down, or a database cannot be used.
    """
    prepare_environment(os.environ)
    if re.match(r"https?:", uri):
        _check_server(uri, runs)
    notice = ""
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        notice = _set_aside_corrupt(path, runs)
        if not path.exists():
            _create(path)

    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # What MLflow logs as an error reaches us as an exception too.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.CRITICAL)
    remote = re.match(r"https?:|databricks|uc:", uri)
    artifacts = None if remote else (runs.absolute() / "mlartifacts").as_uri()
    try:
        if artifacts and re.match(r"sqlite|postgresql|mysql|mssql", uri):
            # MLflow's own way to this store would give its Default experiment a folder in the working folder.
            SqlAlchemyStore(uri, artifacts)  # type: ignore[no-untyped-call]
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except MlflowException as error:
        text = one_line(error, uri)
        if "out-of-date database schema" in text or "Can't locate revision" in text:
            remedy = f"upgrade it with `mlflow db upgrade {mask(uri)}`, or use the mlflow that made it"
            raise BadInput(f"{mask(uri)} was made by another version of MLflow; {remedy}") from None
        raise BadInput(f"cannot use MLflow at {mask(uri)}: {text}") from None
    except Exception as error:
        raise BadInput(f"cannot use MLflow at {mask(uri)}: {one_line(error, uri)}") from None
    return Store(client, uri, artifacts, notice)


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Set what MLflow reads, where the person has not: short waits, no telemetry, no line a run."""
    for name, value in _ENVIRONMENT.items():
        environ.setdefault(name, value)


def one_line(error: BaseException, uri: str) -> str:
    """What an error says, in one line without passwords."""
    text = " ".join(str(error).replace(uri, mask(uri)).split())
    return text[:300] or type(error).__name__


def _check_server(uri: str, runs: Path) -> None:
    request = urllib.request.Request(f"{_without_user(uri)}/health")
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        return  # Something answers there; whether it is MLflow shows at the first call.
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise BadInput(
            f"no MLflow server answers at {mask(uri)} ({reason}); start it,"
            f" or leave out --tracking-uri and MLFLOW_TRACKING_URI to use {runs / 'mlflow.db'}"
        ) from None


def _without_user(uri: str) -> str:
    """The address without user and password, which urllib would take for a part of the host."""
    return re.sub(r"://[^/?#]*@", "://", uri)


def _create(path: Path) -> None:
    """Make an empty database that can be read while it is written, and takes runs twice as fast."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA journal_mode=WAL")
    except (OSError, sqlite3.Error) as error:
        raise BadInput(f"cannot make {path}: {error}; name another with --runs or --tracking-uri") from None


def _set_aside_corrupt(path: Path, runs: Path) -> str:
    """Move a database that cannot be read out of the way, if it is ours; one line that says so."""
    if not path.exists():
        return ""
    try:
        with closing(sqlite3.connect(path, timeout=20)) as db:
            (state,) = db.execute("PRAGMA quick_check(1)").fetchone()
        problem = "" if state == "ok" else "it is damaged"
    except sqlite3.OperationalError as error:
        raise BadInput(
            f"cannot use {path}: {error}; another process may hold it, or the folder is read-only"
        ) from None
    except sqlite3.DatabaseError as error:
        problem = str(error)
    if not problem:
        return ""
    if path.parent != runs.absolute():
        raise BadInput(
            f"{path} cannot be read ({problem}); move it away, or name another with --tracking-uri"
        )
    aside = next(
        new
        for number in range(1, 1000)
        if not (new := path.with_name(f"{path.name}.corrupt-{number}")).exists()
    )
    for suffix in ("-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.rename(aside)
    return f"{path} could not be read ({problem}): moved to {aside.name}, and published anew from the record"
