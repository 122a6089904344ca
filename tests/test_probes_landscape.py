"""The landscape probe against quadratic losses, and against plain recomputations of networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bnbench.probes import Moment, build_probe
from bnbench.probes.landscape import Landscape, measure_landscape
from bnbench.registry import BadInput

NOTHING = torch.zeros(1, dtype=torch.float64)
MULTIPLES = (0.5, 1, 2, 4)


class Point(nn.Module):
    """A network whose output is its parameters."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(numbers, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.clone()


def curvature() -> Tensor:
    draws = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return draws + draws.T


def quadratic(theta: Tensor, _: Tensor) -> Tensor:
    return theta @ curvature() @ theta / 2


@pytest.mark.parametrize("at", ["lr", "the common step"])
def test_a_quadratic_loss_has_the_values_of_its_closed_form(at: str) -> None:
    theta = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    g = curvature() @ theta
    change = (curvature() @ g).norm() / g.norm()
    step = 0.03 if at == "lr" else 0.2 * theta.norm() / g.norm()
    losses = [quadratic(theta - k * step * g, NOTHING) for k in MULTIPLES]
    found = measure_landscape(Point(*theta), NOTHING, NOTHING, lr=0.03, relative_step=0.2, loss=quadratic)
    suffix = "" if at == "lr" else "_common"
    assert found.values[f"beta{suffix}"] == pytest.approx(change.item(), rel=1e-12)
    assert found.values[f"predictiveness{suffix}"] == pytest.approx((4 * step * change).item(), rel=1e-12)
    assert found.values[f"loss_range{suffix}"] == pytest.approx((max(losses) - min(losses)).item(), rel=1e-12)
    assert found.series[f"loss{suffix}"] == pytest.approx([loss.item() for loss in losses], rel=1e-12)
    distances = [(k * step * change * g.norm()).item() for k in MULTIPLES]
    assert found.series[f"distance{suffix}"] == pytest.approx(distances, rel=1e-12)
    assert (found.axis, found.index) == ("step size", MULTIPLES)


def small_net(norm: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3))
    return layers.double()


def batch() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(5)
    return torch.randn(12, 1, 6, 6, dtype=torch.float64, generator=draws), torch.arange(12) % 3


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_a_network_has_the_values_of_a_recomputation_on_other_parameters(norm: type[nn.Module]) -> None:
    model, (x, y) = small_net(norm), batch()
    names = dict(model.named_parameters())

    def look(theta: dict[str, Tensor]) -> tuple[float, Tensor]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
        other = copy.deepcopy(model).train()
        loss = F.nll_loss(functional_call(other, leaves, x).log_softmax(1), y)
        loss.backward()
        return loss.item(), torch.cat([leaf.grad.flatten() for leaf in leaves.values()])

    _, g = look(names)
    sizes = [p.numel() for p in names.values()]
    parts = {n: part.view_as(p) for (n, p), part in zip(names.items(), g.split(sizes), strict=True)}
    size = torch.cat([p.detach().flatten() for p in names.values()]).norm()
    model.eval()
    found = measure_landscape(model, x, y, lr=0.4)
    for suffix, step in (("", 0.4), ("_common", 0.01 * size / g.norm())):
        points = [look({n: p - k * step * parts[n] for n, p in names.items()}) for k in MULTIPLES]
        losses = [loss for loss, _ in points]
        distances = torch.stack([(there - g).norm() for _, there in points])
        ways = step * g.norm() * torch.tensor(MULTIPLES, dtype=torch.float64)
        assert found.values[f"loss_range{suffix}"] == pytest.approx(max(losses) - min(losses), rel=1e-9)
        assert found.values[f"predictiveness{suffix}"] == pytest.approx(
            (distances.max() / g.norm()).item(), rel=1e-9
        )
        assert found.values[f"beta{suffix}"] == pytest.approx((distances / ways).max().item(), rel=1e-9)
    assert not model.training


def test_frozen_parameters_stay_where_they_are() -> None:
    class Pair(Point):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.frozen = nn.Parameter(torch.tensor([5.0], dtype=torch.float64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.theta**2 * self.frozen

    found = measure_landscape(Pair(), NOTHING, NOTHING, lr=0.01, loss=lambda out, _: out.sum())
    # The loss is 5θ² at θ = 1: its second derivative is 10, and the common step goes 1 % of |θ|.
    assert found.values["beta"] == pytest.approx(10, rel=1e-12)
    assert found.series["loss_common"][1] == pytest.approx(5 * 0.99**2, rel=1e-12)


def test_dropout_draws_the_same_units_at_all_points() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 3)).double()
    x = torch.randn(16, 8, dtype=torch.float64)
    found = measure_landscape(model, x, torch.arange(16) % 3, relative_step=1e-7)
    # Other units would change the gradient by as much as its own norm.
    assert 0 < found.values["predictiveness_common"] < 1e-4
    assert 0 < found.values["loss_range_common"] < 1e-4


def test_every_point_starts_from_the_same_buffers() -> None:
    class Counting(Point):
        def __init__(self) -> None:
            super().__init__(1.0, 2.0)
            self.register_buffer("passes", torch.zeros(1, dtype=torch.float64))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            self.calls += 1
            return (self.passes + self.calls) * self.theta

    model = Counting()
    found = measure_landscape(model, NOTHING, NOTHING, lr=0.1, loss=lambda out, _: out.square().sum())
    # The loss is (2θ)² at each point, and its second derivative 8.
    assert found.values["beta"] == pytest.approx(8, rel=1e-12)
    assert (model.passes.item(), model.calls) == (0, 0)


@pytest.mark.parametrize("lr", [0.0, math.nan, math.inf])
def test_without_a_step_of_its_own_only_the_common_one_has_values(lr: float) -> None:
    found = measure_landscape(Point(1, 2, 3, 4), NOTHING, NOTHING, lr=lr, loss=quadratic)
    for name in ("loss_range", "predictiveness", "beta"):
        assert math.isnan(found.values[name])
        assert found.values[f"{name}_common"] > 0
    assert all(map(math.isnan, found.series["loss"]))


def test_a_zero_gradient_has_no_ratios() -> None:
    found = measure_landscape(Point(0, 0, 0, 0), NOTHING, NOTHING, lr=0.1, loss=quadratic)
    assert found.values["loss_range"] == 0
    assert all(math.isnan(value) for name, value in found.values.items() if name != "loss_range")


def test_a_loss_that_explodes_along_the_step_is_nan_and_not_an_exception() -> None:
    found = measure_landscape(Point(1), NOTHING, NOTHING, lr=2e2, loss=lambda out, _: (out**200).sum())
    assert math.isnan(found.values["loss_range"])
    assert math.isnan(found.values["beta"])
    assert found.values["beta_common"] > 0


def test_the_callback_measures_at_the_learning_rate_of_the_moment() -> None:
    model, (x, y) = small_net(nn.BatchNorm2d), batch()
    probe = build_probe("landscape", relative_step=0.05)
    found = probe.measure(model, x, y, Moment(step=0, lr=0.3, batch_size=12))
    assert found == measure_landscape(model, x, y, lr=0.3, relative_step=0.05)
    assert found != Landscape().measure(model, x, y, Moment(step=0, lr=0.2, batch_size=12))


@pytest.mark.parametrize("relative_step", [0, -0.1, math.nan, math.inf])
def test_a_relative_step_that_cannot_be_is_refused(relative_step: float) -> None:
    with pytest.raises(BadInput, match="probe 'landscape': relative_step must be a positive number"):
        Landscape(relative_step=relative_step)
    with pytest.raises(BadInput, match="relative_step"):
        measure_landscape(Point(1), NOTHING, NOTHING, relative_step=relative_step)
