"""Which MLflow is meant, and that its address is never shown with a password."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbench.registry import BadInput
from bnbench.tracking import mask, tracking_uri


def test_flag_beats_environment_beats_the_runs_folder(tmp_path: Path) -> None:
    environ = {"MLFLOW_TRACKING_URI": "http://b:1/"}
    assert tracking_uri("http://a:1", environ, tmp_path) == "http://a:1"
    assert tracking_uri(None, environ, tmp_path) == "http://b:1"
    assert tracking_uri(None, {}, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri("sqlite:///x.db", {}, tmp_path) == f"sqlite:///{Path.cwd()}/x.db"


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "/tmp/mlruns", "file:///tmp/mlruns", "file:mlruns"])
def test_folders_are_refused_with_the_remedy(uri: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="sqlite:///"):
        tracking_uri(uri, {}, tmp_path)
    with pytest.raises(BadInput, match="MLFLOW_TRACKING_URI"):
        tracking_uri(None, {"MLFLOW_TRACKING_URI": uri}, tmp_path)


@given(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=5),
    st.sampled_from(["", "/db", "/db?a=1"]),
)
def test_no_password_is_shown(password: str, tail: str) -> None:
    shown = mask(f"postgresql://HOST:{password}@[::1]:5432{tail}")
    assert shown == f"postgresql://HOST:***@[::1]:5432{tail}"


def test_passwords_in_a_query_are_masked_and_other_addresses_stay() -> None:
    assert mask("postgresql://h/db?user=u&password=x&sslmode=require") == (
        "postgresql://h/db?user=u&password=***&sslmode=require"
    )
    for uri in ("http://h:5000", "sqlite:////a/b@c:d.db", "http://me@h:1/x"):
        assert mask(uri) == uri
