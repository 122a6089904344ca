"""Two probes of bnbench on a LightningModule that knows nothing of bnbench.

    python examples/probes_on_your_module.py

Gradient flow asks how the gradient grows from layer to layer on the way back, the train–eval gap how far the
network with running statistics, as it is evaluated, is from the one with batch statistics, as it is trained.
The training itself is to the bit the one without probes.
"""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnbench.probes import EvalGap, GradientFlow, Trace


class Classifier(L.LightningModule):
    """Any module of yours, whose `forward` gives one tensor and whose batches are pairs (x, y)."""

    def __init__(self, depth: int = 6, channels: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in [1] + [channels] * (depth - 1):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Train for 60 steps with two probes, and print what they read."""
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(x, torch.tensor(digits.target))
    flow, gap = GradientFlow(every=20), EvalGap(steps=[1, 20, 60])
    trainer = L.Trainer(
        max_steps=60,
        accelerator="cpu",
        callbacks=[flow, gap],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
    print_values("gradient flow", flow.trace)
    print_layers("gradient norm by layer", flow.trace, "gradient")
    print_values("train–eval gap", gap.trace)


def print_values(title: str, trace: Trace) -> None:
    """Print the single numbers of a trace, one line each, over the steps."""
    print(f"\n{title + ', after step':<32}" + "".join(f"{step:>10}" for step in trace.steps))
    for name, numbers in trace.values.items():
        print(f"  {name:<30}" + "".join(f"{number:>10.4g}" for number in numbers))


def print_layers(title: str, trace: Trace, series: str) -> None:
    """Print one series of a trace, a line for each layer, over the steps."""
    print(f"\n{title:<32}" + "".join(f"{step:>10}" for step in trace.steps))
    for layer, numbers in zip(trace.index, zip(*trace.series[series], strict=True), strict=True):
        print(f"  {layer:<30}" + "".join(f"{number:>10.4g}" for number in numbers))


if __name__ == "__main__":
    main()
