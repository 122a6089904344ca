"""Collectives on the module's device: one process plays a rank of two, on tensors without values."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from bnbench.engine.distributed import Group
from bnbench.norms import build_norm, recalibrate
from tests.pretended_devices import DeviceFault, Pretended, Watch, guard_for_cuda, take_steps

on_each_kind = pytest.mark.parametrize("kind", ["meta", "cuda"])


@pytest.fixture(autouse=True)
def rank_of_two():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with guard_for_cuda():
            yield
    finally:
        dist.destroy_process_group()


@on_each_kind
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2)], ids=str)
def test_synchronized_norm_communicates_on_the_device(shape, momentum, kind):
    device = Pretended(kind)
    layer = device.module(build_norm("sync_batch", 4, len(shape) - 2, momentum=momentum))
    x = device.tensor(torch.zeros(shape)).requires_grad_()
    with device.watched() as watch:
        y = layer(x)
        if kind == "meta":
            torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert (y.device.type, y.shape) == (kind, x.shape)
    assert set(watch.collectives) == {"c10d::allreduce_"}


@on_each_kind
def test_precise_statistics_are_summed_on_the_device(kind, monkeypatch):
    if kind == "cuda":
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    device = Pretended(kind)
    model = device.module(nn.Sequential(nn.Linear(4, 6), build_norm("batch", 6, 0), nn.BatchNorm1d(6)))
    batches = [device.tensor(torch.zeros(size, 4)) for size in (5, 3)]
    with device.watched() as watch:
        recalibrate(model, batches)
    assert watch.collectives == ["c10d::allreduce_"] * 6


@on_each_kind
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("norm", ["batch", "sync_batch"])
def test_a_step_in_a_group_communicates_on_the_device(norm, rank, kind):
    module = take_steps(Pretended(kind), norm=norm, group=Group(rank, 2), clip_norm=1.0)
    assert set(module.collectives) == {"c10d::allreduce_"}


# The watch itself: a collective on a tensor of the host is noticed, by whichever function.

COLLECTIVES = {
    "all_reduce": lambda x: dist.all_reduce(x),
    "all_reduce, not waited for": lambda x: dist.all_reduce(x, async_op=True),
    "broadcast": lambda x: dist.broadcast(x, 0),
    "reduce": lambda x: dist.reduce(x, 0),
    "all_gather": lambda x: dist.all_gather([x.clone(), x.clone()], x),
    "all_gather_into_tensor": lambda x: dist.all_gather_into_tensor(torch.cat([x, x]), x),
    "reduce_scatter_tensor": lambda x: dist.reduce_scatter_tensor(x, torch.cat([x, x])),
    "reduce_scatter": lambda x: dist.reduce_scatter(x, [x.clone(), x.clone()]),
    "gather": lambda x: dist.gather(x, [x.clone(), x.clone()]),
    "scatter": lambda x: dist.scatter(x, [x.clone(), x.clone()]),
    "all_to_all": lambda x: dist.all_to_all([x.clone(), x.clone()], [x, x]),
    "all_to_all_single": lambda x: dist.all_to_all_single(x.clone(), x),
    "send": lambda x: dist.send(x, 1),
    "recv": lambda x: dist.recv(x, 1),
}


# Their new names do not exist in the oldest torch that we take.
@pytest.mark.filterwarnings("ignore:.*(all_gather_into|reduce_scatter)_tensor` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_off_the_device_is_noticed(name):
    communicate = COLLECTIVES[name]
    communicate(torch.zeros(4))
    with Watch("cpu") as watch:
        communicate(torch.zeros(4))
    assert len(watch.collectives) == 1
    for kind, off in (("cuda", torch.zeros(4)), ("cpu", torch.zeros(4, device="meta"))):
        with Watch(kind), pytest.raises(DeviceFault, match=f"of tensors on .*, not {kind}"):
            communicate(off)


@on_each_kind
def test_a_norm_that_sums_on_the_host_is_noticed(kind):
    class SumsOnHost(nn.Module):
        def forward(self, x):
            count = torch.ones(1)
            dist.all_reduce(count)
            return x

    device = Pretended(kind)
    x = device.tensor(torch.zeros(5, 4))
    with (
        device.watched(),
        pytest.raises(DeviceFault, match=f"c10d::allreduce_ of tensors on cpu, not {kind}"),
    ):
        SumsOnHost()(x)
