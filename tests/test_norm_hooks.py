"""Tests of hooks: what a norm offers is known by its methods, whatever it inherits from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bnbench.norms import NORMS, FollowsProgress, KeepsMoments, TakesReference, build_norm, recalibrate

HOOKS = {
    KeepsMoments: ("batch_moments", "set_moments"),
    FollowsProgress: ("set_progress",),
    TakesReference: ("set_reference",),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_offered_by_those_norms_that_have_its_methods(hook: type) -> None:
    layers = [build_norm(name, 8, 2, **entry.examples[0]) for name, entry in NORMS.items()]
    offered = [layer for layer in layers if isinstance(layer, hook)]
    assert offered == [
        layer for layer in layers if all(callable(getattr(layer, m, None)) for m in HOOKS[hook])
    ]
    assert 0 < len(offered) < len(layers)


class Stranger(nn.Module):
    """A layer of someone who has never heard of the hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.get_buffer("mean")

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.double().mean(),)

    def set_moments(self, *means: Tensor) -> None:
        self.get_buffer("mean").copy_(means[0])


class Half(nn.Identity):
    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("nobody may ask a layer that cannot take the answer")


class Heir(nn.Identity, FollowsProgress):
    def set_progress(self, fraction: float) -> None:
        self.fraction = fraction


def test_a_layer_with_all_methods_is_recalibrated_and_one_with_half_of_them_is_not() -> None:
    model = nn.Sequential(Half(), Stranger())
    batches = [torch.full((3, 2), 1.0), torch.full((1, 2), 5.0)]
    recalibrate(model, batches)
    assert model[1].get_buffer("mean").item() == 2.0  # (3 · 1 + 1 · 5) / 4


def test_a_layer_may_inherit_a_hook_and_is_none_itself() -> None:
    assert isinstance(Heir(), FollowsProgress)
    assert not isinstance(Heir(), KeepsMoments)
    assert not isinstance(Stranger(), Heir)
    assert not isinstance(nn.Identity(), FollowsProgress)
