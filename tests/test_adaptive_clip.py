"""Adaptive gradient clipping against a plain loop: alone, in the engine, under a Trainer and in fleets."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bnbench.data import Arrays, step_indices
from bnbench.engine.fleet import FleetClassifier, can_fleet, fleet_shape
from bnbench.engine.rows import check_trial, classifier_of, module_arguments
from bnbench.lit import NormClassifier
from bnbench.optimization import clip_by_unit
from bnbench.registry import BadInput
from bnbench.study.trial import Trial
from tests.test_engine_chunked import QUIET

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROW = Trial(
    data="digits",
    model="cnn",
    model_options={"depth": 2, "channels": 4},
    norm="batch",
    reparam="scaled_weight_standardization",
    precision="64-true",
    batch_size=8,
    steps=6,
    lr=0.3,
    adaptive_clip=0.02,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arrays(seed: int = 0) -> Arrays:
    x = torch.randn(40, 1, 8, 8, generator=generator(seed), dtype=torch.float64)
    return Arrays(x, torch.randint(10, (40,), generator=generator(seed)))


def units_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of what is clipped together: rows, or the whole where a row would be one number."""
    whole = tensor.ndim < 2 or tensor.numel() == tensor.shape[0]
    return [tensor] if whole else list(tensor.unbind())


def clip_in_a_loop(parameter: torch.Tensor, gradient: torch.Tensor, limit: float) -> None:
    """Clip one gradient in place, as the paper's equation says."""
    for weights, own in zip(units_of(parameter.detach()), units_of(gradient), strict=True):
        size = max(math.sqrt(math.fsum(w * w for w in weights.flatten().tolist())), 1e-3)
        length = math.sqrt(math.fsum(g * g for g in own.flatten().tolist()))
        if length / size > limit:
            own.mul_(limit * size / length)


SHAPES = [(), (1,), (5,), (4, 6), (4, 1), (1, 6), (3, 2, 5), (4, 3, 3, 3), (4, 1, 1, 1), (2, 3, 2, 2, 2)]


@pytest.mark.parametrize("limit", [1e-3, 0.3, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_clipped_unit_by_unit(shape: tuple[int, ...], limit: float) -> None:
    draw = generator(len(shape))
    parameter = torch.randn(shape, generator=draw, dtype=torch.float64)
    gradient = torch.randn(shape, generator=draw, dtype=torch.float64)
    gradient.view(-1)[0] *= 100
    if len(shape) > 1:
        parameter[-1] = 0
    expected = gradient.clone()
    clip_in_a_loop(parameter, expected, limit)
    (clipped,) = clip_by_unit([parameter], [gradient], limit)
    torch.testing.assert_close(clipped, expected, rtol=1e-12, atol=0)
    assert torch.equal(clipped, gradient) == (limit == 1e6)


def test_a_gradient_of_zero_stays_and_weights_of_zero_can_move() -> None:
    zeros, ones = torch.zeros(3, 2), torch.ones(3, 2)
    still, moving = clip_by_unit([zeros, zeros], [zeros, ones], 0.5)
    assert torch.equal(still, zeros)
    torch.testing.assert_close(moving.norm(dim=1), torch.full((3,), 0.5e-3))


def trained_in_a_loop(row: Trial) -> nn.Module:
    """The row by torch's SGD; the classifier's gradients are left alone."""
    model = NormClassifier(**module_arguments(row)).model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=row.lr, momentum=row.momentum)
    clipped = 0
    for step, index in enumerate(step_indices(40, row.batch_size, 0, row.steps, *row.training_seed)):
        for group in optimizer.param_groups:
            group["lr"] = row.lr * (1 + math.cos(math.pi * step / row.steps)) / 2
        optimizer.zero_grad()
        F.cross_entropy(model(arrays().x[index]), arrays().y[index]).backward()
        for name, parameter in model.named_parameters():
            before = parameter.grad.clone()
            if not name.startswith("head"):
                clip_in_a_loop(parameter, parameter.grad, row.adaptive_clip)
            clipped += not torch.equal(before, parameter.grad)
        if row.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), row.clip_norm)
        optimizer.step()
    assert clipped > row.steps
    return model


def assert_same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, own), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, msg=name)


BOTH = pytest.mark.parametrize("clip_norm", [None, 0.05])


@BOTH
def test_the_engine_equals_a_loop(clip_norm: float | None) -> None:
    row = ROW.replace(clip_norm=clip_norm)
    module = classifier_of(row, arrays()).double()
    module.prepare()
    module.do_steps(0, row.steps)
    assert_same(module.model, trained_in_a_loop(row))


@BOTH
def test_automatic_optimization_equals_a_loop(clip_norm: float | None) -> None:
    row = ROW.replace(clip_norm=clip_norm)
    batches = [(arrays().x[i], arrays().y[i]) for i in step_indices(40, 8, 0, row.steps, *row.training_seed)]
    module = NormClassifier(**module_arguments(row))
    trainer = L.Trainer(**QUIET, precision="64-true", gradient_clip_val=clip_norm)
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    assert_same(module.model, trained_in_a_loop(row))


def test_a_row_of_a_fleet_is_what_its_separate_training_is() -> None:
    rows = [ROW.replace(seed=seed, adaptive_clip=limit) for seed, limit in enumerate((0.01, None, 0.1))]
    assert len({fleet_shape(row) for row in rows}) == 1
    assert all(can_fleet(row) for row in rows)
    together, alone = ([classifier_of(row, arrays(row.seed)).double() for row in rows] for _ in range(2))
    for member in [*together, *alone]:
        member.prepare()
    FleetClassifier(together).do_steps(0, 4)
    for member, lonely in zip(together, alone, strict=True):
        lonely.do_steps(0, 4)
        assert_same(member.model, lonely.model)


def test_rows_without_it_keep_their_keys() -> None:
    assert Trial(adaptive_clip=None).key == Trial().key
    assert "adaptive_clip" not in Trial(clip_norm=0.5).changed()
    assert Trial(adaptive_clip=0.1).changed() == {"adaptive_clip": 0.1}
    assert Trial(adaptive_clip=0.1).key != Trial().key


def test_bad_input_is_one_clear_line() -> None:
    for value in (0.0, -0.1):
        with pytest.raises(BadInput, match="adaptive_clip must be above 0, or None"):
            Trial(adaptive_clip=value)
        with pytest.raises(BadInput, match="adaptive_clip must be above 0, or None"):
            NormClassifier(in_shape=(4,), num_classes=3, adaptive_clip=value)
    with pytest.raises(BadInput, match=r"no nn\.Linear named 'head'"):
        NormClassifier(nn.Linear(4, 3), in_shape=(4,), num_classes=3, adaptive_clip=0.1)
    check_trial(ROW)
