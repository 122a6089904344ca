"""Your own images: a folder with `train/<class>/` and, where you have them, `val/` and `test/` like it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnbench.data.base import Parts, Samples, dataset
from bnbench.data.cache import Arrays, cached_arrays
from bnbench.data.randomness import generator
from bnbench.data.splits import stratified_order
from bnbench.registry import BadInput, nearest

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpeg", ".jpg", ".png")
SHARE = 0.15  # of the images in train/, for each part that has no folder of its own
GRAY = ("1", "L", "LA")
_CACHE_VERSION = 1  # raise when the decoded pixels change
_BLOCK = 256  # images that a thread decodes at a time

Listing = list[tuple[Path, int]]  # images with their labels


def shape_of_folder(*, path: str, size: int | None = None) -> tuple[tuple[int, ...], int]:
    """Return (in_shape, num_classes) from the first training image and the names in train/."""
    classes = _classes(_root(path))
    first = _images(_root(path) / "train", classes)[0][0]
    return _decode(first, size).shape, len(classes)


@dataset("image_folder", shape=shape_of_folder)
def read_image_folder(data_seed: int, folder: Path, *, path: str, size: int | None = None) -> Parts:
    """Read the PNG and JPEG images of a folder; the names in train/, sorted, are the classes.

    A part without a folder takes 15% of train/, stratified, another choice for each data_seed: 70/15/15
    where there is only train/. The first training image decides on gray or RGB and on height × width;
    gray images among RGB ones become RGB. `size` scales each image and cuts its middle to size × size.
    Decoded pixels are kept in the data folder, under a hash of all names, sizes and times of change.
    Raises BadInput for an image that cannot be read or has another shape, naming the first such file.
    """
    root = _root(path)
    classes = _classes(root)
    listings = {"train": _images(root / "train", classes)}
    for part in ("val", "test"):
        if (root / part).is_dir():
            listings[part] = _images(root / part, classes)
    name = f"image-folder-{_key(root, listings, size)}.npz"
    arrays = cached_arrays(folder / name, lambda: _decode_all(listings, size))
    parts = {}
    for part in listings:
        samples = Samples(arrays[f"{part}_x"], arrays[f"{part}_y"])
        # Files come class by class, and what takes the first samples of a part must meet all classes.
        order = stratified_order(torch.from_numpy(samples.y), generator(data_seed, "image_folder", part))
        parts[part] = samples.take(order)

    known = parts["train"]
    missing = [part for part in ("val", "test") if part not in parts]
    count = round(SHARE * len(known.y))
    if missing and count < 1:
        raise BadInput(f"{root / 'train'} has {len(known.y)} images, too few to take {missing[0]} from them")
    order = stratified_order(torch.from_numpy(known.y), generator(data_seed, "image_folder", "split"))
    for number, part in enumerate(missing):
        parts[part] = known.take(order[number * count : (number + 1) * count])
    if missing:
        parts["train"] = known.take(order[len(missing) * count :])
    return Parts(parts["train"], parts["val"], parts["test"])


def _root(path: str) -> Path:
    root = Path(path).expanduser()
    if not (root / "train").is_dir():
        raise BadInput(f"{root} has no folder train/; images belong into {root / 'train' / '<class>'}")
    return root


def _classes(root: Path) -> list[str]:
    names = _class_names(root / "train")
    if len(names) < 2:
        raise BadInput(f"{root / 'train'} has {len(names)} class folders; at least 2 are needed")
    return names


def _class_names(part: Path) -> list[str]:
    return sorted(p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(part: Path, classes: list[str]) -> Listing:
    """List the images of a part, sorted by class and name."""
    labels = {name: label for label, name in enumerate(classes)}
    listing: Listing = []
    for name in _class_names(part):
        directory = part / name
        if name not in labels:
            raise BadInput(f"{directory} is no class of train/{nearest(name, classes)}")
        files = sorted(file.name for file in directory.iterdir() if file.suffix.lower() in SUFFIXES)
        images = [directory / file for file in files if not file.startswith(".")]
        if not images:
            raise BadInput(f"{directory} has no images ({', '.join(SUFFIXES)})")
        listing += [(image, labels[name]) for image in images]
    if not listing:
        raise BadInput(f"{part} has no class folders; remove it or fill it like train/")
    return listing


def _key(root: Path, listings: dict[str, Listing], size: int | None) -> str:
    digest = hashlib.sha256(f"{_CACHE_VERSION} {size}\n".encode())
    for listing in listings.values():
        for file, _ in listing:
            status = file.stat()
            line = f"{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(os.fsencode(line))
    return digest.hexdigest()[:32]


def _decode_all(listings: dict[str, Listing], size: int | None) -> Arrays:
    first = listings["train"][0][0]
    shape = _decode(first, size).shape
    arrays: Arrays = {}
    for part, listing in listings.items():
        x = np.empty((len(listing), *shape), np.uint8)

        def fill(start: int, x: NDArray[Any] = x, listing: Listing = listing) -> None:
            for number, (file, _) in enumerate(listing[start : start + _BLOCK], start):
                x[number] = _fitting(_decode(file, size), file, shape, first)

        # Pillow decodes without the interpreter lock. map raises the first error in the order of files.
        with ThreadPoolExecutor() as threads:
            for _ in threads.map(fill, range(0, len(listing), _BLOCK)):
                pass
        arrays[f"{part}_x"] = x
        arrays[f"{part}_y"] = np.array([label for _, label in listing], np.int64)
    return arrays


def _fitting(pixels: NDArray[Any], file: Path, shape: tuple[int, ...], first: Path) -> NDArray[Any]:
    """Return the pixels, gray ones repeated for RGB. Raises BadInput where the shape is another."""
    channels, height, width = pixels.shape
    if (height, width) != shape[1:]:
        raise BadInput(
            f"{file} has {height}×{width} pixels, but {first} has {shape[1]}×{shape[2]}; "
            f"bring all to one size by the option size={min(shape[1:])}"
        )
    if channels > shape[0]:
        raise BadInput(f"{file} is in colour, but {first} is gray; convert one of them")
    return np.broadcast_to(pixels, shape)


def _decode(file: Path, size: int | None) -> NDArray[np.uint8]:
    """Return the pixels (C × H × W), C = 1 for gray and 3 for colour."""
    from PIL import Image, ImageOps

    if size is not None and size < 1:
        raise BadInput(f"size is {size}; use 1 or more pixels")
    try:
        with Image.open(file) as image:
            pixels: Image.Image = image.convert(_mode(image, file))
    except BadInput:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise BadInput(
            f"{file} cannot be read as an image ({type(error).__name__}); replace or remove it"
        ) from error
    if size is not None:
        pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BICUBIC)
    array = np.asarray(pixels)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _mode(image: Image.Image, file: Path) -> str:
    if image.mode.startswith(("I", "F")):
        raise BadInput(f"{file} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    return "L" if image.mode in GRAY else "RGB"
