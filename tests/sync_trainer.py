"""A training that torchrun starts: synchronized batch norm under DDP, each rank with its share of a batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnbench.norms import build_norm

SHARES = (7, 2)
STEPS = 5


def joined_batch(step: int) -> tuple[Tensor, Tensor]:
    """A batch of all ranks, whose channels differ in mean and scale."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(SHARES), 3, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (sum(SHARES),), generator=generator)
    return x * torch.tensor([[1.0], [10.0], [0.1]]) + torch.tensor([[5.0], [0.0], [-50.0]]), y


def network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        norm(3), nn.Conv1d(3, 6, 3), norm(6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)
    ).double()


def fit(model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], scale: float) -> list[Tensor]:
    """Train by plain SGD on `scale` times the sum of the samples' losses; return the logits of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    outputs = []
    for step in range(STEPS):
        x, y = batches(step)
        logits = model(x)
        optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(logits, y, reduction="sum")).backward()
        optimizer.step()
        outputs.append(logits.detach())
    return outputs


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size == len(SHARES) == int(os.environ["WORLD_SIZE"])
    model = network(lambda channels: build_norm("sync_batch", channels, 1))
    parallel = nn.parallel.DistributedDataParallel(model)

    def share(step: int) -> tuple[Tensor, Tensor]:
        x, y = joined_batch(step)
        return x.split(SHARES)[rank], y.split(SHARES)[rank]

    # DDP averages gradients over the ranks, so a rank's loss has world_size times its weight in the sum.
    outputs = fit(parallel, share, world_size / sum(SHARES))
    torch.save({"outputs": outputs, "state": model.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
