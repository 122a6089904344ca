"""A batch-norm step whose numbers are known, by which devices are compared with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from bnbench.engine.ranks import run_ranks
from bnbench.norms import build_norm
from bnbench.placement import device_here

Step = Mapping[str, NDArray[np.float64]]

SAMPLES, CHANNELS, SIDE = 32, 16, 8
#: How the samples are dealt to two processes: unevenly, so that a mean of means is found out.
SHARES = (20, 12)
#: The largest difference that rounding explains, as a share of a tensor's largest value. Float32 is within
#: 1e-6 of float64 here.
TOLERANCE = 1e-4
#: Seconds that a process waits for the others.
PATIENCE = 60


def take_step(
    norm: str = "batch",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    share: slice = slice(None),
) -> Step:
    """One step of batch normalization on a fixed input, of which this process gets a share of the samples.

    x (32 × 16 × 8 × 8) has the mean 3 and the standard deviation 2; γ and β differ from channel to channel.
    The loss is Σ w sin(y) with fixed weights w. Returns the output, the gradients, the running statistics
    and the output of evaluation, in float64.
    """
    draw = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(SAMPLES, CHANNELS, SIDE, SIDE, generator=draw)
    weights = torch.randn(x.shape, generator=draw)
    layer: Any = build_norm(norm, CHANNELS, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        layer.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    layer.to(device, dtype)
    leaf = x[share].to(device, dtype).requires_grad_()
    y = layer(leaf)
    (y.sin() * weights[share].to(device, dtype)).sum().backward()
    tensors = {
        "output": y,
        "gradient of the input": leaf.grad,
        "gradient of the scale": layer.weight.grad,
        "gradient of the shift": layer.bias.grad,
        "running mean": layer.running_mean,
        "running variance": layer.running_var,
        "output of evaluation": layer.eval()(leaf),
    }
    return {name: tensor.detach().cpu().double().numpy() for name, tensor in tensors.items()}


def step_here() -> Step:
    """The step in float32 on the device of this worker."""
    return take_step(device=device_here())


def sync_here() -> list[Step]:
    """The shares of two processes in the step of synchronized batch norm, on the devices of this worker."""
    device = device_here()
    return run_ranks(_shares, {"kind": device}, len(SHARES), device=device, timeout=PATIENCE)


def _shares(kind: str) -> list[Step]:
    """The shares of all processes of the group, as one of them gets to know them."""
    rank = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    start = sum(SHARES[:rank])
    own = take_step("sync_batch", device, share=slice(start, start + SHARES[rank]))
    shares: list[Any] = [None] * len(SHARES)
    dist.all_gather_object(shares, own)
    return shares


def join(shares: Sequence[Step]) -> list[Step]:
    """The joined batch's step as each process sees it: samples one after the other, parameters summed."""

    def joined(name: str, of: Step) -> NDArray[np.float64]:
        if of[name].ndim > 1:
            return np.concatenate([share[name] for share in shares])
        if name.startswith("gradient"):
            return np.sum([share[name] for share in shares], axis=0)  # type: ignore[no-any-return]
        return of[name]

    return [{name: joined(name, of) for name in of} for of in shares]


def difference(got: Step, wanted: Step) -> tuple[float, str]:
    """The largest difference as a share of its tensor's largest value, and which tensor; NaN is infinite."""
    shares = {
        name: float(np.abs(got[name] - values).max() / np.abs(values).max())
        for name, values in wanted.items()
    }
    worst = max(shares, key=lambda name: np.nan_to_num(shares[name], nan=np.inf))
    return float(np.nan_to_num(shares[worst], nan=np.inf)), worst


def bf16_fault(device: str, layer: nn.Module | None = None) -> str:
    """What is wrong with a training step under bfloat16 autocast; an empty text where nothing is.

    A linear map is to give bfloat16, and the batch norm behind it float32 statistics, with finite numbers
    throughout. The activations' mean is twenty times their deviation, where statistics summed in bfloat16
    go wrong.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, CHANNELS, generator=draw).to(device)
    linear = nn.Linear(CHANNELS, CHANNELS)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(CHANNELS))
        linear.bias.fill_(20)
    norm: Any = layer or build_norm("batch", CHANNELS, 0, momentum=1.0)
    linear.to(device)
    norm.to(device)
    with torch.autocast(device, torch.bfloat16):
        hidden = linear(x)
        loss = norm(hidden).float().sin().square().mean()
    loss.backward()
    if hidden.dtype != torch.bfloat16:
        return f"autocast gives {hidden.dtype}"
    gradients = [parameter.grad for module in (linear, norm) for parameter in module.parameters()]
    if not all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients)):
        return "loss or gradients are not finite"
    for name, wanted in (("running_mean", hidden.double().mean(0)), ("running_var", hidden.double().var(0))):
        found = getattr(norm, name)
        if found.dtype != torch.float32:
            return f"{name} is {found.dtype}"
        if not bool(((found - wanted).abs() <= 1e-3 * wanted.abs().max()).all()):
            return f"{name} is not that of the activations"
    return ""


def bf16_fault_here() -> str:
    """What is wrong with bfloat16 on the device of this worker."""
    return bf16_fault(device_here())
