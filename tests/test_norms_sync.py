"""Synchronized batch norm over two real processes, against one process on the joined batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from bnbench.norms import build_norm, recalibrate

SHARES = (5, 2)
SHAPES = {0: (), 2: (4, 3)}


def joined_batch(dim, offset=0.0):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(sum(SHARES), 4, *SHAPES[dim], generator=generator, dtype=torch.float64) * 2 + offset


def loss_of(y, start):
    """A loss that is the sum of its samples' losses, each weighted by its place in the joined batch."""
    weights = torch.arange(start + 1, start + len(y) + 1, dtype=y.dtype)
    return (y.sin() * weights.view(-1, *(1,) * (y.ndim - 1))).sum()


def train_twice(layer, x, start):
    """Outputs, gradients and second derivatives of two steps, then the buffers."""
    results = {}
    for step in range(2):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (gradient,) = torch.autograd.grad(loss_of(y, start), leaf, create_graph=True, retain_graph=True)
        loss_of(gradient, start).backward(retain_graph=True)
        second = leaf.grad.clone()
        layer.zero_grad()
        loss_of(y, start).backward()
        results[f"output {step}"], results[f"gradient {step}"] = y.detach(), gradient.detach()
        results[f"second derivative {step}"] = second
    results["parameters"] = {name: value.grad for name, value in layer.named_parameters()}
    results["buffers"] = dict(layer.named_buffers())
    return results


def layer_of(dim, momentum, name):
    layer = build_norm(name, 4, dim, momentum=momentum).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 4))
        layer.bias.copy_(torch.linspace(-1, 1, 4))
    return layer


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 4), build_norm("batch", 4, 0), nn.ReLU(), nn.BatchNorm1d(4)
        ).double()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARES))
    try:
        start = sum(SHARES[:rank])
        results = {}
        for dim in SHAPES:
            for momentum in (0.1, None):
                x = joined_batch(dim)[start : start + SHARES[rank]]
                results[dim, momentum] = train_twice(layer_of(dim, momentum, "sync_batch"), x, start)
        far = joined_batch(0, offset=1e4)[start : start + SHARES[rank]].float()
        results["far"] = build_norm("sync_batch", 4, 0)(far).detach()
        low = joined_batch(0)[start : start + SHARES[rank]].bfloat16()
        results["low"] = build_norm("sync_batch", 4, 0)(low).detach()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = joined_batch(0)[start : start + SHARES[rank]].float()
            results["autocast"] = build_norm("sync_batch", 4, 0)(mixed).detach()
        lonely = build_norm("sync_batch", 4, 0).double()
        everyone = joined_batch(0)
        results["empty share"] = (
            lonely(everyone if rank == 0 else everyone[:0]).detach(),
            dict(lonely.named_buffers()),
        )
        model = network()
        recalibrate(model, joined_batch(0)[start : start + SHARES[rank]].split(3))
        results["recalibrated"] = dict(model.named_buffers())
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=len(SHARES))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(SHARES))]


def assert_close(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_uneven_shares_equal_the_joined_batch(shares, dim, momentum):
    wanted = train_twice(layer_of(dim, momentum, "batch"), joined_batch(dim), 0)
    got = [share[dim, momentum] for share in shares]
    for kind in ("output", "gradient", "second derivative"):
        for step in range(2):
            key = f"{kind} {step}"
            assert_close(torch.cat([share[key] for share in got]), wanted[key])
    for name, gradient in wanted["parameters"].items():
        assert_close(sum(share["parameters"][name] for share in got), gradient)
    for share in got:
        assert_close(share["buffers"], wanted["buffers"])


def test_a_large_mean_does_not_cancel(shares):
    x = joined_batch(0, offset=1e4).float()
    wanted = build_norm("batch", 4, 0).double()(x.double())
    torch_error = (build_norm("batch", 4, 0)(x) - wanted).abs().max()
    error = (torch.cat([share["far"] for share in shares]) - wanted).abs().max()
    assert error <= 4 * torch_error


def test_bfloat16_inputs_have_float32_statistics(shares):
    wanted = build_norm("batch", 4, 0).double()(joined_batch(0).bfloat16().double())
    got = torch.cat([share["low"] for share in shares])
    assert got.dtype == torch.bfloat16
    assert_close(got.double(), wanted, 2.0**-7)


def test_statistics_stay_in_single_precision_under_autocast(shares):
    wanted = build_norm("batch", 4, 0)(joined_batch(0).float())
    assert_close(torch.cat([share["autocast"] for share in shares]), wanted, 1e-5)


def test_an_empty_share_weighs_nothing(shares):
    layer = build_norm("batch", 4, 0).double()
    wanted = layer(joined_batch(0))
    assert_close(shares[0]["empty share"][0], wanted)
    assert shares[1]["empty share"][0].shape == (0, 4)
    for share in shares:
        assert_close(share["empty share"][1], dict(layer.named_buffers()))


def test_recalibration_sums_over_processes(shares):
    model = network()
    batches = [batch for share in joined_batch(0).split(SHARES) for batch in share.split(3)]
    recalibrate(model, batches)
    for share in shares:
        assert_close(share["recalibrated"], dict(model.named_buffers()))
