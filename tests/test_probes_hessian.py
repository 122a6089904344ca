"""The Hessian probe against matrices with known eigenvalues and against whole Hessians of networks."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import jacrev
from torch.nn import functional as F

from bnbench.lit import NormClassifier
from bnbench.norms import NORMS
from bnbench.probes import Moment, build_probe
from bnbench.probes.hessian import Hessian, measure_hessian
from bnbench.registry import BadInput

NOTHING = torch.zeros(1, dtype=torch.float64)


class Point(nn.Module):
    """A network whose output is its parameters."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(numbers)

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.clone()


def with_eigenvalues(*eigenvalues: float) -> tuple[nn.Module, Any]:
    """A network and a quadratic loss whose Hessian has these eigenvalues."""
    draws = torch.Generator().manual_seed(1)
    shape = (len(eigenvalues), len(eigenvalues))
    turn = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=draws)).Q
    matrix = turn @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ turn.T
    return Point(torch.ones(shape[0], dtype=torch.float64)), lambda theta, _: theta @ matrix @ theta / 2


@pytest.mark.parametrize(
    "eigenvalues",
    [(7.0, 3.0, 2.0, 1.0, -4.0), (5.0, 5.0, 5.0, 1.0, 0.0, 0.0, -2.0), (-1.0, -2.0, -3.0), (0.0,) * 4],
    ids=["distinct", "repeated", "negative", "zero"],
)
def test_a_quadratic_loss_has_the_eigenvalues_of_its_matrix(eigenvalues: tuple[float, ...]) -> None:
    model, loss = with_eigenvalues(*eigenvalues)
    found = measure_hessian(model, NOTHING, NOTHING, loss=loss)
    assert found.series["value"] == pytest.approx(eigenvalues[:3], abs=1e-12)
    assert found.values["largest"] == found.series["value"][0]
    assert found.values["smallest"] == pytest.approx(eigenvalues[-1], abs=1e-12)
    assert found.values["scaled"] == pytest.approx(eigenvalues[0] * len(eigenvalues), abs=1e-12)
    assert max(found.series["residual"]) < 1e-12
    assert (found.axis, found.index) == ("eigenvalue", (1, 2, 3))


def test_the_residual_bounds_the_error_while_iterations_are_too_few() -> None:
    eigenvalues = torch.linspace(-1, 1, 60, dtype=torch.float64).flip(0)
    model, loss = with_eigenvalues(*eigenvalues.tolist())
    residuals = []
    for iterations in (3, 10, 25, 60):
        found = measure_hessian(model, NOTHING, NOTHING, iterations=iterations, loss=loss)
        for value, residual in zip(found.series["value"], found.series["residual"], strict=True):
            assert (eigenvalues - value).abs().min() <= residual + 1e-12
        assert found.values["largest"] <= 1 + 1e-12
        assert found.values["smallest"] >= -1 - 1e-12
        residuals.append(found.values["residual"])
    assert residuals[0] > 0.1
    assert residuals[-1] < 1e-10


def standardized(a: Tensor, dims: list[int], gamma: Tensor, beta: Tensor) -> Tensor:
    centred = a - a.mean(dims, keepdim=True)
    shape = [1, -1, *(1,) * (a.ndim - 2)]
    scale = (centred.square().mean(dims, keepdim=True) + 1e-5).rsqrt()
    return gamma.view(shape) * centred * scale + beta.view(shape)


def wide_batch() -> tuple[nn.Module, Tensor, Any]:
    def forward(p: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = F.relu(standardized(x @ p["0.weight"].T + p["0.bias"], [0], p["1.weight"], p["1.bias"]))
        hidden = F.relu(standardized(hidden @ p["3.weight"].T + p["3.bias"], [0], p["4.weight"], p["4.bias"]))
        return hidden @ p["6.weight"].T + p["6.bias"]

    layers = (nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(4, 3)), torch.randn(18, 4), forward


def images() -> tuple[nn.Module, Tensor, Any]:
    def forward(p: dict[str, Tensor], x: Tensor) -> Tensor:
        maps = standardized(F.conv2d(x, p["0.weight"]), [0, 2, 3], p["1.weight"], p["1.bias"])
        return F.max_pool2d(F.relu(maps), 2).flatten(1) @ p["5.weight"].T + p["5.bias"]

    layers = (nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)), torch.randn(9, 1, 6, 6), forward


@pytest.mark.parametrize("made", [wide_batch, images])
def test_batch_normalized_networks_have_the_eigenvalues_of_the_whole_hessian(made: Any) -> None:
    torch.manual_seed(2)
    model, x, forward = made()
    model, x, y = model.double().eval(), x.double(), torch.arange(len(x)) % 3
    names = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in names.values()]

    def loss_at(theta: Tensor) -> Tensor:
        parts = zip(names.items(), theta.split(sizes), strict=True)
        p = {name: part.view_as(value) for (name, value), part in parts}
        return F.nll_loss(forward(p, x).log_softmax(1), y)

    whole = jacrev(jacrev(loss_at))(torch.cat([p.flatten() for p in names.values()]))
    eigenvalues = torch.linalg.eigvalsh(whole).flip(0)
    found = measure_hessian(model, x, y, count=10, iterations=sum(sizes))
    assert found.series["value"] == pytest.approx(eigenvalues[:10].tolist(), rel=1e-9)
    assert found.values["smallest"] == pytest.approx(eigenvalues[-1].item(), rel=1e-9)
    assert max(found.series["residual"]) < 1e-9 * eigenvalues[0]
    few = measure_hessian(model, x, y, iterations=20)
    assert few.values["largest"] == pytest.approx(eigenvalues[0].item(), rel=1e-6)
    assert not model.training
    assert all(module.num_batches_tracked == 0 for module in model if hasattr(module, "running_mean"))


def differences(model: nn.Module, x: Tensor, y: Tensor, width: float = 1e-5) -> Tensor:
    """The Hessian by central differences of first derivatives, without any second derivative."""
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradient() -> Tensor:
        torch.manual_seed(11)
        return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), weights)])

    rows = []
    for weight in weights:
        for place in range(weight.numel()):
            flat, sides = weight.detach().view(-1), []
            for side in (width, -width):
                flat[place] += side
                sides.append(gradient())
                flat[place] -= side
            rows.append((sides[0] - sides[1]) / (2 * width))
    return torch.stack(rows)


ONCE = ("decorrelated_batch", "moving_average_batch", "online", "power")


def normalized(norm: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(4)
    module = NormClassifier(
        "mlp",
        norm,
        in_shape=(3,),
        num_classes=2,
        model_options={"depth": 1, "width": 4},
        norm_options=dict(NORMS[norm].examples[0]),
        activation="tanh",
    )
    return module.model.double().train(), torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2


@pytest.mark.parametrize("norm", ONCE)
def test_a_norm_with_a_backward_pass_of_its_own_cannot_be_derived_twice(norm: str) -> None:
    model, x, y = normalized(norm)
    with pytest.raises(BadInput, match="cannot be derived twice"):
        measure_hessian(model, x, y, iterations=4)


# Where the gradient is no derivative, a Hessian has no meaning.
@pytest.mark.parametrize(
    "norm",
    [name for name, e in NORMS.items() if e.min_dim == 0 and e.exact_gradient and name not in ONCE],
)
def test_every_norm_has_the_eigenvalues_of_its_differences(norm: str) -> None:
    model, x, y = normalized(norm)
    if norm == "virtual_batch":
        model(x)
    whole = differences(model, x, y)
    torch.manual_seed(11)
    found = measure_hessian(model, x, y, iterations=len(whole))
    assert found.series["value"] == pytest.approx(torch.linalg.eigvalsh(whole).flip(0)[:3].tolist(), rel=1e-6)
    assert found.values["residual"] < 1e-9


def test_scaled_is_the_same_where_the_scale_of_the_weights_does_not_matter() -> None:
    torch.manual_seed(0)
    norm = functools.partial(nn.BatchNorm1d, eps=1e-12, affine=False)
    model = nn.Sequential(
        nn.Linear(5, 6, bias=False), norm(6), nn.Tanh(), nn.Linear(6, 3, bias=False), norm(3)
    )
    model, x, y = model.double(), torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % 3
    before = measure_hessian(model, x, y, iterations=48)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    after = measure_hessian(model, x, y, iterations=48)
    assert after.values["largest"] == pytest.approx(before.values["largest"] / 9, rel=1e-6)
    assert after.values["scaled"] == pytest.approx(before.values["scaled"], rel=1e-6)


def test_only_learned_parameters_have_second_derivatives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model[0].requires_grad_(False)
    x = torch.randn(10, 3, dtype=torch.float64)
    hidden = torch.cat([model[:2](x), torch.ones(10, 1, dtype=torch.float64)], 1)
    # Least squares in the last layer alone.
    exact = torch.linalg.eigvalsh(2 * hidden.T @ hidden / 10).flip(0)
    found = measure_hessian(model, x, torch.zeros(10, 1, dtype=torch.float64), count=5, loss=F.mse_loss)
    assert found.series["value"] == pytest.approx(exact.tolist(), rel=1e-9)


def test_a_parameter_in_which_the_loss_is_linear_has_no_curvature() -> None:
    model = Point(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    linear = measure_hessian(model, NOTHING, NOTHING, loss=lambda theta, _: theta.sum())
    assert linear.series["value"] == (0, 0, 0)
    model.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    bent = measure_hessian(model, NOTHING, NOTHING, loss=lambda theta, _: theta[0] ** 2 + theta[1])
    assert bent.series["value"] == pytest.approx((2, 0, 0), abs=1e-12)


def test_float32_has_the_eigenvalues_of_float64() -> None:
    torch.manual_seed(0)
    module = NormClassifier("mlp", in_shape=(8,), num_classes=3, model_options={"depth": 3, "width": 16})
    x, y = torch.randn(32, 8), torch.arange(32) % 3
    single = measure_hessian(module, x, y)
    double = measure_hessian(module.double(), x.double(), y)
    assert single.values["largest"] == pytest.approx(double.values["largest"], rel=1e-4)
    assert single == measure_hessian(module.float(), x, y)


def test_a_loss_that_is_not_finite_has_no_eigenvalues() -> None:
    model = Point(torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64))
    found = measure_hessian(model, NOTHING, NOTHING, loss=lambda theta, _: theta.square().sum() ** 2)
    assert all(map(math.isnan, (*found.values.values(), *found.series["value"])))


class Once(torch.autograd.Function):
    """A cube whose author did not think of second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def ctc(x: Tensor) -> Tensor:
    """A loss for which torch has no second derivative."""
    return F.ctc_loss(x.view(3, 1, 2).log_softmax(2), torch.ones(1, 1), (3,), (1,))


@pytest.mark.parametrize("function", [Once.apply, ctc])
def test_a_model_without_second_derivatives_is_refused(function: Any) -> None:
    model = Point(torch.ones(6, dtype=torch.float64))
    with pytest.raises(BadInput, match=r"^probe 'hessian': the model cannot be derived twice: [^\n]+$"):
        measure_hessian(model, NOTHING, NOTHING, loss=lambda theta, _: function(theta).square().sum())


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(BadInput, match="probe 'hessian': count must be 1 or more, not 0"):
        Hessian(count=0)
    with pytest.raises(BadInput, match="probe 'hessian': iterations must be count=3 or more, not 2"):
        Hessian(iterations=2)
    model, loss = with_eigenvalues(1.0, 2.0)
    with pytest.raises(BadInput, match="count is 3, but the model learns 2 numbers"):
        measure_hessian(model, NOTHING, NOTHING, loss=loss)


def test_the_callback_measures_what_it_was_asked_for() -> None:
    model, loss = with_eigenvalues(*map(float, range(30)))
    probe = build_probe("hessian", count=2, iterations=5)
    probe.given_loss = loss
    found = probe.measure(model, NOTHING, NOTHING, Moment(step=0, lr=0.1, batch_size=1))
    assert found == measure_hessian(model, NOTHING, NOTHING, count=2, iterations=5, loss=loss)
