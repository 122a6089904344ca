"""Hessian: the largest eigenvalues of the second derivative of a batch's loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import Loss, leaving_no_trace, loss_of, norm_of, run, train_mode, weights_of
from bnbench.probes.trace import Reading
from bnbench.registry import BadInput

Product = Callable[[Tensor], Tensor]

NOT_TWICE = "probe 'hessian': the model cannot be derived twice"


@leaving_no_trace
def measure_hessian(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    count: int = 3,
    iterations: int = 20,
    loss: Loss | None = None,
) -> Reading:
    """The largest eigenvalues of the Hessian of the batch's loss, by Lanczos' method.

    H = ∂²L/∂θ², for the mean loss L of the batch in training mode and θ all n learned parameters. Where a
    norm uses batch statistics, the derivatives go through them too. With V (m × n) an orthonormal basis of
    span{v, Hv, …, H^(m−1) v} for a fixed random v and m = iterations (at most n), the eigenvalues of V H Vᵀ
    approach those of H from inside, the outermost first: `largest` is at most the true λ_max, `smallest` at
    least the true λ_min.

    `residual` is ‖Hu − largest·u‖ for the unit vector u found: H has an eigenvalue within this distance, so
    a small one says that enough iterations were made. `scaled` is largest · ‖θ‖², which is the same for θ
    and cθ where the loss is. All four are NaN where a derivative is not finite. The basis takes the memory of
    m copies of θ.

    Series by eigenvalue, 1 … count: `value`, from the largest down, and `residual`, of each. Raises BadInput
    for numbers that cannot be, for fewer than count learned numbers, and for a model that cannot be derived
    twice.
    Source: Lanczos 1950; Pearlmutter 1994 for products with H; Ghorbani et al. 2019 (arXiv:1901.10159) for
    both on the loss of networks.
    """
    _check(count, iterations)
    train_mode(model)
    weights = weights_of(model)
    learned = sum(weight.numel() for weight in weights)
    if learned < count:
        raise BadInput(
            f"probe 'hessian': count is {count}, but the model learns {learned} numbers; ask for fewer"
        )
    product = _product_with_hessian(loss_of(model, loss)(run(model, x), y), weights)
    basis, projected = _project(product, weights, min(iterations, learned))
    if not projected.isfinite().all():
        nothing = (math.nan,) * count
        return _reading(nothing, nothing, math.nan, math.nan)
    found, vectors = torch.linalg.eigh(projected)
    values = found.flip(0)[:count].tolist()
    tops = vectors.flip(1)[:, :count].T.to(basis) @ basis
    residuals = [norm_of([product(top) - value * top]) for top, value in zip(tops, values, strict=True)]
    return _reading(values, residuals, found[0].item(), norm_of(weights))


def _reading(values: Sequence[float], residuals: Sequence[float], smallest: float, size: float) -> Reading:
    return Reading(
        {
            "largest": values[0],
            "smallest": smallest,
            "residual": residuals[0],
            "scaled": values[0] * size**2,
        },
        {"value": tuple(values), "residual": tuple(residuals)},
        "eigenvalue",
        tuple(range(1, len(values) + 1)),
    )


def _product_with_hessian(loss: Tensor, weights: list[nn.Parameter]) -> Product:
    """The function v ↦ Hv for vectors of all weights, one after the other (n)."""
    gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    # A gradient that depends on no weight has a zero row in H.
    places = [place for place, gradient in enumerate(gradients) if gradient.requires_grad]
    curved = [gradients[place] for place in places]
    _check_derivable(curved)

    def product(vector: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(vector)
        parts = torch.split(vector, [weight.numel() for weight in weights])
        along = [parts[place].view_as(weights[place]).to(weights[place]) for place in places]
        try:
            rows = torch.autograd.grad(curved, weights, along, retain_graph=True, materialize_grads=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why, *_ = str(error).split("\n")
            raise BadInput(f"{NOT_TWICE}: {why}") from error
        return torch.cat([row.reshape(-1) for row in rows])

    return product


def _check_derivable(gradients: list[Tensor]) -> None:
    """Raise BadInput where a gradient comes from a function that is marked once_differentiable.

    Asked for the derivatives of some tensors only, autograd takes such a gradient for a constant.
    """
    waiting: list[Any] = [gradient.grad_fn for gradient in gradients]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise BadInput(f"{NOT_TWICE}: one of its autograd functions is marked once_differentiable")
        waiting.extend(below for below, _ in node.next_functions)


def _project(product: Product, weights: list[nn.Parameter], size: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis V (size × n) by Lanczos' recursion, and V H Vᵀ in float64 on the processor."""
    like = torch.cat([weight.detach().reshape(-1) for weight in weights])
    draws = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(len(like), generator=draws, dtype=torch.float64).to(like)

    basis = like.new_empty(size, len(like))
    projected = torch.zeros(size, size, dtype=torch.float64)
    next_one, largest = draw(), 0.0
    for row in range(size):
        basis[row] = next_one / next_one.norm()
        image = product(basis[row])
        projected[row, row] = basis[row] @ image
        # In exact arithmetic only the last two rows are in the way; in floating point all come back.
        next_one = _without(image, basis[: row + 1])
        coupling = next_one.norm().item()
        largest = max(largest, coupling, abs(projected[row, row].item()))
        if coupling <= 10 * torch.finfo(like.dtype).eps * largest:
            # H maps what is spanned so far into itself: go on in the rest, for the eigenvalues left there.
            next_one, coupling = _without(draw(), basis[: row + 1]), 0.0
        if row + 1 < size:
            projected[row, row + 1] = projected[row + 1, row] = coupling
    return basis, projected


def _without(vector: Tensor, basis: Tensor) -> Tensor:
    """What of a vector is orthogonal to the rows of a basis; once more for what rounding left of them."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def _check(count: int, iterations: int) -> None:
    if count < 1:
        raise BadInput(f"probe 'hessian': count must be 1 or more, not {count!r}")
    if iterations < count:
        raise BadInput(f"probe 'hessian': iterations must be count={count} or more, not {iterations!r}")


@probe("hessian", passes=85, paper="arXiv:1901.10159")
class Hessian(Probe):
    """The largest eigenvalues of the Hessian of the loss; see :func:`measure_hessian`."""

    def __init__(self, *, count: int = 3, iterations: int = 20, **schedule: Any) -> None:
        _check(count, iterations)
        super().__init__(**schedule)
        self.count = count
        self.iterations = iterations

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_hessian(
            model, x, y, count=self.count, iterations=self.iterations, loss=self.given_loss
        )
