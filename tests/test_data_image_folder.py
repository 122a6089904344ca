"""A folder of images: what is read, what is kept, and which file is to blame."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnbench.data import DATASETS, load_split, load_test, shape_of
from bnbench.registry import BadInput

CLASSES = ("猫", "dog", "fish")


def write(path: Path, shape=(8, 6, 3), seed: int = 0) -> np.ndarray:
    """Write an image (H × W × C, or H × W for gray) of random pixels, return the pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def root(tmp_path):
    """20 images in each of three classes, in train/ only."""
    root = tmp_path / "images"
    for label, name in enumerate(CLASSES):
        for number in range(20):
            write(root / "train" / name / f"{number:02}.png", seed=100 * label + number)
    return root


def read(root: Path, **options):
    return DATASETS["image_folder"].read(0, root.parent / "data", path=str(root), **options)


def test_pixels_and_labels_are_those_of_the_files(root):
    shown = {}
    for label, name in enumerate(sorted(CLASSES)):
        for number in range(4):
            pixels = write(root / "test" / name / f"{number}é.PNG", seed=1000 + 10 * label + number)
            shown[pixels.transpose(2, 0, 1).tobytes()] = label
    test = read(root).test
    assert {image.tobytes(): int(label) for image, label in zip(test.x, test.y, strict=True)} == shown
    assert shape_of("image_folder", path=str(root)) == ((3, 8, 6), 3)


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [((), (42, 9, 9)), (("test",), (51, 9, 6)), (("val",), (51, 6, 9)), (("val", "test"), (60, 6, 6))],
)
def test_parts_without_a_folder_take_15_percent_of_train(root, folders, sizes):
    for part in folders:
        for name in CLASSES:
            for number in range(2):
                write(root / part / name / f"{number}.png")
    parts = read(root)
    assert tuple(len(part.y) for part in (parts.train, parts.val, parts.test)) == sizes
    assert all(set(part.y) == {0, 1, 2} for part in (parts.train, parts.val, parts.test))


@pytest.mark.parametrize("folders", [(), ("val", "test")])
def test_the_first_samples_of_every_part_meet_all_classes(root, folders):
    for part in folders:
        for name in CLASSES:
            for number in range(4):
                write(root / part / name / f"{number}.png")
    parts = read(root)
    # Whatever takes the first samples (statistics, curves) must not see one class alone.
    for part in (parts.train, parts.val, parts.test):
        assert set(part.y[:6]) == {0, 1, 2}


def test_gray_images_have_one_channel(tmp_path):
    root = tmp_path / "images"
    for name in "ab":
        for number in range(10):
            write(root / "train" / name / f"{number}.png", shape=(5, 4), seed=number)
    assert shape_of("image_folder", path=str(root)) == ((1, 5, 4), 2)
    assert read(root).train.x.shape == (14, 1, 5, 4)
    write(root / "train" / "b" / "9.png", shape=(5, 4, 3))
    with pytest.raises(BadInput, match=r"b/9\.png is in colour, but .*a/0\.png is gray"):
        read(root)


def test_a_gray_image_among_coloured_ones_becomes_rgb(root):
    for name in CLASSES:
        pixels = write(root / "test" / name / "x.png", shape=(8, 6))
    assert np.array_equal(read(root).test.x[0], np.stack([pixels] * 3))


def test_an_image_of_another_size_is_named_with_the_remedy(root):
    write(root / "train" / "fish" / "07.png", shape=(9, 6, 3))
    write(root / "train" / "fish" / "09.png", shape=(9, 9, 3))
    with pytest.raises(BadInput, match=r"fish/07\.png has 9×6 pixels, but .*dog/00\.png has 8×6.*size=6"):
        read(root)
    assert read(root, size=6).train.x.shape == (42, 3, 6, 6)
    assert shape_of("image_folder", path=str(root), size=6) == ((3, 6, 6), 3)


def test_size_cuts_the_middle(tmp_path):
    root = tmp_path / "images"
    stripes = np.zeros((4, 12, 3), np.uint8)
    stripes[:, 4:8] = 200
    for name in "ab":
        for number in range(10):
            write(root / "train" / name / f"{number}.png")
            Image.fromarray(stripes).save(root / "train" / name / f"{number}.png")
    assert (read(root, size=4).train.x == 200).all()


def test_an_image_that_cannot_be_read_is_named(root):
    path = root / "train" / "猫" / "03.png"
    content = path.read_bytes()
    for damaged in (b"", b"no image", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"猫/03\.png cannot be read as an image") as error:
            read(root)
        assert "\n" not in str(error.value)
    assert not list((root.parent / "data").glob("*"))


def test_images_of_16_bits_are_refused(root):
    pixels = np.zeros((8, 6), np.uint16)
    Image.fromarray(pixels).save(root / "train" / "dog" / "00.png")
    with pytest.raises(BadInput, match=r"dog/00\.png has more than 8 bits"):
        read(root)


def test_a_second_load_decodes_nothing_and_a_change_is_seen(root, monkeypatch):
    first = read(root)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        assert np.array_equal(read(root).train.x, first.train.x)
    changed = write(root / "train" / "dog" / "05.png", seed=999)
    os.utime(root / "train" / "dog" / "05.png", ns=(0, 0))
    parts = read(root)
    images = np.concatenate([parts.train.x, parts.val.x, parts.test.x])
    assert changed.transpose(2, 0, 1).tobytes() in {image.tobytes() for image in images}


def test_wrong_folders_are_explained(root, tmp_path):
    def fails(match: str, path: Path = root, **options) -> None:
        with pytest.raises(BadInput, match=match):
            load_split("image_folder", 0, folder=tmp_path / "data", path=str(path), **options)

    fails(r"has no folder train/", path=tmp_path / "nowhere")
    fails("size is 0", size=0)
    (root / "test" / "dgo").mkdir(parents=True)
    fails("dgo is no class of train/; did you mean 'dog'")
    (root / "test" / "dgo").rmdir()
    fails("test has no class folders")
    (root / "test" / "dog").mkdir()
    fails(r"test/dog has no images \(.jpeg, .jpg, .png\)")
    single = tmp_path / "single"
    write(single / "train" / "only" / "0.png")
    fails("1 class folders; at least 2", path=single)
    write(single / "train" / "other" / "0.png")
    fails("2 images, too few to take val", path=single)


def test_hidden_and_other_files_are_passed_over(root):
    (root / "train" / "dog" / "notes.txt").write_text("none")
    (root / "train" / "dog" / "._00.png").write_text("none")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "labels.csv").write_text("none")
    assert sum(len(part.y) for part in (read(root).train, read(root).val, read(root).test)) == 60


JPEGS = os.environ.get("BNBENCH_CIFAR10_JPEG")


@pytest.mark.slow
@pytest.mark.skipif(not JPEGS, reason="BNBENCH_CIFAR10_JPEG names no folder of CIFAR-10 as JPEG files")
def test_cifar10_as_jpeg_files(tmp_path):
    split = load_split("image_folder", 0, folder=tmp_path, path=JPEGS)
    assert (split.in_shape, split.num_classes) == ((3, 32, 32), 10)
    assert (len(split.train), len(split.val)) == (42_500, 7_500)
    assert len(load_test("image_folder", 0, folder=tmp_path, path=JPEGS)) == 10_000
    (cache,) = tmp_path.glob("*.npz")
    with np.load(cache) as arrays:
        pixels = arrays["train_x"] / np.float32(255)
    # The mean and standard deviation that are in general use for CIFAR-10; JPEG changes little.
    assert np.allclose(pixels.mean((0, 2, 3), dtype=float), (0.4914, 0.4822, 0.4465), atol=0.002)
    assert np.allclose(pixels.std((0, 2, 3), dtype=float), (0.2470, 0.2435, 0.2616), atol=0.003)
