"""Which MLflow is meant, and how its address is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from bnbench.registry import BadInput

_SECRET = re.compile(r"(?i)([?&;](?:password|passwd|pwd|token|secret|sslpassword)=)[^&;#]*")
_USER = re.compile(r"(://[^/?#@:]*):[^/?#]*@")


def tracking_uri(flag: str | None, environ: Mapping[str, str], runs: Path) -> str:
    """The address of the tracking store: the flag, else MLFLOW_TRACKING_URI, else `runs/mlflow.db`.

    A relative SQLite path becomes absolute, so that one store has one name. Raises BadInput for a plain
    folder or a `file:` address, which MLflow no longer writes to.
    """
    if flag:
        source, uri = "--tracking-uri", flag
    elif environ.get("MLFLOW_TRACKING_URI"):
        source, uri = "MLFLOW_TRACKING_URI", environ["MLFLOW_TRACKING_URI"]
    else:
        source, uri = "--runs", f"sqlite:///{runs.absolute() / 'mlflow.db'}"
    uri = uri.strip()
    if uri.startswith("file:") or not re.match(r"[A-Za-z][\w+.-]*:|databricks", uri):
        raise BadInput(
            f"{source} is {mask(uri)!r}, a folder, and MLflow no longer writes to folders; give a database"
            " (sqlite:///path/mlflow.db) or a server (http://host:5000), or leave it out for one under --runs"
        )
    if uri.startswith("sqlite:///"):
        path = uri.removeprefix("sqlite:///")
        if "?" in path or "#" in path:
            raise BadInput(
                f"{source}: a SQLite address cannot hold '?' or '#': {uri!r}; choose another folder"
            )
        return f"sqlite:///{Path(path).absolute()}"
    return uri.rstrip("/")


def mask(uri: str) -> str:
    """The address without its passwords: `postgresql://me:***@host/db`."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1:***@", uri))
