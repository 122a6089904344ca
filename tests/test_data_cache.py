"""Cache files: whole or absent, and repaired when damaged."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from bnbench.data.cache import cached_arrays, whole_file
from bnbench.registry import BadInput

ARRAYS = {"x": np.arange(1000, dtype=np.float32), "y": np.arange(10)}


def damage_by_truncation(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_by_one_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def damage_by_other_content(content: bytes) -> bytes:
    return b"not an archive"


def damage_by_emptying(content: bytes) -> bytes:
    return b""


def unneeded():
    raise AssertionError("the cache was there")


def test_arrays_are_made_once(tmp_path):
    path = tmp_path / "deep" / "arrays.npz"
    cached_arrays(path, lambda: ARRAYS)
    again = cached_arrays(path, unneeded)
    assert again.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(again[name], array)
        assert again[name].dtype == array.dtype


@pytest.mark.parametrize(
    "damage", [damage_by_truncation, damage_by_one_bit, damage_by_other_content, damage_by_emptying]
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    path = tmp_path / "arrays.npz"
    cached_arrays(path, lambda: ARRAYS)
    path.write_bytes(damage(path.read_bytes()))
    again = cached_arrays(path, lambda: ARRAYS)
    assert np.array_equal(again["x"], ARRAYS["x"])
    assert np.array_equal(cached_arrays(path, unneeded)["x"], ARRAYS["x"])


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with whole_file(path) as file:
            file.write(b"new")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "arrays.npz"
    with pytest.raises(BadInput, match=r"cannot write .*arrays\.npz") as caught:
        cached_arrays(path, lambda: ARRAYS)
    assert "\n" not in str(caught.value)


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from bnbench.data.cache import cached_arrays
from bnbench.registry import BadInput
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
try:
    cached_arrays(Path(sys.argv[1]) / "arrays.npz", lambda: {"x": np.zeros(10_000)})
except BadInput as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
def test_a_full_disk_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot write" in answer.stdout
    assert answer.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
