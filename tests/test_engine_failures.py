"""Rows that diverge, fail or cannot train: what they score, and what they say."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from bnbench.engine.chunked import ChunkedClassifier
from bnbench.engine.rows import check_trial
from bnbench.engine.train import train
from bnbench.norms import NORMS
from bnbench.registry import BadInput
from bnbench.study.trial import Trial
from tests.test_engine_train import ROW, K, assert_plain, folder, place

__all__ = ["folder", "place"]  # fixtures


def own_model(name: str, **changes) -> Trial:
    return ROW.replace(model=f"{__name__}:{name}", model_options={}, **changes)


class Linear(nn.Module):
    """A linear classifier that counts its steps and may be spoilt."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_classes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps.add_(1)
        return self.spoil(self.linear(x.flatten(1)))

    def spoil(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class NaNAlways(Linear):
    def spoil(self, logits):
        return logits * float("nan")


class NaNAtStep35(Linear):
    def spoil(self, logits):
        return logits * float("nan") if self.steps == 35 and self.training else logits


class InfiniteInEvaluationAtLast(Linear):
    def spoil(self, logits):
        return logits if self.training or self.steps < 40 else logits * float("inf")


class InfiniteForOthers(Linear):
    """Infinite in evaluation for any batch that is not the 200 training samples."""

    def spoil(self, logits):
        return logits if self.training or len(logits) == 200 else logits * float("inf")


class RaisesAtStep10(Linear):
    def spoil(self, logits):
        if self.steps == 10:
            raise RuntimeError("step ten is unlucky")
        return logits


class RaisesBadInput(Linear):
    def spoil(self, logits):
        if self.training:
            raise BadInput("a norm that finds its batch odd")
        return logits


class RaisesWhenBuilt(Linear):
    def __init__(self, num_classes: int) -> None:
        raise RuntimeError("cannot be built")


@pytest.mark.parametrize("score_on", ["val", "test"])
@pytest.mark.parametrize(
    ("row", "lost"),
    [
        (own_model("NaNAlways"), True),
        (own_model("NaNAtStep35"), False),
        (own_model("InfiniteInEvaluationAtLast"), False),
        (ROW.replace(norm="none", lr=1e20), False),
        (ROW.replace(norm="batch", lr=1e30, weight_decay=1.0), False),
    ],
    ids=["NaN always", "NaN at a step", "infinite in evaluation", "huge rate", "huge rate and decay"],
)
def test_a_diverged_row_scores_chance_and_its_last_finite_loss(row, lost, score_on, place):
    row = row.replace(score_on=score_on, curve_points=8, label_noise=0.1, schedule="constant")
    losses = []
    step = ChunkedClassifier._step

    def record(self, *arguments):
        losses.append(step(self, *arguments))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkedClassifier, "_step", record)
        result = train(row, place)
    assert result.status == "diverged", result.reason
    assert result.reason
    assert_plain(result)
    finite = [value for value in map(float, losses) if math.isfinite(value)]
    worst = math.log(K) if lost else max(math.log(K), finite[-1])
    parts = ["train", "val", *(["test"] if score_on == "test" else [])]
    for part in parts:
        assert result.metrics[f"{part}/acc"] == 1 / K
        assert result.metrics[f"{part}/loss"] == worst
    healthy = train(ROW.replace(score_on=score_on, label_noise=0.1), place)
    assert healthy.metrics.keys() - result.metrics.keys() <= {"test/ece", "norm/gamma"}
    assert result.metrics.keys() <= healthy.metrics.keys()


def test_a_divergence_ends_the_training_early(place):
    row = ROW.replace(norm="none", lr=1e20, steps=5000, schedule="constant")
    with pytest.MonkeyPatch.context() as patch:
        done = []
        step = ChunkedClassifier._step
        patch.setattr(ChunkedClassifier, "_step", lambda self, *a: (done.append(1), step(self, *a))[1])
        assert train(row, place).status == "diverged"
    assert len(done) <= 64


def test_a_loss_above_the_initial_one_is_divergence_with_that_loss(place):
    row = ROW.replace(norm="none", lr=30.0, schedule="constant", steps=1)
    result = train(row, place)
    assert result.status == "diverged"
    assert "above where it began" in result.reason
    assert result.metrics["train/loss_initial"] < result.metrics["train/loss"] == result.metrics["val/loss"]
    assert result.metrics["val/acc"] == 0.1


def test_scores_that_overflow_at_evaluation_only_stay_finite(place):
    row = own_model("InfiniteForOthers", curve_points=4, score_on="test")
    result = train(row, place)
    assert result.status == "done", result.reason
    assert_plain(result)
    assert result.metrics["val/acc"] == result.metrics["test/acc"] == 0.1
    assert result.metrics["train/acc"] > 0.2
    assert set(result.curve["val/acc"]) == {0.1}
    assert "test/ece" not in result.metrics


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RaisesAtStep10", "RuntimeError: step ten is unlucky"),
        ("RaisesBadInput", "BadInput: a norm that finds its batch odd"),
    ],
)
def test_a_model_that_raises_makes_its_row_failed_with_the_traceback(name, message, place):
    result = train(own_model(name), place)
    assert result.status == "failed"
    assert "Traceback" in result.reason
    assert name in result.reason or "spoil" in result.reason
    assert message in result.reason
    assert_plain(result)
    assert train(ROW, place).status == "done"


def test_a_norm_that_raises_makes_its_row_failed(place, monkeypatch):
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise ZeroDivisionError("in the norm")
            return x

    entry = dataclasses.replace(NORMS["none"], name="raises", layer=lambda num_features, dim: Raises())
    monkeypatch.setitem(NORMS._entries, "raises", entry)
    result = train(ROW.replace(norm="raises"), place)
    assert result.status == "failed"
    assert "ZeroDivisionError: in the norm" in result.reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "digit"}, "did you mean 'digits'"),
        ({"model": "mpl"}, "did you mean 'mlp'"),
        ({"norm": "bach"}, "did you mean 'batch'"),
        ({"model_options": {"widht": 3}}, "did you mean 'width'"),
        ({"norm": "group", "norm_options": {"num_groups": 5}}, "num_groups"),
        ({"norm": "ghost_batch", "norm_options": {"ghost_size": 3}}, "does not divide the batch of 20"),
        ({"batch_size": 1}, "at least 2"),
        ({"augment": "flipp"}, "did you mean 'flip'"),
        ({"num_nodes": 2}, "start the row on all nodes at once"),
        (
            {"model": f"{__name__}:RaisesWhenBuilt", "model_options": {}},
            "cannot be built: RuntimeError: cannot be built",
        ),
    ],
)
def test_a_row_that_cannot_train_is_refused_in_one_line(changes, message, place):
    row = ROW.replace(**changes)
    for refuse in (lambda: check_trial(row), lambda: train(row, place)):
        with pytest.raises(BadInput, match=message) as refusal:
            refuse()
        assert "\n" not in str(refusal.value)


def test_a_batch_larger_than_the_data_is_refused(place):
    with pytest.raises(BadInput, match="use 1 to 200"):
        train(ROW.replace(batch_size=201), place)
