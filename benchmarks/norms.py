"""The time of every registered norm, forward and backward, against torch's own batch normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rounds import ROUNDS, Spent, as_times, speedups, take_turns, timed
from benchmarks.table import Line
from bnbench.norms import NORMS, TakesReference, build_norm

SHAPE = (128, 64, 32, 32)
TORCH = "torch.nn.BatchNorm2d"


def layer_of(name: str, x: Tensor) -> nn.Module:
    """A norm with its own defaults; a reference batch is a quarter of x."""
    layer = build_norm(name, x.shape[1], 2)
    if isinstance(layer, TakesReference):
        layer.set_reference(x[: max(2, len(x) // 4)])
    return layer


def both_ways(layer: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor) -> None:
    """Once forward and once backward."""
    y = layer(x)
    torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))


def measure(
    names: Sequence[str] = (),
    shape: tuple[int, int, int, int] = SHAPE,
    rounds: int = ROUNDS,
    calls: int = 1,
    compile_layer: Callable[..., Any] = torch.compile,
) -> Iterator[Line]:
    """Every norm but "none", eager and compiled; a line says how many times as long as torch's it takes.

    Compiled layers are compared with torch's compiled layer.
    """
    torch.set_num_threads(1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kinds: dict[str, Callable[[nn.Module], Any]] = {"eager": lambda layer: layer, "compiled": compile_layer}
    for kind, make in kinds.items():
        contenders: dict[str, Callable[[], Spent]] = {}
        layers = {TORCH: nn.BatchNorm2d(shape[1])}
        layers |= {name: layer_of(name, x.detach()) for name in names or NORMS if name != "none"}
        for name, layer in layers.items():
            call, parameters = make(layer), [p for p in layer.parameters() if p.requires_grad]
            contenders[name] = lambda c=call, p=parameters: timed(lambda: both_ways(c, p, x), calls)
            contenders[name]()
        turns = take_turns(contenders, rounds)
        for name in (name for name in turns if name != TORCH):
            # As long as torch's: the inverse of how fast.
            wall, processor = speedups(turns, TORCH, than=name)
            times = {"both ways": as_times({TORCH: turns[TORCH], name: turns[name]})}
            yield Line(f"norm {name}, {kind}, time to torch's", wall, processor, times=times)
