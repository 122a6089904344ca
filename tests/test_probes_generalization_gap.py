"""Tests of the generalization-gap probe against plain evaluations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnbench.probes.base import Moment
from bnbench.probes.generalization_gap import GeneralizationGap, measure_generalization_gap

AS_GIVEN = nn.Identity()


def logits_for(right: list[bool], margin: float) -> tuple[Tensor, Tensor]:
    """Logits (margin, 0) for examples of the first class where right, else of the second."""
    x = torch.tensor([[margin, 0.0]] * len(right), dtype=torch.float64)
    return x, torch.tensor([0 if is_right else 1 for is_right in right])


def test_the_gaps_are_held_out_minus_training() -> None:
    margin = math.log(3)
    x, y = logits_for([True] * 4, margin)
    new = logits_for([True, False, False, False], margin)
    values = measure_generalization_gap(AS_GIVEN, x, y, held_out=new).values
    # −log(3/4) everywhere in training; three of four times −log(1/4) on new data.
    assert values["loss_gap"] == pytest.approx(0.75 * math.log(3))
    assert values["accuracy_gap"] == pytest.approx(-0.75)


def test_the_same_data_have_no_gap_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    values = measure_generalization_gap(model, x, y, held_out=(x, y)).values
    assert values == {"loss_gap": 0, "accuracy_gap": 0}


def test_a_batch_norm_net_is_evaluated_by_its_running_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 1, 3)
    new = torch.randn(50, 4).double(), torch.randint(3, (50,))
    x, y = torch.randn(20, 4).double(), torch.randint(3, (20,))

    def evaluate(inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        a = model[0](inputs) - model[1].running_mean
        h = (a / (model[1].running_var + 1e-5).sqrt()).clamp(min=0)
        p = model[3](h).softmax(1)
        chosen = p[torch.arange(len(targets)), targets]
        return -chosen.log().mean().item(), (p.argmax(1) == targets).double().mean().item()

    moment = Moment(step=0, lr=0.1, batch_size=20, held_out=new)
    values = GeneralizationGap().measure(model, x, y, moment).values
    (seen_loss, seen_accuracy), (new_loss, new_accuracy) = evaluate(x, y), evaluate(*new)
    assert values["loss_gap"] == pytest.approx(new_loss - seen_loss)
    assert values["accuracy_gap"] == pytest.approx(new_accuracy - seen_accuracy)
    assert abs(values["loss_gap"]) > 0.01


def test_a_regression_has_a_gap_in_its_own_loss_and_none_in_accuracy() -> None:
    x, y = torch.zeros(6, 1), torch.ones(6, 1)
    held_out = (torch.zeros(3, 1), 3 * torch.ones(3, 1))
    values = measure_generalization_gap(AS_GIVEN, x, y, held_out=held_out, loss=F.mse_loss).values
    assert values["loss_gap"] == pytest.approx(9 - 1)
    assert math.isnan(values["accuracy_gap"])
    moment = Moment(step=0, lr=0.1, batch_size=6, held_out=held_out)
    assert GeneralizationGap(loss=F.mse_loss).measure(AS_GIVEN, x, y, moment).values["loss_gap"] == 8


def test_there_is_no_gap_without_held_out_data() -> None:
    x, y = logits_for([True] * 4, 1.0)
    moment = Moment(step=0, lr=0.1, batch_size=4)
    assert all(map(math.isnan, GeneralizationGap().measure(AS_GIVEN, x, y, moment).values.values()))
