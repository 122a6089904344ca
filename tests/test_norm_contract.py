"""The contract itself: a norm that breaks a promise fails the check of that promise."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnbench.norms import NORMS
from bnbench.testing import NormCase, check_norm, norm_cases, norm_checks

REAL_KERNELS = """
import sys
from bnbench.testing import norm_cases
from bnbench.testing.norm_modules import compare_compiled

for case in norm_cases(sys.argv[1])[:1]:
    compare_compiled(case, "inductor", modes=(True, False))
"""
CHECKS = {check.__name__.removeprefix("check_norm_"): check for check in norm_checks()}


class Instance(nn.Module):
    """An honest norm for the mutants below to spoil: instance norm by one kernel, with a running count."""

    def __init__(self, num_features, dim=2, *, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps

    def forward(self, x):
        return F.group_norm(x, self.num_features, eps=self.eps)


class ChangesInput(Instance):
    def forward(self, x):
        return super().forward(x.mul_(1.0 + 1e-6))


class Transposes(Instance):
    def forward(self, x):
        return super().forward(x).transpose(-1, -2)


class ForgetsMemoryFormat(Instance):
    def forward(self, x):
        return super().forward(x).contiguous()


class LowPrecisionStatistics(Instance):
    def forward(self, x):
        dims = tuple(range(2, x.ndim))
        mean = x.mean(dims, keepdim=True)
        return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + self.eps).sqrt()


class Cancels(Instance):
    def forward(self, x):
        dims = tuple(range(2, x.ndim))
        mean, square = x.mean(dims, keepdim=True), x.square().mean(dims, keepdim=True)
        return (x - mean) / ((square - mean.square()).clamp_min(0) + self.eps).sqrt()


class AsksHost(Instance):
    def forward(self, x):
        return super().forward(x) * (1.0 if x.abs().max() > 0 else 0.0)


class Rebinds(Instance):
    """Rebinds its buffer, so that replicas under vmap lose their own."""

    def __init__(self, num_features, dim=2, *, eps=1e-5):
        super().__init__(num_features, dim, eps=eps)
        self.register_buffer("steps", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.steps = self.steps + x.mean()
        return super().forward(x)


class NotEps(Instance):
    def forward(self, x):
        dims = tuple(range(2, x.ndim))
        return (x - x.mean(dims, keepdim=True)) / x.var(dims, correction=0, keepdim=True).sqrt()


class UsesBesselsCorrection(Instance):
    def forward(self, x):
        dims = tuple(range(2, x.ndim))
        return (x - x.mean(dims, keepdim=True)) / (x.var(dims, keepdim=True) + self.eps).sqrt()


class DetachesStatistics(Instance):
    def forward(self, x):
        dims = tuple(range(2, x.ndim))
        var, mean = torch.var_mean(x.detach(), dims, correction=0, keepdim=True)
        return (x - mean) / (var + self.eps).sqrt()


class Rectifies(Instance):
    def forward(self, x):
        return super().forward(x).relu()


class Random(Instance):
    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * torch.rand_like(x))


class SeesBatch(Instance):
    def forward(self, x):
        return super().forward(x) + x.mean(0, keepdim=True) - x.mean()


class OrdersSamples(Instance):
    def forward(self, x):
        return super().forward(x) * torch.arange(1, len(x) + 1, dtype=x.dtype).view(-1, *(1,) * (x.ndim - 1))


class Hides(Instance):
    """Keeps state where neither state_dict nor buffers see it."""

    seen = 0.0

    def forward(self, x):
        if self.training:
            self.seen = self.seen + 1.0
        return super().forward(x) * (1 + self.seen)


class CountsPasses(Instance):
    """Trains otherwise after passes that do not train."""

    passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x) * (self.passes if self.training else 1.0)


class BreaksGraph(Instance):
    def forward(self, x):
        return super().forward(x) * float(x.detach().sum() != 0.5)


class DiffersCompiled(Instance):
    def forward(self, x):
        return super().forward(x) * (2 if torch.compiler.is_compiling() else 1)


class DiffersExported(Instance):
    def forward(self, x):
        return super().forward(x) * (2 if torch.compiler.is_exporting() else 1)


class KnowsBatchSize(Instance):
    """Asks for the number of samples, so that no exported program takes another."""

    def forward(self, x):
        y = super().forward(x)
        return y if len(x) == 8 else y * 1.0


class IgnoresCompiledBuffers(Instance):
    """Counts its steps only where it is not compiled."""

    def __init__(self, num_features, dim=2, *, eps=1e-5):
        super().__init__(num_features, dim, eps=eps)
        self.register_buffer("steps", torch.tensor(0.0, dtype=torch.float64))

    def forward(self, x):
        if self.training and not torch.compiler.is_compiling():
            self.steps.add_(1)
        return super().forward(x)


class Thaws(Instance):
    """Says that it can be frozen, and learns on."""

    frozen = False

    def __init__(self, num_features, dim=2, *, eps=1e-5):
        super().__init__(num_features, dim, eps=eps)
        self.register_buffer("steps", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.steps.add_(1)
        return super().forward(x)


class Moments(Instance):
    """Claims population statistics that are wrong by a factor."""

    def __init__(self, num_features, dim=2, *, eps=1e-5):
        super().__init__(num_features, dim, eps=eps)
        self.register_buffer("running_rms", torch.ones(num_features))

    def forward(self, x):
        dims = (0, *range(2, x.ndim))
        square = x.square().mean(dims) if self.training else self.running_rms.square()
        return x / (square + self.eps).sqrt().view(1, -1, *(1,) * (x.ndim - 2))

    def batch_moments(self, x):
        return (x.double().square().mean((0, *range(2, x.ndim))),)

    def set_moments(self, *means):
        self.running_rms.copy_(2 * means[0].sqrt())


ENTRY = dataclasses.replace(NORMS["instance"], name="mutant", layer=Instance)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_honest_norm_passes(check):
    check(NormCase(Instance, (1, 2, 3), dataclasses.replace(ENTRY, min_dim=0)))


@pytest.mark.parametrize(
    ("layer", "failed"),
    [
        (ChangesInput, "shape"),
        (Transposes, "shape"),
        (ForgetsMemoryFormat, "memory_format"),
        (LowPrecisionStatistics, "low_precision"),
        (Cancels, "large_offset"),
        (AsksHost, "without_host"),
        (AsksHost, "vmap"),
        (Rebinds, "vmap"),
        (Rebinds, "running_stats"),
        (NotEps, "degenerate"),
        (UsesBesselsCorrection, "reference"),
        (DetachesStatistics, "gradient"),
        (Rectifies, "activation"),
        (Random, "evaluation"),
        (SeesBatch, "evaluation"),
        (SeesBatch, "batch_dependence"),
        (SeesBatch, "single_sample"),
        (SeesBatch, "invariances"),
        (OrdersSamples, "invariances"),
        (Hides, "copies"),
        (CountsPasses, "frozen_steps"),
        (Thaws, "frozen_steps"),
        (BreaksGraph, "compile"),
        (DiffersCompiled, "compile"),
        (IgnoresCompiledBuffers, "compile"),
        (DiffersExported, "export"),
        (KnowsBatchSize, "export"),
        (Moments, "moments"),
    ],
)
def test_a_broken_norm_fails(layer, failed):
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[failed](NormCase(layer, (1, 2, 3), dataclasses.replace(ENTRY, layer=layer, min_dim=0)))


@pytest.mark.parametrize(
    ("trait", "value", "failed"),
    [
        ("batch_dependent", True, "batch_dependence"),
        ("running_stats", True, "running_stats"),
        ("replaces_activation", True, "activation"),
        ("scale_invariant", False, "invariances"),
        ("centres", False, "invariances"),
        ("permutation_equivariant", False, "invariances"),
    ],
)
def test_a_trait_that_is_wrong_fails(trait, value, failed):
    with pytest.raises(AssertionError, match="mutant: "):
        CHECKS[failed](NormCase(Instance, (1, 2, 3), dataclasses.replace(ENTRY, **{trait: value})))


def test_a_dim_that_should_be_refused_and_is_not_fails():
    entry = dataclasses.replace(NORMS["batch"], min_dim=1)
    with pytest.raises(AssertionError, match="dim=0 was not refused"):
        CHECKS["dims"](NormCase(entry.layer, (1,), entry))


def test_an_option_that_the_text_leaves_out_fails():
    with pytest.raises(AssertionError, match=r"eps=0\.5 is not in"):
        CHECKS["text"](NormCase(Instance, (1,), None, {"eps": 0.5}))


def test_check_norm_takes_names_layers_and_options():
    check_norm("layer", dims=(0, 2), over="channels")
    check_norm(Instance, dims=(1, 2))
    with pytest.raises(AssertionError):
        check_norm(Transposes, dims=(2,))


def test_a_case_for_each_example_and_only_dims_that_the_norm_takes():
    assert len(norm_cases("batch")) == len(NORMS["batch"].examples)
    assert [case.dims for case in norm_cases("instance")] == [(1, 2, 3)]
    assert norm_cases(NORMS["batch"].layer) == norm_cases("batch")
    assert [str(case) for case in norm_cases("ghost_batch", ghost_size=2)] == ["ghost_batch-ghost_size=2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NORMS if name != "noisy_batch"])
def test_real_kernels_compute_what_the_layer_computes(name):
    # In a process of its own, since inductor looks for a GPU.
    done = subprocess.run([sys.executable, "-c", REAL_KERNELS, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
