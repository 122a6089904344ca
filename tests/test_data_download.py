"""Downloads: mirrors in turn, and nothing that has not the right checksum."""

from __future__ import annotations

import hashlib

import pytest

from bnbench.data.download import obtain
from bnbench.registry import BadInput
from tests.file_server import BreakingHandler, closed_port, serving

CONTENT = b"the right bytes"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def mirrors(tmp_path):
    """Folders of mirrors: one with the file, one with another file of that name, one without."""
    for name, content in (("right", CONTENT), ("wrong", b"other bytes"), ("empty", None)):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "it.gz").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("fault", ["closed port", "wrong", "empty", "breaking"])
def test_the_next_mirror_delivers_where_one_fails(mirrors, fault):
    handler = {"handler": BreakingHandler} if fault == "breaking" else {}
    with (
        serving(mirrors / "right") as right,
        serving(mirrors / ("empty" if fault == "closed port" else fault), **handler) as first,
    ):
        address = f"http://127.0.0.1:{closed_port()}" if fault == "closed port" else first
        path = obtain([f"{address}/it.gz", f"{right}/it.gz"], SHA256, mirrors / "data")
    assert path.read_bytes() == CONTENT
    assert [file.name for file in (mirrors / "data").iterdir()] == ["it.gz"]


def test_the_first_mirror_is_asked_first(mirrors):
    with serving(mirrors / "right") as right:
        obtain([f"{right}/it.gz", "http://127.0.0.1:9/it.gz"], SHA256, mirrors / "data")
    assert (mirrors / "data" / "it.gz").read_bytes() == CONTENT


def test_where_all_mirrors_fail_each_is_named_with_its_fault(mirrors):
    closed = f"http://127.0.0.1:{closed_port()}/it.gz"
    with serving(mirrors / "wrong") as wrong, pytest.raises(BadInput) as error:
        obtain([closed, f"{wrong}/it.gz"], SHA256, mirrors / "data")
    message = str(error.value)
    assert message.startswith(f"cannot download {closed} (ConnectionError), {wrong}/it.gz (SHA256 hash")
    assert SHA256 in message
    assert hashlib.sha256(b"other bytes").hexdigest() in message
    assert message.endswith(f"or put it.gz into {mirrors / 'data'} and run it again")
    assert "\n" not in message
    assert list((mirrors / "data").iterdir()) == []


def test_a_file_that_is_there_is_checked_and_kept(mirrors):
    urls = [f"http://127.0.0.1:{closed_port()}/it.gz"]
    assert obtain(urls, SHA256, mirrors / "right") == mirrors / "right" / "it.gz"
    with pytest.raises(BadInput, match=f"instead of {SHA256}; delete it and run `make data` again"):
        obtain(urls, SHA256, mirrors / "wrong")
    assert (mirrors / "wrong" / "it.gz").read_bytes() == b"other bytes"
