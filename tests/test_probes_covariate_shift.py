"""The covariate-shift probe: a layer's gradient before and after the layers below it take a step."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from bnbench.models import Slot, build_model
from bnbench.norms import build_norm
from bnbench.norms.reparam import apply_reparam
from bnbench.probes import Moment, build_probe
from bnbench.probes.covariate_shift import measure_covariate_shift
from bnbench.registry import BadInput

OWN = ("difference", "relative", "cosine")
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(12) % 2


def chain(*modules, seed=0):
    """A sequence in float64 with drawn parameters, those of norms among them."""
    model = nn.Sequential(*modules).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch_normalized():
    hidden = (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    return chain(*hidden, nn.Linear(4, 2))


def loss_at(model, parameters, x, y):
    return F.cross_entropy(functional_call(model, parameters, (x,)), y)


def gradients(model, parameters, x, y):
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    return dict(
        zip(leaves, torch.autograd.grad(loss_at(model, leaves, x, y), list(leaves.values())), strict=True)
    )


def by_hand(model, own, below, step, x=X, y=Y):
    """The three measures for one layer, the names of whose parameters and of those below it are given."""
    model = copy.deepcopy(model)
    theta = dict(model.named_parameters())
    g = gradients(model, theta, x, y)
    moved = {name: p - step * g[name] if name in below else p for name, p in theta.items()}
    moved_g = gradients(model, moved, x, y)
    before, after = (torch.cat([found[name].flatten() for name in own]) for found in (g, moved_g))
    difference = (before - after).norm().item()
    cosine = F.cosine_similarity(before, after, dim=0).item()
    return difference, difference / before.norm().item(), cosine


def at_layer(reading, layer, names=OWN):
    place = reading.index.index(layer)
    return tuple(reading.series[name][place] for name in names)


def test_two_linear_layers_under_a_squared_loss_give_what_the_formula_gives():
    model, lr, targets = chain(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)), 0.3, X[:, :2] ** 2
    first, second, x, y = (t.detach().numpy().T for t in (model[0].weight.T, model[1].weight.T, X, targets))

    def gradient(first):
        return (second @ first @ x - y) @ (first @ x).T / 12

    moved = first - lr * second.T @ (second @ first @ x - y) @ x.T / 12
    before, after = (torch.from_numpy(gradient(w)).flatten() for w in (first, moved))
    reading = measure_covariate_shift(
        model, X, targets, lr=lr, loss=lambda output, y: ((output - y) ** 2).sum(1).mean() / 2
    )
    difference = (before - after).norm().item()
    cosine = (before @ after / (before.norm() * after.norm())).item()
    assert reading.index == ("1",)
    assert at_layer(reading, "1") == pytest.approx(
        (difference, difference / before.norm().item(), cosine), rel=1e-12
    )


def test_a_small_step_changes_the_gradient_by_the_hessian_times_the_step():
    model, step = batch_normalized(), 1e-5
    theta = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in theta.values()]

    def loss(flat):
        parts = [part.view(p.shape) for part, p in zip(flat.split(sizes), theta.values(), strict=True)]
        return loss_at(model, dict(zip(theta, parts, strict=True)), X, Y)

    flat = torch.cat([p.flatten() for p in theta.values()])
    hessian, g = torch.autograd.functional.hessian(loss, flat), torch.autograd.functional.jacobian(loss, flat)
    places = dict(zip(theta, torch.arange(len(flat)).split(sizes), strict=True))
    reading = measure_covariate_shift(model, X, Y, lr=step, layers=None)
    assert reading.index == ("3", "6")
    for layer in reading.index:
        own = places[f"{layer}.weight"]
        below = torch.cat([rows for name, rows in places.items() if name.split(".")[0] < layer])
        change = -step * hessian[own][:, below] @ g[below]
        across = change - (change @ g[own]) / (g[own] @ g[own]) * g[own]
        difference, relative, cosine = at_layer(reading, layer)
        assert difference == pytest.approx(change.norm().item(), rel=1e-3)
        assert relative == pytest.approx((change.norm() / g[own].norm()).item(), rel=1e-3)
        assert 1 - cosine == pytest.approx((across.norm() / g[own].norm()).item() ** 2 / 2, rel=1e-3)


def test_both_steps_give_what_a_recomputation_gives():
    model = batch_normalized()
    reading = measure_covariate_shift(model, X, Y, lr=0.2, layers=None, relative_step=0.02)
    theta = dict(model.named_parameters())
    g = gradients(copy.deepcopy(model), theta, X, Y)
    size, slope = (math.sqrt(sum(t.square().sum().item() for t in d.values())) for d in (theta, g))
    for layer, last in (("3", 1), ("6", 4)):
        below = [name for name in theta if int(name.split(".")[0]) <= last]
        expected = by_hand(model, [f"{layer}.weight"], below, 0.2)
        assert at_layer(reading, layer) == pytest.approx(expected, rel=1e-9)
        common = by_hand(model, [f"{layer}.weight"], below, 0.02 * size / slope)
        assert at_layer(reading, layer, [f"{name}_common" for name in OWN]) == pytest.approx(common, rel=1e-9)
    for name in ("relative", "cosine", "relative_common", "cosine_common"):
        assert reading.values[name] == pytest.approx(sum(reading.series[name]) / 2, rel=1e-12)


def test_the_layers_below_a_convolution_are_those_of_a_recomputation():
    model = build_model("cnn", (1, 6, 6), 2, Slot("batch"), channels=4).double()
    x = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reading = measure_covariate_shift(model, x, Y[:10], lr=0.5)
    assert reading.index == ("layers.1.conv", "layers.2.conv", "head")
    below = [name for name, _ in model.named_parameters() if name.startswith(("layers.0", "layers.1"))]
    expected = by_hand(model, ["layers.2.conv.weight"], below, 0.5, x, Y[:10])
    assert at_layer(reading, "layers.2.conv") == pytest.approx(expected, rel=1e-9)


class Residual(nn.Module):
    """Two branches side by side on one map."""

    def __init__(self):
        super().__init__()
        self.stem, self.skip, self.branch, self.head = chain(
            nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        )

    def forward(self, x):
        h = self.stem(x).tanh()
        return self.head((self.skip(h) + self.branch(h)).tanh())


def test_of_two_branches_neither_is_below_the_other():
    model = Residual()
    reading = measure_covariate_shift(model, X, Y, lr=0.5)
    stem = ["stem.weight", "stem.bias"]
    for branch in ("skip", "branch"):
        expected = by_hand(model, [f"{branch}.weight"], stem, 0.5)
        assert at_layer(reading, branch) == pytest.approx(expected, rel=1e-9)
    below = [name for name, _ in model.named_parameters() if not name.startswith("head")]
    assert at_layer(reading, "head") == pytest.approx(by_hand(model, ["head.weight"], below, 0.5), rel=1e-9)


def test_a_weight_that_two_maps_share_is_not_below_itself():
    model = chain(nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[3].weight = model[1].weight
    reading = measure_covariate_shift(model, X, Y, lr=0.5)
    expected = by_hand(model, ["1.weight"], ["0.weight", "0.bias", "1.bias"], 0.5)
    assert at_layer(reading, "3") == pytest.approx(expected, rel=1e-9)


def test_the_weights_of_a_reparametrized_layer_are_the_parameters_that_it_is_computed_from():
    model = batch_normalized()
    for place in (0, 3):
        apply_reparam(model[place], "weight_norm")
    reading = measure_covariate_shift(model, X, Y, lr=0.5)
    own = [f"3.parametrizations.weight.original{i}" for i in (0, 1)]
    below = [name for name, _ in model.named_parameters() if name[0] in "01"]
    assert len(below) == 5
    assert at_layer(reading, "3") == pytest.approx(by_hand(model, own, below, 0.5), rel=1e-9)


def scale_free():
    """A network whose function does not change with the scale of its parameters, all of them together."""
    norm = {"eps": 1e-14, "affine": False}
    maps = [nn.Linear(a, b, bias=False) for a, b in ((3, 6), (6, 6), (6, 2))]
    return chain(
        maps[0], nn.BatchNorm1d(6, **norm), nn.ReLU(), maps[1], nn.BatchNorm1d(6, **norm), nn.ReLU(),
        maps[2], nn.BatchNorm1d(2, **norm),
    )  # fmt: skip


def test_the_scale_of_scale_free_weights_acts_through_the_learning_rate_and_not_on_the_common_step():
    model, c = scale_free(), 7.0
    plain = measure_covariate_shift(model, X, Y, lr=0.4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(c)
    scaled = measure_covariate_shift(model, X, Y, lr=0.4 * c**2)
    unmatched = measure_covariate_shift(model, X, Y, lr=0.4)
    assert plain.values["relative"] > 0.01
    assert scaled.values == pytest.approx(plain.values, rel=1e-8)
    for name in ("difference", "difference_common"):
        assert scaled.series[name] == pytest.approx([d / c for d in plain.series[name]], rel=1e-8)
    assert unmatched.values["relative"] < plain.values["relative"] / 10


class RunningCentre(nn.Module):
    """A norm that reads its running average in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        y = x - self.average
        if self.training:
            self.average.lerp_(x.detach().mean(0), 0.5)
        return y


NOISY = {
    "dropout": lambda: nn.Dropout(0.5),
    "noisy batch normalization": lambda: build_norm("noisy_batch", 6, 0),
    "running average": RunningCentre,
}


@pytest.mark.parametrize("kind", NOISY)
def test_a_step_of_zero_changes_nothing_whatever_is_drawn_or_kept_in_a_pass(kind):
    model = chain(nn.Linear(3, 6), NOISY[kind](), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    reading = measure_covariate_shift(model, X, Y, lr=0.0)
    assert reading.series["difference"] == (0, 0)
    assert reading.values["relative"] == 0 and reading.values["cosine"] == pytest.approx(1, abs=1e-12)
    assert reading.values["relative_common"] > 0


def test_without_a_learning_rate_its_own_step_is_nan_and_the_common_one_is_not():
    reading = measure_covariate_shift(batch_normalized(), X, Y, lr=math.nan)
    assert [name for name, value in reading.values.items() if math.isnan(value)] == ["relative", "cosine"]
    assert all(map(math.isnan, reading.series["difference"]))


def test_without_a_gradient_there_is_no_direction_and_no_common_step():
    values = measure_covariate_shift(batch_normalized(), X, Y, lr=0.1, loss=lambda o, y: 0 * o.sum()).values
    assert all(map(math.isnan, values.values()))


def test_a_gradient_that_overflows_has_no_direction():
    model = chain(nn.Linear(3, 4), nn.Linear(4, 2)).float()
    reading = measure_covariate_shift(model, X.float(), Y, lr=1e38, loss=lambda o, y: o.square().mean())
    assert math.isnan(reading.values["cosine"]) and not math.isfinite(reading.values["relative"])


def test_a_network_of_one_map_has_no_layer_to_measure():
    reading = measure_covariate_shift(chain(nn.Linear(3, 2)), X, Y, lr=0.1)
    assert reading.index == () and all(map(math.isnan, reading.values.values()))


@pytest.mark.parametrize(
    ("layers", "places"),
    [
        (3, [2, 4, 6]),
        (1, [4]),
        (7, [1, 2, 3, 4, 5, 6, 7]),
        (8, range(1, 9)),
        (99, range(1, 9)),
        (None, range(1, 9)),
    ],
)
def test_the_layers_are_evenly_spaced_over_the_depth_and_never_the_first(layers, places):
    model = chain(nn.Linear(3, 3), *[nn.Linear(3, 3) for _ in range(7)], nn.Linear(3, 2))
    reading = measure_covariate_shift(model, X, Y, lr=0.1, layers=layers)
    assert reading.index == tuple(map(str, places))


def test_what_is_frozen_does_not_move_and_is_no_layer_of_the_reading():
    model = chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[4].requires_grad_(False)
    reading = measure_covariate_shift(model, X, Y, lr=0.5)
    assert reading.index == ("2", "5")
    assert at_layer(reading, "2")[0] == 0
    model.requires_grad_(True)
    expected = by_hand(model, ["5.weight"], ["2.weight", "2.bias"], 0.5)
    assert at_layer(reading, "5") == pytest.approx(expected, rel=1e-9)


def test_an_activation_in_place_changes_nothing():
    def reading(inplace):
        model = chain(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=inplace), nn.Linear(4, 2))
        return measure_covariate_shift(model, X, Y, lr=0.5)

    assert reading(True) == reading(False)


def test_the_callback_takes_the_learning_rate_of_the_moment_and_its_own_options():
    model = batch_normalized()
    probe = build_probe("covariate_shift", layers=1, relative_step=0.1)
    reading = probe.measure(model, X, Y, Moment(5, 0.25, 12))
    expected = measure_covariate_shift(model, X, Y, lr=0.25, layers=1, relative_step=0.1)
    assert reading == expected and len(reading.index) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layers": 0}, "layers must be 1 or more, or None for all, not 0"),
        ({"relative_step": 0.0}, "relative_step must be a positive number, not 0.0"),
        ({"relative_step": math.inf}, "relative_step must be a positive number, not inf"),
        ({"relative_step": math.nan}, "relative_step must be a positive number, not nan"),
    ],
)
def test_a_wrong_option_is_refused_at_construction_and_by_the_function(options, why):
    with pytest.raises(BadInput, match=f"^probe 'covariate_shift': {why}$"):
        build_probe("covariate_shift", **options)
    with pytest.raises(BadInput, match=f"^probe 'covariate_shift': {why}$"):
        measure_covariate_shift(batch_normalized(), X, Y, lr=0.1, **options)
