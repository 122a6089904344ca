"""Rows with a target of training NLL: where they stop, and what they measure there."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from bnbench.data import load_split, step_indices
from bnbench.engine.rows import module_arguments
from bnbench.engine.train import Place, train
from bnbench.lit import NormClassifier
from bnbench.norms.recalibrate import recalibrate
from bnbench.study.trial import Trial

TARGET = 1.2
ROW = Trial(
    data="digits",
    n_train=200,
    label_noise=0.2,
    model="mlp",
    model_options={"depth": 2, "width": 16},
    batch_size=20,
    lr=0.05,
    steps=90,
    score_on="test",
    precision="64-true",
    until_train_nll=TARGET,
    curve_points=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def place(folder, tmp_path):
    return Place(folder, tmp_path)


def first_look_below(target: float, place: Place) -> tuple[int, nn.Module]:
    """Steps and model at the first of 30 looks with a training NLL that is low enough, by a bare loop."""
    part = load_split("digits", 0, folder=place.data, n_train=200, label_noise=0.2).train
    x_all, y_all = part.x.double(), part.y
    model = NormClassifier(**module_arguments(ROW)).model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=ROW.lr, momentum=ROW.momentum)
    for step, index in enumerate(step_indices(200, 20, 0, ROW.steps, ROW.seed, "test")):
        optimizer.param_groups[0]["lr"] = ROW.lr * math.cos(math.pi / 2 * step / ROW.steps) ** 2
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x_all[index]), y_all[index]).backward()
        optimizer.step()
        if (step + 1) % 3 == 0:
            looked_at = copy.deepcopy(model)
            recalibrate(looked_at, x_all.split(20))
            log_p = looked_at.eval()(x_all).log_softmax(1)
            if -log_p[torch.arange(200), y_all].mean().item() <= target:
                return step + 1, model
    raise AssertionError("the target was not reached")


def test_a_row_stops_at_the_first_look_with_a_training_nll_at_or_below_its_target(place):
    result = train(ROW, place)
    steps, model = first_look_below(TARGET, place)
    assert 3 < steps < 60
    metrics = result.metrics
    assert result.status == "done", result.reason
    assert (metrics["train/reached"], metrics["train/steps"]) == (1.0, steps)
    # What is measured is the model at the stop.
    assert metrics["train/loss"] <= TARGET
    weights = load_file(place.runs / "weights" / f"{ROW.key}.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-9)
    assert result.curve["step"][-1] == steps
    assert result.curve["val/loss"][-1] == pytest.approx(metrics["val/loss_precise"])


def test_up_to_its_stop_a_row_trains_as_one_without_a_target(place):
    stopped, whole = (train(ROW.replace(curve_points=30, until_train_nll=t), place) for t in (TARGET, None))
    points = len(stopped.curve["step"]) - 1
    assert 3 < points < len(whole.curve["step"])
    for name in ("step", "val/loss", "val/acc"):
        assert stopped.curve[name][:points] == pytest.approx(whole.curve[name][:points], rel=1e-12), name


def test_a_row_that_does_not_reach_its_target_trains_its_whole_budget(place):
    result, plain = (train(ROW.replace(until_train_nll=target), place) for target in (1e-3, None))
    assert result.status == "done", result.reason
    measured = {name: value for name, value in result.measured().items() if name not in REACHED}
    assert measured == plain.measured()
    assert (result.metrics["train/reached"], result.metrics["train/steps"]) == (0.0, 90.0)
    assert not REACHED & plain.metrics.keys()
    assert result.curve["val/loss"] == plain.curve["val/loss"]


REACHED = {"train/reached", "train/steps"}


def test_a_target_that_only_the_last_step_meets_is_reached(place):
    row = ROW.replace(steps=1, curve_points=0, until_train_nll=1e-3)
    missed = train(row, place).metrics
    assert (missed["train/reached"], missed["train/steps"]) == (0.0, 1.0)
    met = train(row.replace(until_train_nll=missed["train/loss"]), place).metrics
    assert (met["train/reached"], met["train/steps"]) == (1.0, 1.0)


def test_ranks_stop_together(place):
    """Synchronized statistics: two devices with half a batch each train as one with a whole one."""
    row = ROW.replace(norm="sync_batch", curve_points=0)
    alone, together = (train(row.replace(batch_size=20 // n, devices=n), place) for n in (1, 2))
    assert together.status == "done", together.reason
    assert together.metrics["train/reached"] == 1.0
    assert together.metrics["train/steps"] == alone.metrics["train/steps"] < 60
    assert together.metrics["train/loss"] == pytest.approx(alone.metrics["train/loss"])
