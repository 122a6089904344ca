"""CIFAR-10: 60,000 colour images of 32×32 pixels (Krizhevsky, 2009), read from its binary files."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bnbench.data.base import Parts, Samples, dataset
from bnbench.data.cache import whole_file
from bnbench.data.randomness import generator
from bnbench.data.splits import stratified_order
from bnbench.registry import BadInput

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """A CIFAR archive. A record is `label_bytes` labels, the last of which counts, and 3×32×32 pixels."""

    name: str
    url: str
    sha256: str
    directory: str
    train_files: tuple[str, ...]
    test_file: str
    records: int
    num_classes: int
    label_bytes: int

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train_files, self.test_file)

    @property
    def record_bytes(self) -> int:
        return self.label_bytes + PIXELS

    @property
    def file_bytes(self) -> int:
        return self.records * self.record_bytes


CIFAR10 = Archive(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    # The MD5 that its page gives is c32a1d4ab5d03f1284b67883e8d87530.
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    directory="cifar-10-batches-bin",
    train_files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test_file="test_batch.bin",
    records=10_000,
    num_classes=10,
    label_bytes=1,
)
SYNTHETIC10 = replace(CIFAR10, directory="cifar10-synthetic", records=256)


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


def read_archive(archive: Archive, data_seed: int, folder: Path) -> Parts:
    """Read an unpacked archive; a tenth of its training files is validation data."""
    files = [_read_file(archive, folder, file) for file in archive.train_files]
    known = Samples(np.concatenate([file.x for file in files]), np.concatenate([file.y for file in files]))
    order = stratified_order(torch.from_numpy(known.y), generator(data_seed, archive.name, "split"))
    num_val = len(order) // 10
    # In the order of the files, so that memory is read in one direction.
    train, val = order[num_val:].sort().values, order[:num_val].sort().values
    return Parts(known.take(train), known.take(val), _read_file(archive, folder, archive.test_file))


def fetch_archive(archive: Archive, folder: Path) -> None:
    """Download, check and unpack an archive, as far as its files are not there yet.

    An archive that someone put into the folder is used. Raises BadInput where there is no network, and
    where a checksum differs; nothing incomplete stays behind.
    """
    if all(_fault(archive, folder, file) is None for file in archive.files):
        return
    packed = folder / archive.file
    if packed.exists():
        found = _sha256(packed)
        if found != archive.sha256:
            raise BadInput(
                f"{packed} has the SHA-256 {found} instead of {archive.sha256}; "
                "delete it and run `make data` again"
            )
    else:
        _download(archive, folder)
    with tarfile.open(packed) as tar:
        for file in archive.files:
            member = tar.extractfile(f"{archive.directory}/{file}")
            assert member is not None  # a regular file, the checksum says so
            with member, whole_file(folder / archive.directory / file) as out:
                shutil.copyfileobj(member, out)


def _download(archive: Archive, folder: Path) -> None:
    import pooch

    try:
        with _quiet(pooch.get_logger()):
            pooch.retrieve(
                archive.url,
                known_hash=f"sha256:{archive.sha256}",
                fname=archive.file,
                path=folder,
                progressbar=sys.stderr.isatty(),
            )
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BadInput(
            f"cannot download {archive.url} ({reason}); run `make data` on a machine with internet, "
            f"or put {archive.file} into {folder} and run it again"
        ) from error
    except ValueError as error:  # pooch names the expected and the found checksum
        raise BadInput(f"{archive.url}: {' '.join(str(error).split())}") from error


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(archive: Archive, folder: Path, file: str) -> str | None:
    """Say what is wrong with an unpacked file and what to do, or None."""
    path = folder / archive.directory / file
    if not path.exists():
        return (
            f"{archive.name}: {path} is missing; run `make data` on a machine with internet, "
            f"or put {archive.file} into {folder} and run it"
        )
    size = path.stat().st_size
    if size != archive.file_bytes:
        return f"{path} has {size} bytes instead of {archive.file_bytes}; run `make data` to unpack it again"
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
    """Write files of this archive's format: a smooth pattern for each class, in noise of the same strength.

    Pixel = 128 + 32 (pattern + noise), clipped to 0 … 255, patterns and noise standard normal, the pattern
    constant over 8×8 pixels. The same bytes on each call.
    """
    draw = generator(archive.directory, "patterns")
    patterns = torch.randn(archive.num_classes, 3, 4, 4, generator=draw)
    smooth = patterns.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    for file in archive.files:
        if _fault(archive, folder, file) is None:
            continue
        draw = generator(archive.directory, file)
        labels = torch.randint(archive.num_classes, (archive.records,), generator=draw)
        noise = torch.randn(archive.records, 3, 32, 32, generator=draw)
        pixels = (128 + 32 * (smooth[labels] + noise)).clamp(0, 255).to(torch.uint8).flatten(1)
        columns = labels.to(torch.uint8).view(-1, 1).expand(-1, archive.label_bytes)
        with whole_file(folder / archive.directory / file) as out:
            out.write(torch.cat([columns, pixels], dim=1).numpy().tobytes())
