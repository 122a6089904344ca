"""Tests of the calibration probe against closed forms and a plain binning in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnbench.probes.base import Moment
from bnbench.probes.calibration import Calibration, measure_calibration
from bnbench.registry import BadInput

AS_GIVEN = nn.Identity()


def two_logits(confidences: list[float]) -> Tensor:
    """Logits of two classes that give the first one these probabilities."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def test_the_error_is_the_distance_of_confidence_and_accuracy_weighted_over_bins() -> None:
    # Ten examples at .83, six of them right; thirty at .95, all right.
    x = two_logits([0.83] * 10 + [0.95] * 30)
    y = torch.tensor([0] * 6 + [1] * 4 + [0] * 30)
    values = measure_calibration(AS_GIVEN, x, y).values
    assert values["ece"] == pytest.approx(0.25 * 0.23 + 0.75 * 0.05, rel=1e-5)
    assert values["nll"] == pytest.approx(
        -(6 * math.log(0.83) + 4 * math.log(0.17) + 30 * math.log(0.95)) / 40
    )
    assert values["confidence"] == pytest.approx((10 * 0.83 + 30 * 0.95) / 40)
    assert values["accuracy"] == pytest.approx(36 / 40)


def test_a_classifier_is_calibrated_that_is_right_as_often_as_it_says() -> None:
    x = two_logits([0.8] * 10 + [0.6] * 10)
    y = torch.tensor([0] * 8 + [1] * 2 + [0] * 6 + [1] * 4)
    assert measure_calibration(AS_GIVEN, x, y).values["ece"] == pytest.approx(0, abs=1e-6)


def test_random_logits_have_the_error_of_a_plain_binning() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(500, 7, generator=generator)
    y = torch.randint(7, (500,), generator=generator)
    p = np.exp(x.double().numpy())
    p /= p.sum(1, keepdims=True)
    confidence, is_right = p.max(1), p.argmax(1) == y.numpy()
    wanted = 0.0
    for low in range(15):
        in_bin = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if in_bin.any():
            wanted += in_bin.mean() * abs(is_right[in_bin].mean() - confidence[in_bin].mean())
    values = measure_calibration(AS_GIVEN, x, y).values
    assert values["ece"] == pytest.approx(wanted, rel=1e-5)
    assert values["nll"] == pytest.approx(-np.log(p[np.arange(500), y.numpy()]).mean(), rel=1e-6)


def test_logits_within_zero_and_one_are_not_taken_for_probabilities() -> None:
    x = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    values = measure_calibration(AS_GIVEN, x, torch.tensor([0, 0])).values
    assert values["ece"] == pytest.approx(1 - 1 / (1 + math.exp(-0.8)))


def test_the_model_is_in_evaluation_mode() -> None:
    norm = nn.BatchNorm1d(3, affine=False)
    norm.running_mean.copy_(torch.tensor([1.0, -1, 0]))
    norm.running_var.copy_(torch.tensor([4.0, 1, 9]))
    model = nn.Sequential(norm, nn.Dropout(0.5)).train()
    x, y = torch.randn(30, 3), torch.randint(3, (30,))
    logits = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    values = measure_calibration(model, x, y).values
    assert values["nll"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert model[1].training


def test_the_callback_reads_held_out_data_where_there_are_any() -> None:
    seen, new = two_logits([0.9] * 4), two_logits([0.7] * 4)
    zeros = torch.zeros(4, dtype=torch.int64)
    moment = Moment(step=0, lr=0.1, batch_size=4)
    assert Calibration().measure(AS_GIVEN, seen, zeros, moment).values["confidence"] == pytest.approx(0.9)
    moment = Moment(step=0, lr=0.1, batch_size=4, held_out=(new, zeros))
    assert Calibration().measure(AS_GIVEN, seen, zeros, moment).values["confidence"] == pytest.approx(0.7)


def test_logits_that_are_not_finite_have_no_calibration() -> None:
    x = torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    values = measure_calibration(AS_GIVEN, x, torch.tensor([0, 1])).values
    assert all(map(math.isnan, values.values()))


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(5, 3), torch.zeros(5)),
        (torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64)),
        (torch.zeros(5), torch.zeros(5, dtype=torch.int64)),
        (torch.zeros(5, 3, 2), torch.zeros(5, 2, dtype=torch.int64)),
        (torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int64)),
    ],
)
def test_outputs_that_are_no_logits_for_classes_are_refused(outputs: Tensor, targets: Tensor) -> None:
    with pytest.raises(BadInput, match=r"probe 'calibration' needs logits \(N, K\) of 2 or more classes"):
        measure_calibration(AS_GIVEN, outputs, targets)
