"""Tests of the known step: its numbers, and that wrong ones are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnbench.engine.known_step import TOLERANCE, bf16_fault, difference, join, take_step
from bnbench.norms import build_norm
from tests.pretended_tasks import (
    joined_batch,
    local_shares,
)
from tests.test_doctor import gpu_machine as gpu_machine


def test_the_known_step_is_that_of_the_formulas() -> None:
    step = take_step(dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(32, 16, 8, 8, generator=draw)).double().requires_grad_()
    w = torch.randn(x.shape, generator=draw).double()
    scale, shift = torch.linspace(0.5, 2, 16).double(), torch.linspace(-1, 1, 16).double()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    by_channel = (1, -1, 1, 1)
    z = (x - mean.view(by_channel)) / (var + 1e-5).sqrt().view(by_channel)
    y = scale.view(by_channel) * z + shift.view(by_channel)
    (gradient,) = torch.autograd.grad((w * y.sin()).sum(), x)
    slope = w * y.cos()
    kept_mean, kept_var = 0.1 * mean, 0.9 + 0.1 * x.var((0, 2, 3))
    evaluated = (x - kept_mean.view(by_channel)) / (kept_var + 1e-5).sqrt().view(by_channel)
    wanted = {
        "output": y,
        "gradient of the input": gradient,
        "gradient of the scale": (slope * z).sum((0, 2, 3)),
        "gradient of the shift": slope.sum((0, 2, 3)),
        "running mean": kept_mean,
        "running variance": kept_var,
        "output of evaluation": scale.view(by_channel) * evaluated + shift.view(by_channel),
    }
    assert step.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(step[name], values.detach().numpy(), rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_float32_step_is_far_within_the_tolerance() -> None:
    assert difference(take_step(), take_step(dtype=torch.float64))[0] < TOLERANCE / 20


@pytest.mark.parametrize("name", list(take_step()))
@pytest.mark.parametrize("wrong", [1.001, np.nan, np.inf])
def test_a_wrong_tensor_is_named(name: str, wrong: float) -> None:
    right = take_step(dtype=torch.float64)
    apart, found = difference({**right, name: right[name] * wrong}, right)
    assert found == name
    assert not apart <= TOLERANCE


def test_statistics_of_each_share_alone_are_found_out() -> None:
    wanted = take_step(dtype=torch.float64)
    assert all(difference(joined, wanted)[0] < TOLERANCE for joined in join(joined_batch()))
    assert all(difference(joined, wanted)[0] > 100 * TOLERANCE for joined in join(local_shares()))


class SumsInBfloat16(nn.Module):
    """Float32 statistics that were summed in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(16))
        self.register_buffer("running_var", torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.zeros(16, dtype=torch.bfloat16)
        for row in x.detach():
            mean = mean + row / len(x)
        self.running_mean = mean.float()
        return x - mean


class Overflows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().pow(100).bfloat16()


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (None, ""),
        (build_norm("batch", 16, 0, momentum=1.0).bfloat16(), "running_mean is torch.bfloat16"),
        (SumsInBfloat16(), "running_mean is not that of the activations"),
        (Overflows(), "not finite"),
    ],
)
def test_faults_under_bfloat16_are_found(layer: nn.Module | None, said: str) -> None:
    fault = bf16_fault("cpu", layer)
    assert said in fault
    assert bool(fault) == bool(said)
