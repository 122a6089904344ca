"""Normalization layers and reparametrizations by name, precise statistics, and norms of existing models."""

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
from bnbench.norms.reparam import REPARAMS, ReparamEntry, apply_reparam, data_dependent_init, reparam
from bnbench.norms.surgery import (
    Conversion,
    Folding,
    convert_norm,
    fold_norm,
    freeze_norm,
    revert,
    unfreeze_norm,
)

__all__ = [
    "NORMS",
    "REPARAMS",
    "Conversion",
    "Folding",
    "FollowsProgress",
    "KeepsMoments",
    "NormEntry",
    "ReparamEntry",
    "TakesReference",
    "apply_reparam",
    "build_norm",
    "convert_norm",
    "data_dependent_init",
    "fold_norm",
    "freeze_norm",
    "norm",
    "norm_names",
    "normalization_batch_size",
    "precise_statistics",
    "recalibrate",
    "reparam",
    "revert",
    "unfreeze_norm",
]
