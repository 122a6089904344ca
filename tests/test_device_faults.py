"""Every norm, model and training step without values: what would wait for a GPU, or fail on one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from bnbench.data import Arrays, eval_batches
from bnbench.data.augment import AUGMENTATIONS
from bnbench.engine.evaluate import logits_of
from bnbench.models import MODELS, ORDERS, Slot, build_model
from bnbench.norms import NORMS, REPARAMS, KeepsMoments, recalibrate
from bnbench.testing import norm_cases
from bnbench.testing.norm_modules import check_norm_without_host
from tests.pretended_devices import (
    DeviceFault,
    Pretended,
    guard_for_cuda,
    take_fleet_steps,
    take_steps,
)

on_each_kind = pytest.mark.parametrize("kind", ["meta", "cuda"])
IMAGES = torch.zeros(8, 3, 8, 8)
SIZES = {"mlp": {"width": 16}, "cnn": {"channels": 8}}
# Code and layers of resnet8 and vgg11, more of them.
DEEPER = {f"resnet{depth}" for depth in (20, 32, 44, 56, 110)} | {f"vgg{depth}" for depth in (13, 16, 19)}
EXAMPLES_OF = {name: NORMS[name].examples[0] for name in NORMS}


@pytest.fixture(autouse=True)
def guard():
    with guard_for_cuda():
        yield


def differentiate_twice(y: torch.Tensor, *leaves: torch.Tensor) -> None:
    gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True, allow_unused=True)
    torch.autograd.grad(sum(g.square().sum() for g in gradients if g is not None), leaves, allow_unused=True)


@on_each_kind
@pytest.mark.parametrize("case", [case for name in NORMS for case in norm_cases(name)], ids=str)
def test_a_norm_needs_no_value_and_nothing_of_the_host(case, kind):
    device = Pretended(kind)
    for (dim, x), dtype in itertools.product(case.inputs(), (torch.float32, torch.bfloat16)):
        layer, x = device.module(case.build(dim, dtype=dtype)), device.tensor(x.to(dtype)).requires_grad_()
        for training in (True, False):
            with device.watched():
                y = layer.train(training)(x)
                if kind == "meta" and dtype == torch.float32:
                    differentiate_twice(y, x, *layer.parameters())
            assert (y.device.type, y.shape, y.dtype) == (kind, x.shape, dtype)


@on_each_kind
@pytest.mark.parametrize("name", [name for name in NORMS if NORMS[name].running_stats])
def test_moments_are_gathered_and_set_on_the_device(name, kind):
    device = Pretended(kind)
    layer = device.module(next(iter(norm_cases(name))).build(2))
    assert isinstance(layer, KeepsMoments)
    x = device.tensor(torch.zeros(8, 8, 4, 4))
    with device.watched():
        moments = layer.batch_moments(x)
        layer.set_moments(*moments)
    assert {moment.device.type for moment in moments} == {kind}


def build(model: str, slot: Slot, **options: object) -> nn.Module:
    return build_model(model, IMAGES.shape[1:], 4, slot, **SIZES.get(model, {"width": 8}), **options)


def run_model(kind: str, model: nn.Module) -> None:
    device = Pretended(kind)
    model, x = device.module(model), device.tensor(IMAGES)
    for training in (True, False):
        with device.watched():
            y = model.train(training)(x)
            if kind == "meta":
                torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)
        assert (y.device.type, y.shape) == (kind, (8, 4))


@on_each_kind
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("norm", NORMS)
def test_small_models_run_with_every_norm(model, norm, kind):
    if model == "mlp" and NORMS[norm].min_dim > 0:
        pytest.skip(f"{norm} takes no vectors, which are all that an MLP has")
    run_model(kind, build(model, Slot(norm, EXAMPLES_OF[norm])))


@pytest.mark.parametrize("norm", NORMS)
def test_residual_nets_run_with_every_norm(norm):
    run_model("meta", build("resnet8", Slot(norm, EXAMPLES_OF[norm])))


@on_each_kind
@pytest.mark.parametrize("model", sorted(set(MODELS) - {*SIZES, *DEEPER}))
def test_every_model_runs(model, kind):
    run_model(kind, build(model, Slot()))


@on_each_kind
@pytest.mark.parametrize(("order", "shortcut"), [*zip(ORDERS, "BABA", strict=True)])
def test_every_order_and_shortcut_runs(order, shortcut, kind):
    slot = Slot(order=order, dropout=0.1, dropout_at="before-norm", activation="gelu")
    run_model(kind, build("resnet8", slot, shortcut=shortcut))


@on_each_kind
@pytest.mark.parametrize("reparam", REPARAMS)
def test_every_reparametrization_runs(reparam, kind):
    run_model(kind, build("cnn", Slot("group", reparam=reparam)))


STEPS = {
    **{f"augment {name}": {"augment": name} for name in AUGMENTATIONS},
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 0.01},
    "weight decay on norms": {"weight_decay": 0.01, "decay_norm": True},
    "clipping": {"clip_norm": 0.5},
    "label smoothing": {"label_smoothing": 0.1},
    "warm-up": {"schedule": "trapezoid", "warmup": 0.5},
    "dropout": {"dropout": 0.5},
    "weight norm": {"reparam": "weight_norm"},
    "momentum None": {"norm_options": {"momentum": None}},
    "unused parameters": {"norm": "none", "order": "act-norm"},
    "all": {
        "model": "resnet8",
        "model_options": {"width": 8},
        "augment": "crop-flip-cutout",
        "weight_decay": 0.01,
        "clip_norm": 0.5,
        "label_smoothing": 0.1,
        "dropout": 0.1,
        "reparam": "weight_standardization",
    },
}


@on_each_kind
@pytest.mark.parametrize("name", [*STEPS, "plain update"])
def test_a_training_step_waits_for_nothing(name, kind, monkeypatch):
    if name == "plain update":
        monkeypatch.delattr(torch, "_fused_sgd_")
    module = take_steps(Pretended(kind), **STEPS.get(name, {"weight_decay": 0.01}))
    state = module.optimizer_state
    assert {value.device.type for value in itertools.chain(*state.buffers, state.parameters)} == {kind}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "ghost_batch", "norm_options": {"ghost_size": 2}},
        {"dropout": 0.5},
        {"augment": "crop-flip"},
        {"clip_norm": 1.0},
    ],
    ids=str,
)
def test_a_step_of_a_fleet_waits_for_nothing(changes):
    losses = take_fleet_steps(Pretended("meta"), **changes)
    assert [(loss.device.type, loss.shape) for loss in losses] == [("meta", (3,))] * 2


@on_each_kind
def test_evaluation_gathers_its_logits_on_the_device(kind):
    device = Pretended(kind)
    model = device.module(build("cnn", Slot()))
    arrays = Arrays(device.tensor(torch.zeros(1030, 3, 8, 8)), device.tensor(torch.zeros(1030)))
    with device.watched():
        logits = logits_of(model, arrays)
    assert (logits.device.type, logits.shape) == (kind, (1030, 4))
    assert [len(y) for _, y in eval_batches(arrays, 1024)] == [1024, 6]


def test_precise_statistics_need_no_value():
    device = Pretended("meta")
    model = device.module(build("resnet8", Slot()))
    batches = [device.tensor(IMAGES), device.tensor(IMAGES[:3])]
    with device.watched():
        recalibrate(model, batches)


# The watches themselves: each fault below is one that a CPU does not notice.


class Layer(nn.Module):
    """An honest layer for the faults below to spoil; `held` is a tensor that `module.to` does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("average", torch.zeros(8))
        self.held = torch.zeros(8)

    def forward(self, x):
        return x * self.weight + self.average


FAULTS = {
    "a buffer made on the host": lambda layer, x: x + torch.zeros(8),
    "a scalar tensor made on the host": lambda layer, x: x * torch.tensor(2.0),
    "a tensor that is no buffer": lambda layer, x: x + layer.held,
    "a tensor that is no buffer, written": lambda layer, x: layer.held.copy_(x[0]),
    "statistics on the host": lambda layer, x: nn.functional.batch_norm(
        x, torch.zeros(8), torch.ones(8), training=True
    ),
    "item": lambda layer, x: x / x.abs().max().item(),
    "tolist": lambda layer, x: x[0].tolist(),
    "numpy": lambda layer, x: x.detach().numpy(),
    "cpu": lambda layer, x: x.cpu(),
    "float": lambda layer, x: x * float(x.mean()),
    "int": lambda layer, x: x[: int(x.argmax())],
    "if": lambda layer, x: x if x.sum() else -x,
    "max of two": lambda layer, x: max(x[0, 0], x[0, 1]),
    "equal": lambda layer, x: torch.equal(x, layer.weight),
    "allclose": lambda layer, x: torch.allclose(x[0], layer.weight),
    "indices on the host": lambda layer, x: x[torch.arange(2)],
    "indices on the host, selected": lambda layer, x: x.index_select(0, torch.arange(2)),
    "a list as indices": lambda layer, x: x[[0, 1]],
    "written by indices on the host": lambda layer, x: x.index_put((torch.arange(2),), x[:2]),
    "a mask": lambda layer, x: x[x > 0],
    "a mask written": lambda layer, x: x.index_put((x > 0,), x.flatten()),
    "masked_select": lambda layer, x: x.masked_select(x > 0),
    "nonzero": lambda layer, x: x.nonzero(),
    "where of one": lambda layer, x: torch.where(x > 0),
    "unique": lambda layer, x: x.unique(),
    "bincount": lambda layer, x: x[0].long().bincount(),
    "repeats on the device": lambda layer, x: x.repeat_interleave(x[:, 0].long(), 0),
    "a value sent": lambda layer, x: x * torch.tensor(2.0, device=x.device),
    "a draw sent": lambda layer, x: x + torch.rand(8).to(x.device),
    "a draw copied": lambda layer, x: layer.average.copy_(torch.rand(8)),
    "host and device joined": lambda layer, x: torch.cat([x, torch.zeros(8, 8)]),
}


# Copies inside torch's own functions that are none on "meta", where there is no value to copy.
NOT_ON_META = ("a value sent", "a list as indices")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(fault, "meta") for fault in FAULTS if fault not in NOT_ON_META] + [(fault, "cuda") for fault in FAULTS],
)
def test_a_fault_is_noticed(fault, kind):
    FAULTS[fault](Layer(), torch.ones(8, 8))  # a CPU notices nothing
    device = Pretended(kind)
    layer, x = device.module(Layer()), device.tensor(torch.ones(8, 8))
    with device.watched():
        layer(x)
        with pytest.raises((DeviceFault, RuntimeError, TypeError)):
            FAULTS[fault](layer, x)


@on_each_kind
def test_what_waits_for_nothing_is_let_pass(kind):
    device = Pretended(kind)
    layer, x = device.module(Layer()), device.tensor(torch.ones(8, 8))
    with device.watched():
        sent = torch.rand(8).to(x.device, non_blocking=True)
        layer.average.copy_(torch.rand(8), non_blocking=True)
        made = torch.full((8,), 2.0, device=x.device) + x.new_zeros(8)
        taken = x[torch.arange(2, device=x.device)] * 2.0 + sent + made
        y = torch.where(taken > 0, taken, 0.0).masked_fill(taken > 1, 1.0).to(torch.bfloat16)
    assert y.device.type == kind


class FetchesBackward(torch.autograd.Function):
    """The identity, whose derivative asks the host."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.abs().max().sign().item()


class MixesBackward(FetchesBackward):
    """The identity, whose derivative takes a tensor of the host."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones(8)


@pytest.mark.parametrize(("spoiled", "words"), [(FetchesBackward, "item"), (MixesBackward, "cpu and meta")])
def test_a_fault_in_the_backward_pass_is_noticed(spoiled, words):
    device = Pretended("meta")
    x = device.tensor(torch.ones(8)).requires_grad_()
    with device.watched(), pytest.raises((DeviceFault, RuntimeError), match=words):
        torch.autograd.grad(spoiled.apply(x).sum(), x)


def test_the_shipped_contract_notices_a_fault_in_the_backward_pass():
    class Fetches(nn.Module):
        def __init__(self, num_features, dim=2):
            super().__init__()

        def forward(self, x):
            return FetchesBackward.apply(x)

    (case,) = norm_cases(Fetches)
    for name in NORMS:
        check_norm_without_host(norm_cases(name)[0])
    with pytest.raises(RuntimeError, match="item"):
        check_norm_without_host(case)


@on_each_kind
def test_a_fault_in_a_step_is_noticed(kind, monkeypatch):
    monkeypatch.setitem(
        AUGMENTATIONS, "flip", lambda x, generator: x + torch.rand(1, generator=generator).to(x.device)
    )
    with pytest.raises(DeviceFault, match=f"to {kind} blocks"):
        take_steps(Pretended(kind), augment="flip")
