"""Normalization layers by name, weight reparametrizations by name, and precise statistics."""

from bnbench.norms.base import (
    NORMS,
    FollowsProgress,
    KeepsMoments,
    NormEntry,
    TakesReference,
    build_norm,
    norm,
    norm_names,
    normalization_batch_size,
)
from bnbench.norms.recalibrate import precise_statistics, recalibrate
from bnbench.norms.reparam import REPARAMS, ReparamEntry, apply_reparam, reparam

__all__ = [
    "NORMS",
    "REPARAMS",
    "FollowsProgress",
    "KeepsMoments",
    "NormEntry",
    "ReparamEntry",
    "TakesReference",
    "apply_reparam",
    "build_norm",
    "norm",
    "norm_names",
    "normalization_batch_size",
    "precise_statistics",
    "recalibrate",
    "reparam",
]
