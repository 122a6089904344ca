"""Estimands of gradient flow: how far the factor from layer to layer is from 1, and from its theory."""

from __future__ import annotations

import math

from bnbench.registry import BadInput
from bnbench.study.estimands.probes import ProbedRole, probed, probed_row
from bnbench.study.table import Replicate


def mean_field_factor(batch_size: float) -> float:
    """The exact factor of the gradient's norm a layer back, at initialization, of wide BN + ReLU networks.

    With B the samples that are normalized together, c = −1 / (B − 1),
    J(c) = (√(1 − c²) + (π − arccos c) c) / π and J′(c) = (π − arccos c) / π, it is the square root of

        (B − 1) (J′(c) + B − 1) / ((B − 3) (B − 1) (1 − J(c))) − 1 / (B − 3).

    It falls with B to √(π / (π − 1)) = 1.2112. Raises BadInput below 4 samples.
    Source: Yang et al. 2019 (arXiv:1902.08129), Theorem 8.
    """
    if batch_size < 4:
        raise BadInput(f"the theory speaks of batches of 4 samples or more, not {batch_size}")
    b = float(batch_size)
    c = -1 / (b - 1)
    angle = math.pi - math.acos(c)
    kernel = (math.sqrt(1 - c * c) + angle * c) / math.pi
    slope = angle / math.pi
    return math.sqrt((b - 1) * (slope + b - 1) / ((b - 3) * (b - 1) * (1 - kernel)) - 1 / (b - 3))


def log_factor(replicate: Replicate, arm: str, step: int, role: ProbedRole) -> float:
    """The logarithm of the factor by which the gradient's norm grows from a layer to the one below."""
    return probed(probed_row(replicate, arm, role), "gradient_flow", "log_factor", step=step)


def flow_gain(
    replicate: Replicate, *, better: str, other: str, step: int = 0, role: ProbedRole = "best"
) -> float:
    """By how much an arm's gradient keeps its size better than another's, as a natural logarithm a layer.

    |log f_other| − |log f_better|; f is the factor a layer after `step` optimizer steps; 1 is perfect, larger
    explodes, smaller vanishes.
    """
    return abs(log_factor(replicate, other, step, role)) - abs(log_factor(replicate, better, step, role))


def flow_repair(
    replicate: Replicate, *, arm: str, early: int = 0, late: int, role: ProbedRole = "best"
) -> float:
    """By how much training brings an arm's factor towards 1, as a natural logarithm a layer.

    |log f(early)| − |log f(late)|, f at two steps.
    """
    return abs(log_factor(replicate, arm, early, role)) - abs(log_factor(replicate, arm, late, role))


def flow_against_theory(replicate: Replicate, *, arm: str, step: int = 0, role: ProbedRole = "best") -> float:
    """By how much an arm's factor differs from its theory, as a natural logarithm a layer.

    log f − log of :func:`mean_field_factor` at the row's batch size.
    """
    batch_size = probed_row(replicate, arm, role).trial.batch_size
    return log_factor(replicate, arm, step, role) - math.log(mean_field_factor(batch_size))
