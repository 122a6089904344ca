"""Data of known truth, drawn anew for each seed: labels by a teacher network, and Gaussian classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bnbench.data.base import Parts, Samples, Shape, dataset
from bnbench.data.randomness import generator
from bnbench.registry import BadInput

TRAIN, VAL, TEST = 4_000, 2_000, 6_000


@dataclass(frozen=True)
class Teacher:
    """Normal inputs with the labels of a random network: x ~ N(0, I), P(y = k | x) = softmax(f(x) / noise)_k.

    f(x) = V (ReLU(W x) − 1/√(2π)) with rows of W uniform on the sphere and rows of V normal, scaled so that
    each logit has mean 0 and variance 1 over x, exactly. So `noise`, a temperature, is in standard deviations
    of a logit; with 0 the label is the largest logit. The network depends on `truth_seed` alone.
    """

    num_features: int = 32
    num_classes: int = 10
    teacher_width: int = 16
    noise: float = 0.1
    truth_seed: int = 0

    def __post_init__(self) -> None:
        _check_least("num_features", self.num_features, 1)
        _check_least("num_classes", self.num_classes, 2)
        _check_least("teacher_width", self.teacher_width, 1)
        if not 0 <= self.noise < math.inf:
            raise BadInput(f"noise is {self.noise}; use 0 (none) or more, in standard deviations of a logit")

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        draw = generator("synthetic", "teacher", self.truth_seed)
        inner = torch.randn(self.teacher_width, self.num_features, generator=draw, dtype=torch.float64)
        outer = torch.randn(self.num_classes, self.teacher_width, generator=draw, dtype=torch.float64)
        inner = F.normalize(inner, dim=1)
        # Cho & Saul (2009): E ReLU(u) ReLU(v) of unit normals at the angle a is (sin a + (π − a) cos a) / 2π.
        cosine = (inner @ inner.T).clamp(-1, 1)
        angle = cosine.acos()
        covariance = (angle.sin() + (math.pi - angle) * cosine - 1) / (2 * math.pi)
        return inner, outer / ((outer @ covariance) * outer).sum(1, keepdim=True).sqrt()

    def logits(self, x: Tensor) -> Tensor:
        """Return f(x), N × K, of x in float64."""
        inner, outer = self._weights
        return (F.relu(x @ inner.T) - 1 / math.sqrt(2 * math.pi)) @ outer.T

    def posterior(self, x: Tensor) -> Tensor:
        """Return P(y | x), N × K."""
        logits = self.logits(x)
        if self.noise == 0:
            return F.one_hot(logits.argmax(1), self.num_classes).double()
        return F.softmax(logits / self.noise, dim=1)

    def draw(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs (float64) and labels."""
        x = torch.randn(count, self.num_features, generator=random, dtype=torch.float64)
        # The largest of logits with Gumbel noise is distributed as their softmax.
        gumbel = (
            -torch.empty(count, self.num_classes, dtype=torch.float64).exponential_(generator=random).log()
        )
        return x, (self.logits(x) + self.noise * gumbel).argmax(1)


@dataclass(frozen=True)
class Gaussians:
    """Equally frequent classes x ~ N(μ_k, I), the μ_k orthogonal and of length `separation`.

    A linear classifier, the largest μ_k · x, is the best one. The directions depend on `truth_seed` alone.
    """

    num_features: int = 32
    num_classes: int = 10
    separation: float = 3.0
    truth_seed: int = 0

    def __post_init__(self) -> None:
        _check_least("num_classes", self.num_classes, 2)
        if self.num_features < self.num_classes:
            raise BadInput(
                f"num_features is {self.num_features}, too few for {self.num_classes} orthogonal means; "
                "use at least num_classes"
            )
        if not 0 <= self.separation < math.inf:
            raise BadInput(f"separation is {self.separation}; use 0 or more, in standard deviations")

    @cached_property
    def _means(self) -> Tensor:
        draw = generator("gaussians", "means", self.truth_seed)
        directions = torch.randn(self.num_features, self.num_classes, generator=draw, dtype=torch.float64)
        orthonormal: Tensor = torch.linalg.qr(directions).Q
        return self.separation * orthonormal.T

    def posterior(self, x: Tensor) -> Tensor:
        """Return P(y | x), N × K."""
        return F.softmax(x @ self._means.T, dim=1)

    def draw(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs (float64) and labels."""
        labels = torch.randint(self.num_classes, (count,), generator=random)
        x = torch.randn(count, self.num_features, generator=random, dtype=torch.float64)
        return x + self._means[labels], labels

    @property
    def bayes_accuracy(self) -> float:
        """The accuracy of the best classifier: ∫ φ(z − s) Φ(z)^(K−1) dz with s the separation.

        That is the chance that of K independent normal scores the one of mean s is the largest (orthogonal
        signals; Proakis, Digital Communications). With two classes it is Φ(s / √2).
        """
        # The trapezoidal rule, which converges faster than any power for such an integrand.
        z = torch.linspace(-10, 10, 2_001, dtype=torch.float64)
        density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        integrand = density * torch.special.ndtr(z + self.separation) ** (self.num_classes - 1)
        return float(torch.trapezoid(integrand, z))


@dataclass(frozen=True)
class Bayes:
    """What the best possible classifier scores: accuracy, and loss in nats a sample."""

    accuracy: float
    loss: float


def estimate_bayes(truth: Teacher | Gaussians, draws: int = 100_000) -> Bayes:
    """Return accuracy E max_k P(k | x) and loss E H(y | x), means of the exact posterior over `draws` inputs.

    The standard error of the accuracy is below 1 / (2 √draws).
    """
    x, _ = truth.draw(draws, generator("bayes"))
    posterior = truth.posterior(x)
    accuracy = posterior.max(1).values.mean()
    return Bayes(float(accuracy), float(torch.special.entr(posterior).sum(1).mean()))


def _teacher_shape(*, num_train: int = TRAIN, **options: Any) -> tuple[Shape, int]:
    _check_least("num_train", num_train, 1)
    teacher = Teacher(**options)
    return (teacher.num_features,), teacher.num_classes


@dataset("synthetic", shape=_teacher_shape, fresh=True)
def read_synthetic(
    data_seed: int,
    folder: Path,
    *,
    num_features: int = Teacher.num_features,
    num_classes: int = Teacher.num_classes,
    teacher_width: int = Teacher.teacher_width,
    noise: float = Teacher.noise,
    truth_seed: int = Teacher.truth_seed,
    num_train: int = TRAIN,
) -> Parts:
    """Draw `num_train` training, 2,000 validation and 6,000 test samples of a :class:`Teacher`.

    Every data_seed is an independent draw from the same truth; :func:`estimate_bayes` says what can be
    reached. Raises BadInput for sizes that cannot be.
    """
    truth = Teacher(num_features, num_classes, teacher_width, noise, truth_seed)
    return _draw_parts(truth, "synthetic", data_seed, num_train)


def _gaussians_shape(*, num_train: int = TRAIN, **options: Any) -> tuple[Shape, int]:
    _check_least("num_train", num_train, 1)
    gaussians = Gaussians(**options)
    return (gaussians.num_features,), gaussians.num_classes


@dataset("gaussians", shape=_gaussians_shape, fresh=True)
def read_gaussians(
    data_seed: int,
    folder: Path,
    *,
    num_features: int = Gaussians.num_features,
    num_classes: int = Gaussians.num_classes,
    separation: float = Gaussians.separation,
    truth_seed: int = Gaussians.truth_seed,
    num_train: int = TRAIN,
) -> Parts:
    """Draw `num_train` training, 2,000 validation and 6,000 test samples of :class:`Gaussians`.

    Every data_seed is an independent draw from the same truth; `Gaussians.bayes_accuracy` is what can be
    reached. Raises BadInput for sizes that cannot be.
    """
    truth = Gaussians(num_features, num_classes, separation, truth_seed)
    return _draw_parts(truth, "gaussians", data_seed, num_train)


def _draw_parts(truth: Teacher | Gaussians, name: str, data_seed: int, num_train: int) -> Parts:
    def draw(part: str, count: int) -> Samples:
        x, y = truth.draw(count, generator(data_seed, name, part))
        return Samples(x.numpy().astype(np.float32), y.numpy())

    return Parts(draw("train", num_train), draw("val", VAL), draw("test", TEST))


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise BadInput(f"{name} is {value}; use {least} or more")
