"""Every registered norm: its error, and its time forward and backward against torch's batch normalization.

`python -m benchmarks.norms [FILE]` prints what was measured as a Markdown table, a norm a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rounds import ROUNDS, Spent, as_times, speedups, take_turns, timed
from benchmarks.table import Line
from bnbench.norms import NORMS, TakesReference, build_norm
from bnbench.testing import norm_cases
from bnbench.testing.norm_case import run

SHAPE = (128, 64, 32, 32)
TORCH = "torch.nn.BatchNorm2d"
#: How many times as long as torch's a compiled norm may take.
GOAL = 2.0
#: These call one kernel of torch, whose time is torch's.
NATIVE = ("batch", "group", "instance", "layer", "rms")


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


def max_error(name: str) -> float:
    """The largest error of a fresh float32 layer in training, on 8 samples of 8 channels of every rank.

    That is the distance from the float64 formula, with each example of options; where a norm has no formula,
    from the layer itself in float64.
    """
    reference, errors = NORMS[name].reference, []
    for case in norm_cases(name):
        for dim, x in case.inputs():
            got = run(case.build(dim, dtype=torch.float32), x.float())
            # The float32 input exactly, so that only the layer rounds.
            wide = x.float().double()
            wanted = run(case.build(dim), wide) if reference is None else reference(wide, **case.options)
            errors.append((got - wanted).abs().max().item())
    return max(errors)


def measure(
    names: Sequence[str] = (),
    shape: tuple[int, int, int, int] = SHAPE,
    rounds: int = ROUNDS,
    calls: int = 1,
    compile_layer: Callable[..., Any] = torch.compile,
) -> Iterator[Line]:
    """Every norm but "none": its error, then eager and compiled how many times as long as torch's it takes.

    Compiled layers are compared with torch's compiled layer. The line of the error says whether the norm
    trains in fleets and what its error is against.
    """
    names = names or [name for name in NORMS if name != "none"]
    torch.set_num_threads(1)
    for name in names:
        against = "its own float64" if NORMS[name].reference is None else "the float64 formula"
        told = {"in fleets": NORMS[name].vmap, "against": against}
        yield Line(f"norm {name}, float32, largest error", (max_error(name),), unit="", times=told)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kinds: dict[str, Callable[[nn.Module], Any]] = {"eager": lambda layer: layer, "compiled": compile_layer}
    for kind, make in kinds.items():
        contenders: dict[str, Callable[[], Spent]] = {}
        layers = {TORCH: nn.BatchNorm2d(shape[1])}
        layers |= {name: layer_of(name, x.detach()) for name in names}
        for name, layer in layers.items():
            call, parameters = make(layer), [p for p in layer.parameters() if p.requires_grad]
            contenders[name] = lambda c=call, p=parameters: timed(lambda: both_ways(c, p, x), calls)
            contenders[name]()
        turns = take_turns(contenders, rounds)
        for name in names:
            # As long as torch's: the inverse of how fast.
            wall, processor = speedups(turns, TORCH, than=name)
            most = GOAL if kind == "compiled" and name not in NATIVE else None
            times = {"both ways": as_times({TORCH: turns[TORCH], name: turns[name]})}
            yield Line(f"norm {name}, {kind}, time to torch's", wall, processor, most=most, times=times)


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines of this part, as the file of `make bench` has them, as a table with a norm a line."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        if line["name"].startswith("norm "):
            name, kind, _ = line["name"].removeprefix("norm ").split(", ")
            found.setdefault(name, {})[kind] = line
    rows = [
        "| Norm | largest float32 error | eager | compiled | in fleets |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, kinds in sorted(found.items()):
        told = kinds["float32"]["times"]
        mark = "" if told["against"] == "the float64 formula" else " *"
        error = f"{kinds['float32']['median']:.1e}{mark}"
        eager, compiled = (f"{kinds[kind]['median']:.2f}" for kind in ("eager", "compiled"))
        rows.append(f"| {name} | {error} | {eager} | {compiled} | {'yes' if told['in fleets'] else 'no'} |")
    return "\n".join(rows)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "build/bench.json")
    print(markdown(json.loads(path.read_text())["lines"]))
