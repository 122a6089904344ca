"""Frozen statistics: no buffer moves in a fit, whatever train() says, and everything can be undone."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnbench.models import Slot, build_model
from bnbench.norms import NORMS, build_norm, freeze_norm, norm_names, recalibrate, unfreeze_norm
from bnbench.registry import BadInput
from tests.test_engine_chunked import QUIET

KEEPING = norm_names(running_stats=True)
OPTIONS = {"ghost_batch": {"ghost_size": 4}}


def batches(samples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 6, 6, generator=generator) * 2 + 1


def network(name="torch"):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8) if name == "torch" else build_norm(name, 8, **OPTIONS.get(name, {}))
        head = [nn.Flatten(), nn.Linear(8 * 4 * 4, 4), nn.BatchNorm1d(4)]
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), *head)
    for seed in range(3):
        model(batches(seed=seed)).square().sum().backward()
    model.zero_grad()
    return model


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Fit(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("learn_affine", [True, False])
def test_buffers_are_bitwise_equal_after_a_fit_and_scales_learn_if_asked(learn_affine):
    model = network()
    assert freeze_norm(model, learn_affine=learn_affine) == ("1", "5")
    before, parameters = buffers(model), copy.deepcopy(dict(model.named_parameters()))
    trainer = L.Trainer(**{**QUIET, "max_steps": 4})
    trainer.fit(Fit(model.train()), DataLoader(TensorDataset(batches(32)), batch_size=8))
    assert trainer.global_step == 4
    assert_same(buffers(model), before)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, parameters[name])}
    norms = {"1.weight", "1.bias", "5.weight", "5.bias"}
    assert {name for name in parameters if name not in norms} <= moved
    assert (norms <= moved) if learn_affine else not (norms & moved)


@pytest.mark.parametrize("name", KEEPING)
def test_every_norm_with_running_statistics_stands_still_in_training(name):
    model = network(name)
    assert "1" in freeze_norm(model)
    before, x = buffers(model), batches(seed=9)
    wanted = model.eval()(x)
    model.train()
    output = model(x)
    output.square().sum().backward()
    assert torch.equal(output, wanted)
    assert_same(buffers(model), before)
    # No sample depends on another.
    torch.testing.assert_close(model.train()(x[:1]), wanted[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "batch", "batch_channel", "batch_renorm"])
def test_unfreezing_gives_back_what_was(name):
    model = network(name)
    model[1].weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    for learn_affine in (True, False, False):
        freeze_norm(model, learn_affine=learn_affine)
    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert unfreeze_norm(model) == ("1", "5") and unfreeze_norm(model) == ()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    x = batches(seed=9)
    assert torch.equal(model.train()(x), twin.train()(x))
    assert_same(buffers(model), buffers(twin))
    assert vars(model[1]).keys() == vars(twin[1]).keys()


def test_copies_are_frozen_and_the_state_dict_is_as_before():
    model = network()
    keys = list(model.state_dict())
    freeze_norm(model)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = buffers(twin)
        twin.train()(batches(seed=5))
        assert_same(buffers(twin), before)
        assert unfreeze_norm(twin) == ("1", "5")
        twin.train()(batches(seed=5))
        assert not torch.equal(twin[1].running_mean, before["1.running_mean"])
    # The original is frozen still.
    before = buffers(model)
    model.train()(batches(seed=5))
    assert_same(buffers(model), before)


@pytest.mark.parametrize("name", ["torch", "batch", "batch_renorm"])
def test_recalibration_leaves_frozen_statistics_as_they_are(name):
    model = network(name)
    freeze_norm(model)
    before = buffers(model)
    recalibrate(model, [batches(seed=7)])
    assert_same(buffers(model), before)
    unfreeze_norm(model)
    recalibrate(model, [batches(seed=7)])
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm with dropout and an activation inside."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_of_a_fused_norm_the_statistics_alone_are_frozen():
    layer = BatchNormAct2d(3)
    freeze_norm(nn.Sequential(layer), learn_affine=False)
    before = buffers(layer)
    torch.manual_seed(0)
    outputs = [layer.train()(batches()) for _ in range(2)]
    assert not torch.equal(*outputs)  # dropout goes on
    assert_same(buffers(layer), before)
    assert layer.act.weight.requires_grad and not layer.weight.requires_grad


def test_a_fit_of_our_own_model_under_the_compiler_moves_no_buffer():
    model = build_model("mlp", (1, 4, 4), 3, Slot(norm="batch"), depth=3, width=8)
    frozen = freeze_norm(model)
    assert frozen and all(NORMS["batch"].layer is type(model.get_submodule(path)) for path in frozen)
    before, x = buffers(model), torch.randn(8, 1, 4, 4)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        model.train()
        torch.testing.assert_close(compiled(x), copy.deepcopy(model).eval()(x))
    assert_same(buffers(model), before)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm2d(3, track_running_stats=False), "1 keeps no running statistics"),
        (nn.LazyBatchNorm2d(), "1 has no shape yet"),
    ],
)
def test_what_cannot_be_frozen_is_refused_and_nothing_is(layer, words):
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    with pytest.raises(BadInput, match=words):
        freeze_norm(model)
    assert unfreeze_norm(model) == ()


def test_a_model_without_statistics_has_nothing_to_freeze():
    assert freeze_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2))) == ()
