"""Whitening of groups of channels, which the norms decorrelated_batch and iterative_whitening share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bnbench.norms.averages import count_values, move_averages
from bnbench.norms.base import (
    add_affine,
    channels_adjacent,
    check_eps,
    check_share,
    divisors,
    per_channel,
    show_options,
    widen,
)
from bnbench.registry import BadInput


class GroupWhitening(nn.Module):
    """y = γ W (x − μ) + β for each group of group_size successive channels, x (N, C, *).

    W = (Σ + eps I)^(−1/2), as `invert_root` of the heir has it, with the covariance Σ of a group over samples
    and positions. A step moves the averages of μ and of W; evaluation uses these.
    running_mean is (C), running_whitening (C / group_size, group_size, group_size).
    """

    running_mean: Tensor
    running_whitening: Tensor
    num_batches_tracked: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, num_features: int, *, group_size: int, eps: float, momentum: float, affine: bool
    ) -> None:
        super().__init__()
        if group_size < 1 or num_features % group_size:
            known = ", ".join(str(divisor) for divisor in divisors(num_features))
            raise BadInput(
                f"group_size={group_size} does not divide {num_features} channels; what would do: {known}"
            )
        self.num_features = num_features
        self.group_size = group_size
        self.eps = check_eps(eps)
        self.momentum = check_share("momentum", momentum)
        self.affine = affine
        add_affine(self, num_features, gamma=affine, beta=affine)
        groups = num_features // group_size
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_whitening", torch.eye(group_size).repeat(groups, 1, 1))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    extra_repr = show_options

    @abstractmethod
    def invert_root(self, covariance: Tensor) -> Tensor:
        """The inverse square root of symmetric matrices (G, D, D) whose eigenvalues are at least eps."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return self._whiten(x)

    def _whiten(self, x: Tensor) -> Tensor:
        wide = widen(x)
        if not self.training:
            centred = wide - per_channel(widen(self.running_mean), x)
            return self._map(widen(self.running_whitening), self._group(centred), None, x)
        count_values(x)
        shift = wide.detach().mean([0, *range(2, x.ndim)])
        grouped = self._group(wide - per_channel(shift, x))
        # Where the mean is large it is rounded, and W enlarges that; `rest` is what is left of it.
        rest, second = Moments.apply(grouped)  # type: ignore[no-untyped-call]
        whitening = self.invert_root(self._covariance(rest, second))
        moved = (self.running_mean, shift + rest.flatten()), (self.running_whitening, whitening)
        move_averages(self.momentum, self.num_batches_tracked, *moved)
        return self._map(whitening, grouped, rest, x)

    def _covariance(self, mean: Tensor, second: Tensor) -> Tensor:
        """Σ + eps I of each group (G, D, D), from the mean (G, D, 1) and the second moments (G, D, D)."""
        identity = torch.eye(self.group_size, dtype=mean.dtype, device=mean.device)
        return second - mean @ mean.mT + self.eps * identity

    def _map(self, whitening: Tensor, grouped: Tensor, mean: Tensor | None, x: Tensor) -> Tensor:
        """γ W (grouped − mean) + β in the type, the shape and the memory format of x."""
        columns = (-1, self.group_size, 1)
        if self.weight is not None:
            whitening = widen(self.weight).view(columns) * whitening
        shift = torch.zeros_like(whitening[..., :1]) if self.bias is None else widen(self.bias).view(columns)
        if mean is not None:
            shift = shift - whitening @ mean
        y = map_groups(whitening, grouped, shift)
        if y.ndim == 3:
            y = y.reshape(len(y), x.shape[0], y.shape[1] // x.shape[0], self.group_size).permute(1, 0, 3, 2)
        y = y.reshape(x.shape).to(x.dtype)
        if x.ndim > 2 and channels_adjacent(x):
            return torch.empty_like(x).copy_(y)
        return y.contiguous()

    def _group(self, x: Tensor) -> Tensor:
        """x as (N, G, D, positions) where positions are as many as D; else as (G, N · positions, D).

        The former takes no copy of an x that is contiguous, but N matrices a group.
        """
        groups, positions = self.num_features // self.group_size, x.shape[1:].numel() // self.num_features
        grouped = x.reshape(x.shape[0], groups, self.group_size, positions)
        return grouped if positions >= self.group_size else grouped.permute(1, 0, 3, 2).flatten(1, 2)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, ...]:
        moments: tuple[Tensor, ...] = Moments.apply(self._group(x.detach().double()))  # type: ignore[no-untyped-call]
        return moments

    def set_moments(self, *means: Tensor) -> None:
        self.running_mean.copy_(means[0].flatten())
        self.running_whitening.copy_(self.invert_root(self._covariance(*means)))


def without_autocast(x: Tensor) -> torch.autocast:
    """Keep matrix products in the type of x, where autocast would take bfloat16."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def map_groups(matrices: Tensor, grouped: Tensor, shift: Tensor) -> Tensor:
    """matrices · x + shift for every position of both forms of x; matrices (G, D, D), shift (G, D, 1)."""
    if grouped.ndim == 3:
        return torch.baddbmm(shift.mT, grouped, matrices.mT)
    samples = grouped.shape[0]
    each, shifts = (values.expand(samples, *values.shape).flatten(0, 1) for values in (matrices, shift))
    return torch.baddbmm(shifts, each, grouped.flatten(0, 1)).view(grouped.shape)


class Moments(torch.autograd.Function):
    """Means (G, D, 1) and second moments (G, D, D) of groups, in either form, over samples and positions.

    One matrix product in the backward pass, where that of x xᵀ would take two and the mean a tensor more.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grouped: Tensor) -> tuple[Tensor, Tensor]:
        if grouped.ndim == 3:
            return grouped.mean(1)[..., None], grouped.mT @ grouped / grouped.shape[1]
        count = grouped.shape[0] * grouped.shape[3]
        return grouped.mean((0, 3))[..., None], (grouped @ grouped.mT).sum(0) / count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (grouped,) = ctx.saved_tensors
        mean, second = gradients
        count = grouped.numel() // mean.numel()
        with without_autocast(grouped):
            return map_groups((second + second.mT) / count, grouped, mean / count)


def choose_group_size(num_features: int, group_size: int | None, most: int) -> int:
    """Return group_size, or for None the largest divisor of num_features up to `most`."""
    if group_size is not None:
        return group_size
    return max(divisor for divisor in divisors(num_features) if divisor <= most)


def covariances(x: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor]:
    """For references: the centred input (G, D, N · positions), and Σ + eps I of each group (G, D, D)."""
    centred = x - x.mean([0, *range(2, x.ndim)], keepdim=True)
    rows = centred.transpose(0, 1).reshape(x.shape[1] // group_size, group_size, -1)
    identity = torch.eye(group_size, dtype=x.dtype, device=x.device)
    return rows, rows @ rows.mT / rows.shape[2] + eps * identity


def ungroup(rows: Tensor, x: Tensor) -> Tensor:
    """For references: rows (G, D, N · positions) in the shape of x."""
    return rows.reshape(x.shape[1], len(x), *x.shape[2:]).transpose(0, 1)


class InverseRoot(torch.autograd.Function):
    """The power −1/2 of symmetric matrices (…, D, D) with eigenvalues of at least `least`; and what it saves.

    Its derivative takes divided differences of λ^(−1/2), which exist where eigenvalues are equal; those of
    an eigendecomposition do not. It can be derived once.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrices: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrices)
        # Rounding may leave them below, even below 0.
        roots = values.clamp_min(least).sqrt()
        return (vectors / roots[..., None, :]) @ vectors.mT, roots, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, roots, vectors = output
        ctx.mark_non_differentiable(roots, vectors)
        ctx.save_for_backward(roots, vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        roots, vectors = ctx.saved_tensors
        one, other = roots[..., :, None], roots[..., None, :]
        differences = -1 / (one * other * (one + other))
        with without_autocast(roots):
            turned = vectors.mT @ ((gradients[0] + gradients[0].mT) / 2) @ vectors
            return vectors @ (differences * turned) @ vectors.mT, None
