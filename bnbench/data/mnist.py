"""MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et al., 2017): 70,000 gray images of 28×28 pixels."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnbench.data.base import Parts, Samples, Shape, dataset
from bnbench.data.cache import whole_file
from bnbench.data.download import obtain
from bnbench.data.patterns import draw_images
from bnbench.data.randomness import generator
from bnbench.data.splits import hold_out
from bnbench.registry import BadInput

SIDE, CLASSES = 28, 10


@dataclass(frozen=True)
class IdxFiles:
    """The four files of such a data set: by part ("train", "t10k"), images and labels.

    `mirrors` are folders by https, tried in order. An IDX file is two zero bytes, the type (8: uint8), the
    number of dimensions, each dimension in four bytes (big-endian), and the numbers; here in gzip.
    """

    name: str
    directory: str
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]
    counts: Mapping[str, int]

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of what each file holds."""
        shapes: dict[str, Shape] = {}
        for part, count in self.counts.items():
            shapes |= {_images(part): (count, SIDE, SIDE), _labels(part): (count,)}
        return shapes


def _images(part: str) -> str:
    return f"{part}-images-idx3-ubyte.gz"


def _labels(part: str) -> str:
    return f"{part}-labels-idx1-ubyte.gz"


# The checksums are those of TensorFlow Datasets.
MNIST = IdxFiles(
    name="mnist",
    directory="mnist",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    ),
    sha256={
        _images("train"): "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        _labels("train"): "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        _images("t10k"): "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        _labels("t10k"): "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    counts={"train": 60_000, "t10k": 10_000},
)
FASHION = IdxFiles(
    name="fashion_mnist",
    directory="fashion_mnist",
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
    ),
    sha256={
        _images("train"): "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        _labels("train"): "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        _images("t10k"): "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        _labels("t10k"): "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    counts={"train": 60_000, "t10k": 10_000},
)


def _register(files: IdxFiles) -> None:
    made_up = synthetic_of(files)

    def fetch(folder: Path, *, synthetic: bool = False) -> None:
        if synthetic:
            write_synthetic(made_up, folder)
        else:
            fetch_idx(files, folder)

    def read(data_seed: int, folder: Path, *, synthetic: bool = False) -> Parts:
        if synthetic:
            write_synthetic(made_up, folder)
        return read_idx(made_up if synthetic else files, data_seed, folder)

    register = dataset(
        files.name, in_shape=(1, SIDE, SIDE), num_classes=CLASSES, fetch=fetch, offline={"synthetic": True}
    )
    register(read)


def synthetic_of(files: IdxFiles) -> IdxFiles:
    """Return what the option `synthetic` stands for: made-up images, 1,200 for training and 256 for test."""
    return replace(files, directory=f"{files.directory}-synthetic", counts={"train": 1_200, "t10k": 256})


_register(MNIST)
_register(FASHION)


def read_idx(files: IdxFiles, data_seed: int, folder: Path) -> Parts:
    """Read 55,000 training, 5,000 validation and 10,000 test images, of made-up ones 1,100, 100 and 256.

    Validation images are a stratified choice from the training files, a twelfth of them, another one for
    each data_seed. Raises BadInput where a file is missing or damaged, or holds what is no label.
    """
    known, test = (_read_part(files, part, folder) for part in ("train", "t10k"))
    draw = generator(data_seed, files.name, "split")
    train, val = hold_out(torch.from_numpy(known.y), len(known.y) // 12, draw)
    return Parts(known.take(train), known.take(val), test)


def fetch_idx(files: IdxFiles, folder: Path) -> None:
    """Download and check the files that are not there yet.

    Files that someone put into the folder are used. Raises BadInput where no mirror delivers one, and
    where a checksum differs; nothing incomplete stays behind.
    """
    for file in files.shapes:
        urls = [f"{mirror}/{file}" for mirror in files.mirrors]
        obtain(urls, files.sha256[file], folder / files.directory)


def _read_part(files: IdxFiles, part: str, folder: Path) -> Samples:
    images = _read_file(files, _images(part), folder)
    labels = _read_file(files, _labels(part), folder)
    if labels.max() >= CLASSES:
        raise BadInput(
            f"{folder / files.directory / _labels(part)} has the label {labels.max()}, "
            f"but labels end at {CLASSES - 1}; delete it and run `make data` again"
        )
    return Samples(images[:, None], labels.astype(np.int64))


def _read_file(files: IdxFiles, file: str, folder: Path) -> NDArray[Any]:
    path, shape = folder / files.directory / file, files.shapes[file]
    if not path.exists():
        raise BadInput(
            f"{files.name}: {path} is missing; run `make data` on a machine with internet, "
            f"or put {file} into {path.parent}"
        )
    again = "delete it and run `make data` again"
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read ({error}); {again}") from error
    header = _header(shape)
    if not content.startswith(header) or len(content) != len(header) + math.prod(shape):
        raise BadInput(f"{path} is no IDX file of {'×'.join(map(str, shape))} bytes; {again}")
    # A copy, since what lies on bytes cannot be written to, and torch warns of that.
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape).copy()


def _header(shape: Shape) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)


def write_synthetic(files: IdxFiles, folder: Path) -> None:
    """Write made-up files of the same format where they are missing; the same bytes on each call."""
    for part, count in files.counts.items():
        paths = [folder / files.directory / file for file in (_images(part), _labels(part))]
        if all(path.exists() for path in paths):
            continue
        images, labels = draw_images(files.directory, part, count, CLASSES, channels=1, side=SIDE)
        for path, numbers in zip(paths, (images[:, 0], labels.to(torch.uint8)), strict=True):
            with whole_file(path) as out:
                content = _header(tuple(numbers.shape)) + numbers.numpy().tobytes()
                out.write(gzip.compress(content, compresslevel=1, mtime=0))
