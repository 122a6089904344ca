"""MNIST and Fashion-MNIST: the reader, the download, and what happens when either goes wrong."""

from __future__ import annotations

import gzip
import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from bnbench.data import AUGMENTATIONS, augmentation, default_folder, fetch, generator, load_split
from bnbench.data.mnist import FASHION, MNIST, fetch_idx, read_idx, synthetic_of, write_synthetic
from bnbench.registry import BadInput
from tests.file_server import closed_port, serving

SMALL = replace(MNIST, name="small", directory="small", counts={"train": 120, "t10k": 30})
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def mirror(tmp_path):
    """A folder with the files of SMALL, and SMALL with their checksums."""
    folder = tmp_path / "mirror"
    write_synthetic(SMALL, folder)
    files = sorted((folder / SMALL.directory).iterdir())
    return folder, replace(SMALL, sha256={file.name: digest(file) for file in files})


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def at(files, *addresses):
    return replace(files, mirrors=tuple(f"{address}/{files.directory}" for address in addresses))


def unpack(path, header: str) -> tuple[tuple[int, ...], bytes]:
    content = gzip.decompress(path.read_bytes())
    return struct.unpack(header, content[: struct.calcsize(header)]), content[struct.calcsize(header) :]


# What is read.


def test_images_and_labels_are_read_as_the_format_says(mirror):
    folder, files = mirror
    expected = set()
    for part, count in (("train", 120), ("t10k", 30)):
        # The magic numbers of the data set's page: 2051 for images, 2049 for labels.
        numbers, pixels = unpack(folder / "small" / f"{part}-images-idx3-ubyte.gz", ">IIII")
        assert numbers == (2051, count, 28, 28)
        numbers, labels = unpack(folder / "small" / f"{part}-labels-idx1-ubyte.gz", ">II")
        assert numbers == (2049, count)
        expected |= {(labels[i], pixels[784 * i : 784 * (i + 1)]) for i in range(count)}
    parts = read_idx(files, 0, folder)
    found = {
        (int(label), image.tobytes())
        for part in (parts.train, parts.val, parts.test)
        for image, label in zip(part.x, part.y, strict=True)
    }
    assert found == expected
    # Of each image, row by row: the first test image is the last part's first 784 bytes.
    pixels = unpack(folder / "small" / "t10k-images-idx3-ubyte.gz", ">IIII")[1]
    assert parts.test.x[0, 0, 2, 3] == pixels[2 * 28 + 3]


def test_a_stratified_twelfth_of_the_training_files_is_validation_data(tmp_path):
    made_up = synthetic_of(FASHION)
    write_synthetic(made_up, tmp_path)
    parts = read_idx(made_up, 5, tmp_path)
    assert [len(part.y) for part in (parts.train, parts.val, parts.test)] == [1100, 100, 256]
    known = np.bincount(np.concatenate([parts.train.y, parts.val.y]))
    assert np.abs(np.bincount(parts.val.y) - known / 12).max() <= 2
    assert MNIST.counts == FASHION.counts == {"train": 12 * 5_000, "t10k": 10_000}


def test_augmentations_take_the_images(tmp_path):
    images = load_split("mnist", 0, folder=tmp_path, synthetic=True).train.x[:8]
    for name in AUGMENTATIONS:
        changed = augmentation(name, (1, 28, 28))(images, generator(0))
        assert changed.shape == images.shape
        assert torch.equal(changed, images) == (name == "none")


# The download.


def test_files_are_downloaded_from_the_first_mirror_that_has_them(mirror, tmp_path, capfd):
    folder, files = mirror
    closed = f"http://127.0.0.1:{closed_port()}"
    with serving(folder) as address:
        fetch_idx(at(files, closed, address), tmp_path / "data")
    assert {path.name: digest(path) for path in (tmp_path / "data" / "small").iterdir()} == files.sha256
    fetch_idx(at(files, closed), tmp_path / "data")  # all is there: no download
    assert capfd.readouterr() == ("", "")


def test_no_network_says_what_to_do_and_leaves_nothing(tmp_path):
    addresses = [f"http://127.0.0.1:{closed_port()}" for _ in range(2)]
    with pytest.raises(BadInput) as error:
        fetch_idx(at(MNIST, *addresses), tmp_path)
    message = str(error.value)
    assert all(f"{address}/mnist/{IMAGES} (" in message for address in addresses)
    assert f"run `make data` on a machine with internet, or put {IMAGES} into {tmp_path}/mnist" in message
    assert "\n" not in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_damaged_file_is_named_with_both_checksums(mirror):
    folder, files = mirror
    path = folder / "small" / IMAGES
    path.write_bytes(path.read_bytes()[:-100])
    expected = files.sha256[IMAGES]
    with pytest.raises(BadInput, match=f"{digest(path)} instead of {expected}; delete it and run") as error:
        fetch_idx(files, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_missing_files_say_what_to_do(name, tmp_path):
    with pytest.raises(BadInput, match=rf"^{name}: .*{IMAGES} is missing; run `make data`.*put .*") as error:
        load_split(name, 0, folder=tmp_path)
    assert "\n" not in str(error.value)
    fetch(name, tmp_path, synthetic=True)
    with pytest.raises(BadInput, match="is missing"):
        load_split(name, 0, folder=tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "no gzip"])
def test_damaged_files_are_named(mirror, damage):
    folder, files = mirror
    path = folder / "small" / IMAGES
    whole = path.read_bytes()
    changed = whole[:2000] + bytes([whole[2000] ^ 255]) + whole[2001:]
    path.write_bytes(
        {"truncated": whole[:-100], "changed": changed, "empty": b"", "no gzip": b"<html>"}[damage]
    )
    with pytest.raises(
        BadInput, match=rf"{IMAGES} (cannot be read|is no IDX file).*; delete it and"
    ) as error:
        read_idx(files, 0, folder)
    assert "\n" not in str(error.value)


def test_files_of_another_shape_are_refused(mirror):
    folder, files = mirror
    path = folder / "small" / IMAGES
    path.write_bytes((folder / "small" / LABELS).read_bytes())
    with pytest.raises(BadInput, match=rf"{IMAGES} is no IDX file of 120×28×28 bytes"):
        read_idx(files, 0, folder)


def test_bytes_that_are_no_labels_are_refused(mirror):
    folder, files = mirror
    path = folder / "small" / LABELS
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[8 + 7] = 10
    path.write_bytes(gzip.compress(content))
    with pytest.raises(BadInput, match=rf"{LABELS} has the label 10, but labels end at 9"):
        read_idx(files, 0, folder)


# The published mean and standard deviation over the training files, and how often each label is there.
DIGITS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
REAL = [(MNIST, 0.1307, 0.3081, DIGITS), (FASHION, 0.2860, 0.3530, [6000] * 10)]


@pytest.mark.parametrize(("files", "mean", "sd", "counts"), REAL, ids=["mnist", "fashion_mnist"])
def test_the_real_files_have_the_published_statistics(files, mean, sd, counts):
    if not all((default_folder() / files.directory / file).exists() for file in files.shapes):
        pytest.skip(f"{files.name} is not in the folder of data sets, {default_folder()}")
    parts = read_idx(files, 0, default_folder())
    assert [len(part.y) for part in (parts.train, parts.val, parts.test)] == [55_000, 5_000, 10_000]
    assert np.bincount(np.concatenate([parts.train.y, parts.val.y])).tolist() == counts
    pixels = np.concatenate([parts.train.x, parts.val.x])
    assert abs(pixels.mean() / 255 - mean) < 1e-4
    assert abs(pixels.std() / 255 - sd) < 1e-4
