"""What can be done to the norms of a model that exists: convert, revert, freeze and fold them."""

from bnbench.norms.surgery.convert import convert_norm, revert
from bnbench.norms.surgery.fold import fold_norm
from bnbench.norms.surgery.freeze import freeze_norm, unfreeze_norm
from bnbench.norms.surgery.report import Change, Conversion, Fold, Folding, Left

__all__ = [
    "Change",
    "Conversion",
    "Fold",
    "Folding",
    "Left",
    "convert_norm",
    "fold_norm",
    "freeze_norm",
    "revert",
    "unfreeze_norm",
]
