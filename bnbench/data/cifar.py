"""CIFAR-10 and CIFAR-100: 60,000 colour images of 32×32 pixels (Krizhevsky, 2009), in their binary form."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bnbench.data.base import Parts, Samples, dataset
from bnbench.data.cache import whole_file
from bnbench.data.download import obtain
from bnbench.data.patterns import draw_images
from bnbench.data.randomness import generator
from bnbench.data.splits import hold_out
from bnbench.registry import BadInput

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """A CIFAR archive. A record is `label_bytes` labels, the last of which counts, and 3×32×32 pixels.

    Each training file has `records` of them.
    """

    name: str
    url: str
    sha256: str
    directory: str
    train_files: tuple[str, ...]
    test_file: str
    records: int
    test_records: int
    num_classes: int
    label_bytes: int

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train_files, self.test_file)

    def records_of(self, file: str) -> int:
        return self.test_records if file == self.test_file else self.records

    @property
    def record_bytes(self) -> int:
        return self.label_bytes + PIXELS


CIFAR10 = Archive(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    # The MD5 that its page gives is c32a1d4ab5d03f1284b67883e8d87530.
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    directory="cifar-10-batches-bin",
    train_files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test_file="test_batch.bin",
    records=10_000,
    test_records=10_000,
    num_classes=10,
    label_bytes=1,
)
CIFAR100 = Archive(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    # From the checksums of TensorFlow Datasets; its page gives the MD5 03b5dce01913d631647c71ecec9e9cb8.
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    directory="cifar-100-binary",
    train_files=("train.bin",),
    test_file="test.bin",
    records=50_000,
    test_records=10_000,
    num_classes=100,
    label_bytes=2,  # of 20 superclasses, then of 100 classes
)
SYNTHETIC10 = replace(CIFAR10, directory="cifar10-synthetic", records=256, test_records=256)
# Enough that every class is in every part.
SYNTHETIC100 = replace(CIFAR100, directory="cifar100-synthetic", records=2_560, test_records=1_024)


def fetch_cifar10(folder: Path, *, synthetic: bool = False) -> None:
    """Download and unpack CIFAR-10 (162 MB), or write the synthetic files."""
    if synthetic:
        write_synthetic(SYNTHETIC10, folder)
    else:
        fetch_archive(CIFAR10, folder)


@dataset("cifar10", in_shape=(3, 32, 32), num_classes=10, fetch=fetch_cifar10, offline={"synthetic": True})
def read_cifar10(data_seed: int, folder: Path, *, synthetic: bool = False) -> Parts:
    """Read 45,000 training, 5,000 validation and 10,000 test images.

    Validation images are a stratified choice from the training files, another one for each data_seed.
    `synthetic` reads 1,152, 128 and 256 made-up images of ten classes from files of the same format, which
    it writes where they are missing: for trying things out without the download. Raises BadInput where a
    file is missing, truncated, or holds what is no label.
    """
    archive = SYNTHETIC10 if synthetic else CIFAR10
    if synthetic:
        write_synthetic(archive, folder)
    return read_archive(archive, data_seed, folder)


def fetch_cifar100(folder: Path, *, synthetic: bool = False) -> None:
    """Download and unpack CIFAR-100 (161 MB), or write the synthetic files."""
    if synthetic:
        write_synthetic(SYNTHETIC100, folder)
    else:
        fetch_archive(CIFAR100, folder)


@dataset("cifar100", in_shape=(3, 32, 32), num_classes=100, fetch=fetch_cifar100, offline={"synthetic": True})
def read_cifar100(data_seed: int, folder: Path, *, synthetic: bool = False) -> Parts:
    """Read 45,000 training, 5,000 validation and 10,000 test images with their labels of 100 classes.

    All else is as in CIFAR-10; `synthetic` reads 2,304, 256 and 1,024 made-up images of 100 classes.
    """
    archive = SYNTHETIC100 if synthetic else CIFAR100
    if synthetic:
        write_synthetic(archive, folder)
    return read_archive(archive, data_seed, folder)


def read_archive(archive: Archive, data_seed: int, folder: Path) -> Parts:
    """Read an unpacked archive; a tenth of its training files is validation data."""
    files = [_read_file(archive, folder, file) for file in archive.train_files]
    known = Samples(np.concatenate([file.x for file in files]), np.concatenate([file.y for file in files]))
    draw = generator(data_seed, archive.name, "split")
    train, val = hold_out(torch.from_numpy(known.y), len(known.y) // 10, draw)
    return Parts(known.take(train), known.take(val), _read_file(archive, folder, archive.test_file))


def fetch_archive(archive: Archive, folder: Path) -> None:
    """Download, check and unpack an archive, as far as its files are not there yet.

    An archive that someone put into the folder is used. Raises BadInput where there is no network, and
    where a checksum differs; nothing incomplete stays behind.
    """
    if all(_fault(archive, folder, file) is None for file in archive.files):
        return
    with tarfile.open(obtain((archive.url,), archive.sha256, folder)) as tar:
        for file in archive.files:
            member = tar.extractfile(f"{archive.directory}/{file}")
            assert member is not None  # a regular file, the checksum says so
            with member, whole_file(folder / archive.directory / file) as out:
                shutil.copyfileobj(member, out)


def _fault(archive: Archive, folder: Path, file: str) -> str | None:
    """Say what is wrong with an unpacked file and what to do, or None."""
    path = folder / archive.directory / file
    if not path.exists():
        return (
            f"{archive.name}: {path} is missing; run `make data` on a machine with internet, "
            f"or put {archive.file} into {folder} and run it"
        )
    size = path.stat().st_size
    expected = archive.records_of(file) * archive.record_bytes
    if size != expected:
        return f"{path} has {size} bytes instead of {expected}; run `make data` to unpack it again"
    return None


def _read_file(archive: Archive, folder: Path, file: str) -> Samples:
    if fault := _fault(archive, folder, file):
        raise BadInput(fault)
    path = folder / archive.directory / file
    records = np.fromfile(path, np.uint8).reshape(-1, archive.record_bytes)
    labels = records[:, archive.label_bytes - 1].astype(np.int64)
    if labels.max() >= archive.num_classes:
        raise BadInput(
            f"{path} has the label {labels.max()}, but labels end at {archive.num_classes - 1}; "
            "delete it and run `make data` to unpack it again"
        )
    return Samples(records[:, archive.label_bytes :].reshape(-1, 3, 32, 32), labels)


def write_synthetic(archive: Archive, folder: Path) -> None:
    """Write made-up files of this archive's format where they are missing; the same bytes on each call."""
    for file in archive.files:
        if _fault(archive, folder, file) is None:
            continue
        count = archive.records_of(file)
        pixels, labels = draw_images(archive.directory, file, count, archive.num_classes, channels=3, side=32)
        columns = labels.to(torch.uint8).view(-1, 1).expand(-1, archive.label_bytes)
        with whole_file(folder / archive.directory / file) as out:
            out.write(torch.cat([columns, pixels.flatten(1)], dim=1).numpy().tobytes())
