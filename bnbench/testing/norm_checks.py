"""The checks that every normalization layer passes, each a function of a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bnbench.testing import norm_modules, norm_traits, norm_values
from bnbench.testing.norm_case import NormCase, norm_cases

NormCheck = Callable[[NormCase], None]


def check_norm(
    norm: str | Callable[..., nn.Module], *, dims: tuple[int, ...] = (0, 1, 2, 3), **options: Any
) -> None:
    """Run every check on a norm: a registered name, or a callable `(num_features, dim, **options)`.

    Without options a registered norm is checked with each of its examples. dims below the norm's min_dim
    are left out. Of a callable that is not registered no traits are known, so none is checked.
    Raises AssertionError that names the norm and what failed.
    """
    for case in norm_cases(norm, dims=dims, **options):
        for check in norm_checks():
            check(case)


def norm_checks() -> tuple[NormCheck, ...]:
    """Every check of the contract of a norm, to parametrize over."""
    return tuple(
        value
        for module in (norm_values, norm_traits, norm_modules)
        for name, value in vars(module).items()
        if name.startswith("check_norm_")
    )
