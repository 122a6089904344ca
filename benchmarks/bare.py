"""The loop that a good user of bare PyTorch writes, with the data in memory: what a step is measured against.

    x, y = torch.randn(1000, 1, 8, 8), torch.randint(10, (1000,))
    BareLoop(model, x, y).run(steps=600)

On a GPU it is tuned: bf16 autocast, channels_last, the fused optimizer, and no synchronization in a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rounds import Spent, now


class BareLoop:
    """SGD with momentum on shuffled batches of tensors; a second call of `run` goes on with the training."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        batch_size: int = 64,
        lr: float = 0.1,
        device: str = "cpu",
    ) -> None:
        self.model, self.x, self.y = model.to(device), x.to(device), y.to(device)
        self.on_gpu = device == "cuda"
        if self.on_gpu and x.ndim == 4:
            self.model.to(memory_format=torch.channels_last)
            self.x = self.x.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=lr, momentum=0.9, fused=True if self.on_gpu else None
        )
        self.batches = self._shuffled(batch_size)

    def _shuffled(self, size: int) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.y), device=self.y.device)
            yield from order.split(size)[: len(self.y) // size]

    def run(self, steps: int) -> Spent:
        """Train for so many steps; what each of them spends."""
        self._wait()
        began = now()
        for _, index in zip(range(steps), self.batches, strict=False):
            x, y = self.x[index], self.y[index]
            with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
                loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self._wait()
        return (now() - began) / steps

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
