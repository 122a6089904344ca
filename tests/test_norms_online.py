"""Online normalization against its equations in NumPy, sample by sample."""

import copy

import numpy as np
import pytest
import torch

from bnbench.norms import build_norm, normalization_batch_size
from bnbench.registry import BadInput
from tests.own_backward import check_compiled_steps, check_replicas

SHAPES = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}
CHANNELS = 4


def batch_of(dim, seed, samples=7):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5
    x = torch.randn(samples, *SHAPES[dim], CHANNELS, generator=generator, dtype=torch.float64) * scale + 0.3
    return x.movedim(-1, 1).contiguous()


def layer_of(dim, **options):
    options = {"momentum": 0.2, "backward_momentum": 0.3, "eps": 0.01, **options}
    layer = build_norm("online", CHANNELS, dim, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.5, 2.0, 1.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, -1.0, 2.0]))
    return layer


class Equations:
    """The forward and the backward pass of one sample after the other, as arrays (C, positions)."""

    def __init__(self, gamma, beta, share, backward_share, eps):
        self.gamma, self.beta, self.eps = gamma[:, None], beta[:, None], eps
        self.share, self.backward_share = share, backward_share
        self.mean, self.var = np.zeros(CHANNELS), np.ones(CHANNELS)
        self.scale_error, self.mean_error = np.zeros(CHANNELS), np.zeros(CHANNELS)

    def forward(self, x):
        self.saved, outputs = [], []
        for sample in x:
            deviation = np.sqrt(self.var + self.eps)
            normal = (sample - self.mean[:, None]) / deviation[:, None]
            y = self.gamma * normal + self.beta
            self.saved.append((normal, deviation, y))
            own, kept = sample.mean(1), 1 - self.share
            self.var = (
                kept * self.var + self.share * sample.var(1) + kept * self.share * (own - self.mean) ** 2
            )
            self.mean = kept * self.mean + self.share * own
            outputs.append(y)
        return np.stack(outputs)

    def backward(self, dy):
        gradients, dgamma, dbeta = [], 0, 0
        for g, (normal, deviation, _) in zip(dy, self.saved, strict=True):
            dgamma, dbeta = dgamma + (g * normal).sum(1), dbeta + g.sum(1)
            g = g * self.gamma
            g = g - self.backward_share * self.scale_error[:, None] * normal
            self.scale_error = self.scale_error + (g * normal).mean(1)
            dx = g / deviation[:, None] - self.backward_share * self.mean_error[:, None]
            self.mean_error = self.mean_error + dx.mean(1)
            gradients.append(dx)
        return np.stack(gradients), dgamma, dbeta


def flat(tensor):
    return np.asarray(tensor.detach()).reshape(len(tensor), CHANNELS, -1)


@pytest.mark.parametrize("dim", SHAPES)
def test_four_batches_are_the_equations_sample_by_sample(dim):
    layer = layer_of(dim, layer_scaling=False)
    values = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    equations = Equations(*values, 0.2, 0.3, 0.01)
    for step, samples in enumerate((7, 1, 2, 12)):
        x, g = batch_of(dim, step, samples), batch_of(dim, 10 + step, samples)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        dx, dgamma, dbeta = torch.autograd.grad(y, [leaf, *layer.parameters()], g)
        np.testing.assert_allclose(flat(y), equations.forward(flat(x)), rtol=1e-11, atol=1e-12)
        wanted = equations.backward(flat(g))
        for got, right in zip((flat(dx), dgamma.numpy(), dbeta.numpy()), wanted, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-11, atol=1e-12)
        for buffer, state in (
            (layer.running_mean, equations.mean),
            (layer.running_var, equations.var),
            (layer.control_scale, equations.scale_error),
            (layer.control_mean, equations.mean_error),
        ):
            np.testing.assert_allclose(buffer.numpy(), state, rtol=1e-11, atol=1e-13)


def test_layer_scaling_divides_each_sample_and_its_gradient_is_exact():
    plain, scaled = layer_of(2, layer_scaling=False), layer_of(2)
    x, g = batch_of(2, 0), batch_of(2, 1)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = plain(first)
    rms = (y.square().sum((1, 2, 3), keepdim=True) / y[0].numel() + 0.01).sqrt()
    z = scaled(second)
    torch.testing.assert_close(z, y / rms)
    wanted = torch.autograd.grad(y / rms, [first, *plain.parameters()], g)
    got = torch.autograd.grad(z, [second, *scaled.parameters()], g)
    torch.testing.assert_close(got, wanted)


def test_a_batch_is_nothing_but_its_samples():
    x, g = batch_of(1, 0), batch_of(1, 1)
    whole, parts = layer_of(1), layer_of(1)
    leaf, pieces = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = whole(leaf)
    (dx,) = torch.autograd.grad(y, leaf, g)
    outputs, gradients = [], []
    for sample, gradient in zip(pieces.split(1), g.split(1), strict=True):
        outputs.append(parts(sample))
        gradients.append(torch.autograd.grad(outputs[-1], sample, gradient)[0])
    torch.testing.assert_close(torch.cat(outputs), y)
    torch.testing.assert_close(torch.cat(gradients), dx)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), buffer)


def test_in_the_long_run_gradients_are_orthogonal_to_the_output_and_to_one():
    layer = build_norm(
        "online", CHANNELS, 0, affine=False, layer_scaling=False, backward_momentum=0.01
    ).double()
    along, sums = [], []
    for step in range(60):
        x = batch_of(0, step, samples=64)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        # A gradient with a mean and with a part along x; batch normalization would remove both.
        (dx,) = torch.autograd.grad(y, leaf, batch_of(0, 500 + step, samples=64) + 0.5 * x)
        if step >= 30:
            along.append((dx * y.detach()).mean(0))
            sums.append(dx.mean(0))
    assert float(torch.stack(along).mean(0).abs().max()) < 0.05
    assert float(torch.stack(sums).mean(0).abs().max()) < 0.05


def test_evaluation_takes_the_averages_and_moves_nothing():
    layer = layer_of(2)
    layer(batch_of(2, 0))
    before, x, shape = copy.deepcopy(layer.state_dict()), batch_of(2, 2), (1, -1, 1, 1)
    mean, var, gamma, beta = (
        values.view(shape) for values in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    y = gamma * (x - mean) / (var + 0.01).sqrt() + beta
    wanted = y / (y.square().mean((1, 2, 3), keepdim=True) + 0.01).sqrt()
    torch.testing.assert_close(layer.eval()(x), wanted)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_sample_sees_those_before_it_and_none_after():
    x = batch_of(0, 0)
    y, changed = layer_of(0)(x), x.clone()
    changed[3] += 1
    other = layer_of(0)(changed)
    assert torch.equal(other[:3], y[:3])
    assert ((other[4:] - y[4:]).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("dim", [0, 2])
def test_replicas_under_vmap_train_as_alone(dim):
    layers = [layer_of(dim) for _ in range(3)]
    check_replicas(layers, lambda seed: batch_of(dim, seed), steps=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_the_same_steps():
    layer, twin = (layer_of(2) for _ in range(2))
    check_compiled_steps(layer, twin, lambda seed: batch_of(2, seed))


@pytest.mark.parametrize("option", ["momentum", "backward_momentum"])
def test_a_momentum_that_is_none_is_refused(option):
    with pytest.raises(BadInput, match=f"^norm 'online': {option} must be a number from 0 to 1, not 2.0"):
        build_norm("online", 4, **{option: 2.0})


def test_no_batch_is_too_small():
    assert normalization_batch_size("online", 1) is None
