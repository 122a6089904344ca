"""CIFAR-10 and CIFAR-100: the download, the reader, and what happens when either goes wrong."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from bnbench.data import default_folder, fetch, load_split
from bnbench.data.cifar import (
    CIFAR10,
    CIFAR100,
    SYNTHETIC10,
    SYNTHETIC100,
    fetch_archive,
    read_archive,
    write_synthetic,
)
from bnbench.registry import BadInput
from tests.file_server import BreakingHandler, closed_port, serving

SMALL = replace(CIFAR10, name="small", directory="small-bin", records=20, test_records=20)
HUNDRED = replace(CIFAR100, directory="hundred", records=200, test_records=100)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def mirror(tmp_path):
    """A folder with a packed archive of SMALL, and SMALL with its checksum."""
    folder = tmp_path / "mirror"
    write_synthetic(SMALL, folder)
    packed = folder / SMALL.file
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder / SMALL.directory, SMALL.directory)
    return folder, replace(SMALL, sha256=hashlib.sha256(packed.read_bytes()).hexdigest())


def at(archive, address):
    return replace(archive, url=f"{address}/{archive.file}")


def assert_one_line(error) -> None:
    assert "\n" not in str(error.value)


# What is read.


@pytest.mark.parametrize("archive", [SMALL, HUNDRED], ids=["10", "100"])
def test_records_are_read_as_the_format_says(tmp_path, archive):
    write_synthetic(archive, tmp_path)
    expected = set()
    for file in archive.train_files:
        content = (tmp_path / archive.directory / file).read_bytes()
        for start in range(0, len(content), archive.label_bytes + 3072):
            label = content[start + archive.label_bytes - 1]
            pixels = content[start + archive.label_bytes : start + archive.label_bytes + 3072]
            expected.add((label, pixels))
    parts = read_archive(archive, 0, tmp_path)
    found = {
        (int(label), image.tobytes())
        for part in (parts.train, parts.val)
        for image, label in zip(part.x, part.y, strict=True)
    }
    assert found == expected
    assert len(parts.val.y) == len(expected) // 10
    # Red comes first, then green and blue, each row by row.
    first = (tmp_path / archive.directory / archive.test_file).read_bytes()[archive.label_bytes :]
    assert parts.test.x[0, 1, 2, 3] == first[1024 + 2 * 32 + 3]


def test_only_the_fine_label_counts(tmp_path):
    write_synthetic(HUNDRED, tmp_path)
    path = tmp_path / HUNDRED.directory / HUNDRED.test_file
    records = np.fromfile(path, np.uint8).reshape(HUNDRED.test_records, -1)
    records[:, 0] = 255
    records.tofile(path)
    assert np.array_equal(read_archive(HUNDRED, 0, tmp_path).test.y, records[:, 1])


def test_synthetic_files_have_the_names_and_records_of_the_real_ones(tmp_path):
    fetch("cifar10", tmp_path, synthetic=True)
    files = {path.name: path.stat().st_size for path in (tmp_path / "cifar10-synthetic").iterdir()}
    assert files == {
        **{f"data_batch_{number}.bin": 256 * 3073 for number in range(1, 6)},
        "test_batch.bin": 256 * 3073,
    }
    assert CIFAR10.files == SYNTHETIC10.files
    fetch("cifar100", tmp_path, synthetic=True)
    files = {path.name: path.stat().st_size for path in (tmp_path / "cifar100-synthetic").iterdir()}
    assert files == {"train.bin": 2560 * 3074, "test.bin": 1024 * 3074}
    assert CIFAR100.files == SYNTHETIC100.files


# The download.


def test_an_archive_is_downloaded_checked_and_unpacked(mirror, tmp_path, capfd):
    folder, archive = mirror
    with serving(folder) as address:
        fetch_archive(at(archive, address), tmp_path / "data")
    for file in archive.files:
        got = tmp_path / "data" / archive.directory / file
        assert got.read_bytes() == (folder / archive.directory / file).read_bytes()
    fetch_archive(at(archive, "http://127.0.0.1:9"), tmp_path / "data")  # all is there: no download
    assert capfd.readouterr() == ("", "")


def test_an_archive_put_into_the_folder_needs_no_network(mirror, tmp_path):
    folder, archive = mirror
    (tmp_path / "data").mkdir()
    (folder / archive.file).rename(tmp_path / "data" / archive.file)
    fetch_archive(at(archive, f"http://127.0.0.1:{closed_port()}"), tmp_path / "data")
    assert len(read_archive(archive, 0, tmp_path / "data").test.y) == 20


def test_a_truncated_file_is_unpacked_again(mirror, tmp_path):
    folder, archive = mirror
    with serving(folder) as address:
        fetch_archive(at(archive, address), tmp_path)
    path = tmp_path / archive.directory / "data_batch_2.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(BadInput, match=r"data_batch_2\.bin has 5000 bytes instead of 61460; run `make data`"):
        read_archive(archive, 0, tmp_path)
    fetch_archive(archive, tmp_path)
    assert path.read_bytes() == whole


def test_no_network_says_what_to_do(tmp_path):
    archive = at(SMALL, f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(
        BadInput, match=r"cannot download http.*run `make data` on a machine with internet"
    ) as error:
        fetch_archive(archive, tmp_path)
    assert_one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(tmp_path):
    with (
        serving(tmp_path, BreakingHandler) as address,
        pytest.raises(BadInput, match="cannot download") as error,
    ):
        fetch_archive(at(SMALL, address), tmp_path / "data")
    assert_one_line(error)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_download_with_another_checksum_leaves_nothing(mirror, tmp_path):
    folder, archive = mirror
    wrong = replace(archive, sha256="0" * 64)
    with serving(folder) as address, pytest.raises(BadInput, match="0" * 64) as error:
        fetch_archive(at(wrong, address), tmp_path / "data")
    assert archive.sha256 in str(error.value)
    assert_one_line(error)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_damaged_archive_in_the_folder_is_named_with_both_checksums(mirror):
    folder, archive = mirror
    packed = folder / archive.file
    packed.write_bytes(packed.read_bytes()[:-100])
    for file in archive.files:
        (folder / archive.directory / file).unlink()
    found = hashlib.sha256(packed.read_bytes()).hexdigest()
    with pytest.raises(BadInput, match=f"{found} instead of {archive.sha256}; delete it") as error:
        fetch_archive(archive, folder)
    assert_one_line(error)
    assert list((folder / archive.directory).iterdir()) == []


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(BadInput, match=r"data_batch_1\.bin is missing; run `make data`") as error:
        load_split("cifar10", 0, folder=tmp_path)
    assert_one_line(error)


def test_bytes_that_are_no_labels_are_refused(tmp_path):
    write_synthetic(SMALL, tmp_path)
    path = tmp_path / SMALL.directory / SMALL.test_file
    content = bytearray(path.read_bytes())
    content[3 * 3073] = 10
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"test_batch\.bin has the label 10, but labels end at 9"):
        read_archive(SMALL, 0, tmp_path)


# The published mean and standard deviation of each channel, over the training files.
REAL = [
    (CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    (CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("archive", "mean", "sd"), REAL, ids=["10", "100"])
def test_the_real_files_have_the_published_statistics(archive, mean, sd):
    if not all((default_folder() / archive.directory / file).exists() for file in archive.files):
        pytest.skip(f"{archive.name} is not in the folder of data sets, {default_folder()}")
    parts = read_archive(archive, 0, default_folder())
    assert [len(part.y) for part in (parts.train, parts.val, parts.test)] == [45_000, 5_000, 10_000]
    labels = np.bincount(np.concatenate([parts.train.y, parts.val.y]))
    assert labels.tolist() == [50_000 // archive.num_classes] * archive.num_classes
    pixels = np.concatenate([parts.train.x, parts.val.x])
    assert np.allclose(pixels.mean((0, 2, 3)) / 255, mean, atol=1e-4)
    assert np.allclose(pixels.std((0, 2, 3)) / 255, sd, atol=1e-4)
