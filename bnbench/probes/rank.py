"""Rank: in how many directions the representations of different examples differ, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.passes import Layer, leaving_no_trace, run_and_watch, train_mode
from bnbench.probes.trace import Reading
from bnbench.registry import BadInput


@leaving_no_trace
def measure_rank(model: nn.Module, x: Tensor, y: Tensor, *, examples: int = 64) -> Reading:
    """How far the representations of examples are from collapsing onto one direction, over depth.

    A representation H (examples, width) is what a linear map or convolution reads beyond the first, that is
    what norm and activation have made of the layer below; a map that reads the same as one before it is left
    out, and a model of one map is judged by its input. H has the first `examples` rows of the batch, in
    training mode with the statistics of all of it, not centred. Maps of channels are averaged over positions:
    so each example is one row, a width is a number of channels, and this is also what a classifier with
    average pooling reads. In float64, with the singular values σ of H and p = σ² / Σσ²:

        effective_rank = exp(−Σ p log p),
        rank_bound = (tr C)² / ‖C‖_F² = 1 / Σp² for C = HᵀH, which is no larger than the rank,
        cosine = the mean of hᵢ·hⱼ / (‖hᵢ‖ ‖hⱼ‖) over the pairs of rows, those that are zero left out.

    From G = HHᵀ of the first n rows alone, n being the same in all layers (no more than the narrowest has
    units, and one fewer than the batch, whose rows a centring norm makes dependent):

        orthogonality = ‖G / tr G − I / n‖_F,   isometry_gap = −log(det(G)^(1/n) / (tr G / n)),

    both 0 where the rows are orthogonal and equally long. The gap is NaN where the rows are dependent to
    the rounding of the model's precision. All are NaN where H is zero or not finite.

    The values are those of the last representation, the series all of them by the layer that reads it. Raises
    BadInput for fewer than two examples.
    Sources: effective rank after Roy & Vetterli 2007, who take p = σ / Σσ instead; rank_bound: Daneshmand et
    al. 2020 (arXiv:2003.01652); orthogonality: Daneshmand et al. 2021 (arXiv:2106.03970); isometry: Joudaki
    et al. 2023 (arXiv:2305.18399), as a gap in Meterez et al. 2023 (arXiv:2310.02012).
    """
    _check(examples)
    if len(x) < 2:
        raise BadInput(f"probe 'rank' compares examples: give it a batch of 2 or more, not {len(x)}")
    train_mode(model)
    with torch.no_grad():
        _, layers = run_and_watch(model, x)
        readers: dict[int, Layer] = {}
        for layer in layers:
            readers.setdefault(id(layer.input), layer)
        read = list(readers.values())[1:] or layers[:1]
        # A reference batch runs at the head of the batch.
        hidden = [_rows(layer)[-len(x) :][:examples] for layer in read]
        rows, width = (min(h.shape[axis] for h in hidden) for axis in (0, 1))
        grams = torch.stack([_gram(h[:rows]) for h in hidden])
        # Small matrices: a processor decomposes them faster than a card does.
        series = _describe(grams.cpu(), min(rows, width, len(x) - 1), _rounding(hidden))
    return Reading(
        {name: row[-1] for name, row in series.items() if name != "orthogonality"},
        series,
        "layer",
        tuple(layer.name for layer in read),
    )


def _check(examples: int) -> None:
    if examples < 2:
        raise BadInput(f"probe 'rank': examples must be 2 or more, not {examples!r}")


def _rows(layer: Layer) -> Tensor:
    """What a layer reads, as one row an example: the mean over all axes but the first and the features'."""
    h = layer.input
    axes = range(1, h.ndim - 1) if isinstance(layer.module, nn.Linear) else range(2, h.ndim)
    return h.mean(tuple(axes)) if axes else h


def _gram(h: Tensor) -> Tensor:
    # Divided first, so that the squares of very small numbers do not vanish.
    h = h.double()
    h = h / h.abs().max()
    return h @ h.T


def _rounding(hidden: list[Tensor]) -> Tensor:
    """The share of the largest eigenvalue of HHᵀ below which another one is only rounding."""
    # That of a singular value of H as for a numerical rank, squared; but eigenvalues are rounded themselves.
    of_h = [(max(h.shape) * torch.finfo(h.dtype).eps) ** 2 for h in hidden]
    of_gram = [len(h) * torch.finfo(torch.float64).eps for h in hidden]
    return torch.tensor([of_h, of_gram], dtype=torch.float64, device="cpu").amax(0)


def _describe(grams: Tensor, n: int, rounding: Tensor) -> dict[str, tuple[float, ...]]:
    """The series, from the Gram matrices (layers, rows, rows)."""
    # Zero where not finite; then it is the division by the trace that makes everything NaN.
    grams = grams.where(grams.isfinite().all(2, keepdim=True).all(1, keepdim=True), 0)
    p = torch.linalg.eigvalsh(grams).clamp(min=0)
    p = p / p.sum(1, keepdim=True)
    first = grams[:, :n, :n] / grams[:, :n, :n].diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    spectrum = torch.linalg.eigvalsh(first.nan_to_num())
    spectrum = spectrum.where((spectrum[:, 0] > rounding * spectrum[:, -1])[:, None], math.nan)
    lengths = grams.diagonal(dim1=1, dim2=2).sqrt()
    inverse = (1 / lengths).where(lengths > 0, 0)
    cosines = (inverse[:, :, None] * grams * inverse[:, None, :]).sum((1, 2))
    # The sum has each pair twice, and each row with itself.
    rows = (lengths > 0).sum(1)
    found = {
        "effective_rank": torch.special.entr(p).sum(1).exp(),
        "rank_bound": 1 / p.square().sum(1),
        "cosine": (cosines - rows) / (rows * (rows - 1)),
        "isometry_gap": -(n * spectrum).log().mean(1),
        "orthogonality": (first - torch.eye(n).to(first) / n).flatten(1).norm(dim=1),
    }
    return {name: tuple(numbers.tolist()) for name, numbers in found.items()}


@probe("rank", passes=5, paper="arXiv:2003.01652")
class Rank(Probe):
    """Effective rank, cosines and isometry of the representations over depth; see :func:`measure_rank`."""

    def __init__(self, *, examples: int = 64, **schedule: Any) -> None:
        _check(examples)
        super().__init__(**schedule)
        self.examples = examples

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_rank(model, x, y, examples=self.examples)
