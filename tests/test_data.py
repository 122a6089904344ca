"""Data sets: one contract over all of them, then what each one promises."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bnbench.data import (
    DATASETS,
    Parts,
    dataset,
    default_folder,
    fetch,
    generator,
    load_split,
    load_test,
    shape_of,
)
from bnbench.data.splits import add_label_noise, hold_out, stratified_order
from bnbench.registry import BadInput


def write_images(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dög", "fish"):
        (root / "train" / name).mkdir(parents=True)
        for number in range(24):
            pixels = rng.integers(0, 256, (6, 5, 3), np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module", params=sorted(DATASETS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def options(name, images):
    return {"path": str(images)} if name == "image_folder" else dict(DATASETS[name].offline)


@pytest.fixture(scope="module")
def parts(name, options, folder) -> Parts:
    fetch(name, folder, **options)
    return DATASETS[name].read(0, folder, **options)


def rows(samples) -> list[bytes]:
    return [row.tobytes() for row in samples.x]


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


# The contract.


def test_arrays_have_the_promised_shapes_and_types(name, options, folder, parts):
    split = load_split(name, 0, folder=folder, **options)
    test = load_test(name, 0, folder=folder, **options)
    assert (split.in_shape, split.num_classes) == shape_of(name, **options)
    assert split.name == name
    for arrays, samples in ((split.train, parts.train), (split.val, parts.val), (test, parts.test)):
        assert arrays.x.shape == (len(samples.y), *split.in_shape)
        assert arrays.x.dtype == torch.float32
        assert arrays.y.shape == (len(arrays),)
        assert arrays.y.dtype == torch.int64
        assert arrays.y.unique().tolist() == list(range(split.num_classes))


def test_no_sample_is_in_two_parts(parts):
    every = [*rows(parts.train), *rows(parts.val), *rows(parts.test)]
    assert len(set(every)) == len(every)


def test_training_data_have_mean_0_and_standard_deviation_1(name, options, folder, parts):
    split = load_split(name, 0, folder=folder, **options)
    axes = [0, *range(2, split.train.x.ndim)]
    channels = split.train.x.double()
    assert channels.mean(axes).abs().max() < 1e-6
    assert (channels.std(axes, correction=0) - 1).abs().max() < 1e-6


def test_validation_and_test_data_are_normalized_by_the_training_statistics(name, options, folder, parts):
    raw = {part: torch.from_numpy(getattr(parts, part).x).double() for part in ("train", "val", "test")}
    axes = [0, *range(2, raw["train"].ndim)]
    sd, mean = torch.std_mean(raw["train"], axes, correction=0, keepdim=True)
    split = load_split(name, 0, folder=folder, n_train=20, **options)
    test = load_test(name, 0, folder=folder, **options)
    torch.testing.assert_close(split.val.x, ((raw["val"] - mean) / sd).float())
    torch.testing.assert_close(test.x, ((raw["test"] - mean) / sd).float())


def test_data_seed_draws_new_data_or_a_new_split_of_the_same(name, options, folder, parts):
    other = DATASETS[name].read(1, folder, **options)
    assert not np.array_equal(other.val.x, parts.val.x)
    ours = {*rows(parts.train), *rows(parts.val), *rows(parts.test)}
    theirs = {*rows(other.train), *rows(other.val), *rows(other.test)}
    assert ours.isdisjoint(theirs) if DATASETS[name].fresh else ours == theirs


def test_label_noise_changes_the_exact_number_of_training_labels(name, options, folder):
    split = load_split(name, 0, folder=folder, n_train=21, label_noise=0.25, **options)
    assert len(split.train) == 21
    assert (split.train.y != split.train_clean_y).sum() == 5
    assert split.train.y.min() >= 0
    assert split.train.y.max() < split.num_classes


def test_noise_and_subset_leave_all_else_as_it_is(name, options, folder):
    plain = load_split(name, 0, folder=folder, **options)
    noisy = load_split(name, 0, folder=folder, label_noise=0.3, **options)
    small = load_split(name, 0, folder=folder, n_train=20, label_noise=0.3, **options)
    assert torch.equal(noisy.train.x, plain.train.x)
    assert torch.equal(noisy.train_clean_y, plain.train.y)
    for other in (noisy, small):
        assert torch.equal(other.val.x, plain.val.x)
        assert torch.equal(other.val.y, plain.val.y)


def test_a_smaller_subset_lies_within_a_larger_one(name, options, folder):
    large = load_split(name, 0, folder=folder, n_train=30, **options)
    small = load_split(name, 0, folder=folder, n_train=20, **options)
    assert torch.equal(large.train.x[:20], small.train.x)
    assert torch.equal(large.train.y[:20], small.train.y)


def test_impossible_requests_are_refused(name, options, folder, parts):
    size = len(parts.train.y)
    with pytest.raises(BadInput, match=f"n_train is {size + 1}, but {name} has {size}"):
        load_split(name, 0, folder=folder, n_train=size + 1, **options)
    with pytest.raises(BadInput, match="n_train is 0"):
        load_split(name, 0, folder=folder, n_train=0, **options)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(BadInput, match="label_noise"):
            load_split(name, 0, folder=folder, label_noise=fraction, **options)
    with pytest.raises(BadInput, match="has no option 'seize'"):
        load_test(name, 0, folder=folder, seize=3, **options)


FRESH_PROCESS = """
import hashlib, json, sys
from pathlib import Path
from bnbench.data import load_split, load_test
folder, requests = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, options in requests.items():
    split = load_split(name, 0, folder=folder, n_train=20, label_noise=0.2, **options)
    test = load_test(name, 0, folder=folder, **options)
    tensors = (split.train.x, split.train.y, split.val.x, split.val.y, test.x, test.y)
    print(name, hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest())
"""


@pytest.fixture(scope="module")
def digests_of_a_fresh_process(images, tmp_path_factory):
    requests = {name: dict(DATASETS[name].offline) for name in DATASETS}
    requests["image_folder"] = {"path": str(images)}
    arguments = [str(tmp_path_factory.mktemp("fresh")), json.dumps(requests)]
    command = [sys.executable, "-c", FRESH_PROCESS, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(line.split() for line in answer.stdout.splitlines())


def test_a_fresh_process_in_an_empty_folder_gets_the_same_bits(
    name, options, folder, digests_of_a_fresh_process
):
    split = load_split(name, 0, folder=folder, n_train=20, label_noise=0.2, **options)
    test = load_test(name, 0, folder=folder, **options)
    tensors = (split.train.x, split.train.y, split.val.x, split.val.y, test.x, test.y)
    assert digest(*tensors) == digests_of_a_fresh_process[name]


# Single data sets.


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mnist1d", (4000, 2000, 6000)),
        ("digits", (1077, 360, 360)),
        ("cifar10", (1152, 128, 256)),
        ("cifar100", (2304, 256, 1024)),
        ("mnist", (1100, 100, 256)),
        ("fashion_mnist", (1100, 100, 256)),
        ("synthetic", (4000, 2000, 6000)),
        ("gaussians", (4000, 2000, 6000)),
    ],
)
def test_splits_have_their_fixed_sizes(name, sizes, folder):
    parts = DATASETS[name].read(0, folder, **DATASETS[name].offline)
    assert tuple(len(part.y) for part in (parts.train, parts.val, parts.test)) == sizes


def test_mnist1d_is_what_its_library_makes(folder):
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples, args.train_split, args.seed = 12_000, 0.5, 0
    expected = make_dataset(args)
    parts = DATASETS["mnist1d"].read(0, folder)
    x = np.concatenate([parts.train.x, parts.val.x])[:, 0]
    assert np.array_equal(x, expected["x"].astype(np.float32))
    assert np.array_equal(np.concatenate([parts.train.y, parts.val.y]), expected["y"])
    assert np.array_equal(parts.test.x[:, 0], expected["x_test"].astype(np.float32))
    assert np.array_equal(parts.test.y, expected["y_test"])


def test_mnist1d_leaves_global_random_numbers_alone_and_repairs_its_cache(folder, tmp_path):
    whole = DATASETS["mnist1d"].read(0, folder)
    (cache,) = folder.glob("mnist1d-*-0.npz")
    (tmp_path / cache.name).write_bytes(cache.read_bytes()[:100_000])
    random.seed(5)
    np.random.seed(5)
    expected = (random.Random(5).random(), np.random.RandomState(5).rand())
    again = DATASETS["mnist1d"].read(0, tmp_path)
    assert (random.random(), np.random.rand()) == expected
    assert np.array_equal(again.train.x, whole.train.x)
    assert (tmp_path / cache.name).read_bytes() == cache.read_bytes()


def test_mnist1d_refuses_seeds_that_numpy_cannot_take(folder):
    for seed in (-1, 2**32):
        with pytest.raises(BadInput, match=f"data_seed is {seed}"):
            load_split("mnist1d", seed, folder=folder)


def test_digits_are_all_of_scikit_learn(folder):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    expected = sorted(
        (row.tobytes(), label) for row, label in zip(images.astype(np.uint8), labels, strict=True)
    )
    parts = DATASETS["digits"].read(3, folder)
    found = [
        (row.tobytes(), label)
        for part in (parts.train, parts.val, parts.test)
        for row, label in zip(part.x, part.y, strict=True)
    ]
    assert sorted(found) == expected


def test_digits_parts_are_stratified(folder):
    parts = DATASETS["digits"].read(3, folder)
    everything = np.bincount(np.concatenate([parts.train.y, parts.val.y, parts.test.y]))
    for part in (parts.val, parts.test):
        assert np.abs(np.bincount(part.y) - everything * 360 / 1797).max() <= 3


# Subsets and noise.

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=200).map(torch.tensor)


@settings(deadline=None)
@given(labels=LABELS, seed=st.integers(0, 1000))
def test_every_prefix_of_a_stratified_order_is_in_proportion(labels, seed):
    order = stratified_order(labels, generator(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    n, counts = len(labels), torch.bincount(labels)
    classes = int((counts > 0).sum())
    for prefix in range(1, n + 1):
        found = torch.bincount(labels[order[:prefix]], minlength=len(counts))
        assert ((found - prefix * counts / n).abs() <= 1 + classes * counts / n + 1e-6).all()


def test_stratified_order_puts_each_sample_anywhere():
    labels = torch.arange(20) % 2
    places = torch.stack([stratified_order(labels, generator(seed)).argsort() for seed in range(4000)])
    # Uniform on 20 places: mean 9.5, standard error 5.77 / sqrt(4000) = .09; half of the places below 10.
    assert (places.double().mean(0) - 9.5).abs().max() < 0.45
    assert ((places < 10).double().mean(0) - 0.5).abs().max() < 0.04


@settings(deadline=None)
@given(labels=LABELS, share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_what_is_held_out_is_the_first_of_a_stratified_order(labels, share, seed):
    count = round(share * len(labels))
    kept, held = hold_out(labels, count, generator(seed))
    assert held.tolist() == sorted(stratified_order(labels, generator(seed))[:count].tolist())
    assert kept.tolist() == sorted({*range(len(labels))} - {*held.tolist()})


@settings(deadline=None)
@given(
    labels=LABELS,
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 1000),
)
def test_noise_hits_the_rounded_number_and_never_the_true_class(labels, fraction, seed):
    noisy = add_label_noise(labels, fraction, 6, generator(seed))
    assert (noisy != labels).sum() == round(fraction * len(labels))
    assert ((noisy >= 0) & (noisy < 6)).all()


def test_wrong_labels_are_uniform_over_the_other_classes():
    noisy = add_label_noise(torch.full((60_000,), 2), 0.5, 6, generator(1))
    counts = torch.bincount(noisy, minlength=6)
    assert counts[2] == 30_000
    # 6,000 expected for each of the others, standard deviation 69.
    assert (counts[[0, 1, 3, 4, 5]] - 6000).abs().max() < 280


# The registry.


def test_unknown_names_are_explained(folder):
    with pytest.raises(BadInput, match="did you mean 'mnist1d'"):
        shape_of("mnist-1d")
    with pytest.raises(BadInput, match="needs the option 'path'"):
        load_split("image_folder", 0, folder=folder)
    with pytest.raises(BadInput, match="needs in_shape and num_classes"):
        dataset("shapeless")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("bnbench.data.digits.version", version)
    with pytest.raises(BadInput, match=r"needs the package scikit-learn; pip install 'bnbench\[study\]'"):
        load_split("digits", 0, folder=tmp_path)


def test_the_default_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BNBENCH_DATA", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("BNBENCH_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder().name == "bnbench"


def test_importing_the_package_is_light():
    heavy = ["PIL", "lightning", "matplotlib", "mnist1d", "pandas", "pooch", "sklearn"]
    code = f"import sys, bnbench.data; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
