"""What a check of a norm is run on: a layer with options, inputs for it, and ways to compare outputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.norms import NORMS, NormEntry, TakesReference

SAMPLES = 8
CHANNELS = 8
SHAPES: Mapping[int, tuple[int, ...]] = {0: (), 1: (5,), 2: (4, 3), 3: (3, 2, 2)}


@dataclass(frozen=True)
class NormCase:
    """A normalization layer with options, as a check sees it; entry is None where no traits are known."""

    layer: Callable[..., nn.Module]
    dims: tuple[int, ...]
    entry: NormEntry | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, dim: int, *, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
        """A fresh layer in training mode; an option in `more` is left out where the layer has none such.

        One that takes a reference batch is given the same one every time.
        """
        known = inspect.signature(self.layer).parameters
        options = {**self.options, **{name: value for name, value in more.items() if name in known}}
        layer = self.layer(CHANNELS, dim, **options).to(dtype).train()
        if isinstance(layer, TakesReference):
            with torch.device("cpu"):
                reference = sample_input(dim, seed=2)
            # Its mean is 0, so that the layer is an odd function.
            layer.set_reference(torch.cat([reference, -reference]).to(torch.get_default_device(), dtype))
        return layer

    def inputs(
        self, *, dtype: torch.dtype = torch.float64, extremes: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """A batch for every dim; with `extremes`, where ranks in between change nothing, least and most."""
        for dim in sorted({self.dims[0], self.dims[-1]}) if extremes else self.dims:
            yield dim, sample_input(dim, dtype=dtype)

    def keeps(self, trait: str) -> bool:
        """Whether the norm promises the trait; False where no traits are known."""
        return self.entry is not None and bool(getattr(self.entry, trait))

    def __str__(self) -> str:
        name = self.entry.name if self.entry else getattr(self.layer, "__name__", "norm")
        return "-".join([name, *(f"{option}={value}" for option, value in self.options.items())])


def norm_cases(
    norm: str | Callable[..., nn.Module], *, dims: tuple[int, ...] = (0, 1, 2, 3), **options: Any
) -> tuple[NormCase, ...]:
    """The cases that the checks take: one for each example of the norm, or one for the given options."""
    entries = [NORMS[norm]] if isinstance(norm, str) else NORMS.values()
    entry = next((entry for entry in entries if norm in (entry.name, entry.layer)), None)
    if entry is None:
        assert not isinstance(norm, str)
        return (NormCase(norm, dims, None, options),)
    dims = tuple(dim for dim in dims if dim >= entry.min_dim)
    examples = (options,) if options else entry.examples
    return tuple(NormCase(entry.layer, dims, entry, example) for example in examples)


def sample_input(
    dim: int, *, samples: int = SAMPLES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """A batch (samples, 8, *) whose channels differ in mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    scale, mean = torch.rand(2, CHANNELS, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, *SHAPES[dim], CHANNELS, generator=generator, dtype=torch.float64)
    batch: Tensor = (x * (scale + 0.5) + mean).movedim(-1, 1).contiguous()
    return batch.to(dtype)


def expect(condition: object, case: NormCase, message: str) -> None:
    """Raise AssertionError unless the condition holds, also under Python's -O."""
    if not condition:
        raise AssertionError(f"{case}: {message}")


def expect_close(got: Tensor, wanted: Tensor, case: NormCase, message: str, tolerance: float = 1e-10) -> None:
    """Raise AssertionError where two tensors differ by more than the tolerance, absolute plus relative."""
    torch.testing.assert_close(
        got, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {message}\n{text}"
    )


def expect_equal_iff(trait: str, first: Tensor, second: Tensor, case: NormCase, message: str) -> None:
    """Raise AssertionError unless the tensors are equal where the norm has the trait, unequal where not."""
    if case.keeps(trait):
        expect_close(second, first, case, f"{message} matters, though {trait} is promised", 1e-6)
    elif case.entry is not None:
        expect(differ(first, second), case, f"{message} does not matter, though {trait} is denied")


def differ(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).detach().abs().max() > 1e-3)


def run(layer: Callable[[Tensor], Tensor], x: Tensor, *, seed: int = 0) -> Tensor:
    """The layer's output with its random draws fixed; its buffers move as ever."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        y: Tensor = layer(x)
        return y


def run_copy(layer: nn.Module, x: Tensor, *, seed: int = 0) -> Tensor:
    """The output of a copy, so that the layer itself stays as it is."""
    return run(copy.deepcopy(layer), x, seed=seed)


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def changed(before: dict[str, Tensor], layer: nn.Module) -> bool:
    return any(not torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
