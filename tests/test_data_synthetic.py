"""Data of known truth: the truth against independent computations, and networks that approach it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.nn import functional as F

from bnbench.data import DATASETS, load_split, load_test, shape_of
from bnbench.data.synthetic import Gaussians, Teacher, estimate_bayes
from bnbench.registry import BadInput

SMALL_TEACHER = {"num_features": 16, "teacher_width": 8}


def read(name: str, folder, seed: int = 0, **options):
    return DATASETS[name].read(seed, folder, **options)


def standard_error(accuracy: float, count: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / count)


def accuracy_of_training(network: torch.nn.Module, name: str, folder, steps: int, **options) -> float:
    """Train a network and return its test accuracy."""
    split, test = (load(name, 0, folder=folder, **options) for load in (load_split, load_test))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
    for batch in torch.randint(len(split.train), (steps, 128)):
        loss = F.cross_entropy(network(split.train.x[batch]), split.train.y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((network(test.x).argmax(1) == test.y).double().mean())


# Gaussian classes.


def test_two_gaussians_have_the_textbook_accuracy():
    for separation in (0.0, 0.5, 2.0, 5.0):
        expected = stats.norm.cdf(separation / math.sqrt(2))
        assert Gaussians(num_classes=2, separation=separation).bayes_accuracy == pytest.approx(
            expected, abs=1e-10
        )


@pytest.mark.parametrize("num_classes", [3, 10, 200])
def test_the_closed_form_agrees_with_another_quadrature(num_classes):
    gaussians = Gaussians(num_features=200, num_classes=num_classes, separation=1.7)

    def integrand(z: float) -> float:
        return float(stats.norm.pdf(z, loc=1.7) * stats.norm.cdf(z) ** (num_classes - 1))

    assert gaussians.bayes_accuracy == pytest.approx(integrate.quad(integrand, -8, 12)[0], abs=1e-8)


@pytest.mark.parametrize("separation", [0.0, 1.5, 3.0])
def test_the_best_rule_reaches_the_closed_form_on_the_samples(separation, tmp_path):
    options = {"num_features": 12, "num_classes": 4, "separation": separation}
    parts = read("gaussians", tmp_path, num_train=200_000, **options)
    # The rule that knows nothing of the code: to the nearest class mean, as the training samples show it.
    means = np.stack([parts.train.x[parts.train.y == label].mean(0, dtype=float) for label in range(4)])
    cross = means @ means.T
    # Each entry has a standard error of about (1 + 2 separation) / sqrt(50,000).
    assert np.abs(cross - separation**2 * np.eye(4)).max() < 0.0045 * 5 * (1 + 2 * separation)
    scores = parts.test.x @ means.T - 0.5 * np.diag(cross)
    expected = Gaussians(**options).bayes_accuracy
    found = (scores.argmax(1) == parts.test.y).mean()
    assert abs(found - expected) < 4 * standard_error(expected, 6000)
    # Around their means the samples are standard normal.
    residuals = parts.test.x - means[parts.test.y]
    assert stats.kstest(residuals.ravel(), "norm").pvalue > 1e-3


def test_monte_carlo_agrees_with_the_closed_form():
    for separation in (0.5, 3.0):
        gaussians = Gaussians(separation=separation)
        bayes = estimate_bayes(gaussians)
        assert abs(bayes.accuracy - gaussians.bayes_accuracy) < 4 / (2 * math.sqrt(100_000))
    # Without separation nothing is known of the label.
    assert estimate_bayes(Gaussians(separation=0.0)).loss == pytest.approx(math.log(10))


# The teacher.


def test_each_logit_has_mean_0_and_variance_1():
    torch.manual_seed(0)
    for options in ({}, SMALL_TEACHER, {"num_features": 3, "num_classes": 2, "teacher_width": 1}):
        teacher = Teacher(**options)
        x = torch.randn(400_000, teacher.num_features, dtype=torch.float64)
        logits = teacher.logits(x)
        # Standard error .0016 of a mean, at most about .004 of a variance.
        assert logits.mean(0).abs().max() < 0.008
        assert (logits.var(0) - 1).abs().max() < 0.03


def test_labels_are_drawn_from_the_posterior(tmp_path):
    parts = read("synthetic", tmp_path, num_train=100_000, **SMALL_TEACHER)
    posterior = Teacher(**SMALL_TEACHER).posterior(torch.from_numpy(parts.train.x).double()).numpy()
    logits = Teacher(**SMALL_TEACHER).logits(torch.from_numpy(parts.train.x).double()).numpy()
    exponential = np.exp(logits / 0.1 - (logits / 0.1).max(1, keepdims=True))
    assert np.allclose(posterior, exponential / exponential.sum(1, keepdims=True))
    # Calibration: among samples to which a class is given a chance of p, p of them have it.
    hits = np.eye(10)[parts.train.y]
    for low in np.arange(0, 1, 0.1):
        inside = (posterior >= low) & (posterior < low + 0.1)
        spread = np.sqrt((posterior * (1 - posterior))[inside].sum())
        assert abs(hits[inside].sum() - posterior[inside].sum()) < 4 * spread


def test_what_is_estimated_is_what_the_best_classifier_scores(tmp_path):
    parts = read("synthetic", tmp_path, num_train=100_000)
    posterior = Teacher().posterior(torch.from_numpy(parts.train.x).double()).numpy()
    bayes = estimate_bayes(Teacher())
    # Two independent samples of 100,000: of labels here, of inputs there.
    found = (posterior.argmax(1) == parts.train.y).mean()
    assert abs(found - bayes.accuracy) < 5 * standard_error(found, 100_000)
    losses = -np.log(posterior[np.arange(100_000), parts.train.y])
    assert abs(losses.mean() - bayes.loss) < 5 * losses.std() / math.sqrt(100_000)


def test_without_noise_the_largest_logit_is_the_label(tmp_path):
    parts = read("synthetic", tmp_path, noise=0.0)
    logits = Teacher(noise=0.0).logits(torch.from_numpy(parts.test.x).double())
    assert np.array_equal(logits.argmax(1).numpy(), parts.test.y)
    bayes = estimate_bayes(Teacher(noise=0.0))
    assert (bayes.accuracy, bayes.loss) == (1.0, 0.0)


def test_more_noise_leaves_less_to_be_known():
    found = [estimate_bayes(Teacher(noise=noise)) for noise in (0.05, 0.1, 0.3, 100.0)]
    assert all(left.accuracy > right.accuracy + 0.03 for left, right in pairwise(found))
    assert found[-1].accuracy < 0.11
    assert found[-1].loss == pytest.approx(math.log(10), abs=1e-3)


# Both.


@pytest.mark.parametrize("name", ["synthetic", "gaussians"])
def test_the_truth_stays_when_the_draw_changes_and_changes_with_its_seed(name, tmp_path):
    def means(**arguments) -> np.ndarray:
        parts = read(name, tmp_path, num_train=50_000, **arguments)
        return np.stack([parts.train.x[parts.train.y == label].mean(0) for label in range(10)])

    first = means(seed=1)
    # About 5,000 samples a class, so a standard error of .014, and .02 of a difference.
    assert np.abs(means(seed=2) - first).max() < 0.15
    assert np.abs(means(seed=1, truth_seed=1) - first).max() > 0.3


def test_a_linear_network_approaches_the_best_accuracy_on_gaussians(tmp_path):
    # The test accuracy of the best rule has a standard error of .4 percentage points.
    best = Gaussians().bayes_accuracy
    torch.manual_seed(0)
    found = accuracy_of_training(torch.nn.Linear(32, 10), "gaussians", tmp_path, steps=500)
    assert best - 0.03 < found < best + 0.016


def test_a_small_network_learns_what_the_teacher_knows_and_a_linear_one_cannot(tmp_path):
    options = {**SMALL_TEACHER, "num_train": 20_000}
    best = estimate_bayes(Teacher(**SMALL_TEACHER)).accuracy
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    found = accuracy_of_training(network, "synthetic", tmp_path, steps=1500, **options)
    assert best - 0.04 < found < best + 0.02
    parts = read("synthetic", tmp_path, **options)
    design = np.column_stack([parts.train.x, np.ones(len(parts.train.y))])
    linear = np.linalg.lstsq(design, np.eye(10)[parts.train.y], rcond=None)[0]
    scores = np.column_stack([parts.test.x, np.ones(len(parts.test.y))]) @ linear
    assert (scores.argmax(1) == parts.test.y).mean() < best - 0.1


def test_shapes_follow_the_options():
    assert shape_of("synthetic", num_features=5, num_classes=3, num_train=9) == ((5,), 3)
    assert shape_of("gaussians", num_features=5, num_classes=3, num_train=9) == ((5,), 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("synthetic", {"num_features": 0}, "num_features is 0; use 1 or more"),
        ("synthetic", {"num_classes": 1}, "num_classes is 1; use 2 or more"),
        ("synthetic", {"teacher_width": 0}, "teacher_width is 0"),
        ("synthetic", {"noise": -0.1}, "noise is -0.1; use 0"),
        ("synthetic", {"noise": math.nan}, "noise is nan"),
        ("gaussians", {"num_classes": 1}, "num_classes is 1"),
        ("gaussians", {"num_features": 9}, "num_features is 9, too few for 10 orthogonal means"),
        ("gaussians", {"separation": math.inf}, "separation is inf"),
        ("gaussians", {"num_train": 0}, "num_train is 0; use 1 or more"),
        ("synthetic", {"num_train": 0}, "num_train is 0; use 1 or more"),
    ],
)
def test_impossible_truths_are_refused_before_anything_is_drawn(name, options, message):
    with pytest.raises(BadInput, match=message):
        shape_of(name, **options)
