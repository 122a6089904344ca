"""What batch normalization does, measured: norms, models, LightningModules and studies."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnbench.lit import NormClassifier, load
    from bnbench.norms import build_norm, convert_norm, fold_norm, freeze_norm, norm_names, recalibrate

__version__ = "0.1.0"
__all__ = [
    "NormClassifier",
    "build_norm",
    "convert_norm",
    "fold_norm",
    "freeze_norm",
    "load",
    "norm_names",
    "recalibrate",
]

# Loaded at first use: `bnbench --help` and shell completion must not wait for torch.
_HOMES = {
    "NormClassifier": "bnbench.lit",
    "load": "bnbench.lit",
    "build_norm": "bnbench.norms",
    "norm_names": "bnbench.norms",
    "convert_norm": "bnbench.norms",
    "fold_norm": "bnbench.norms",
    "freeze_norm": "bnbench.norms",
    "recalibrate": "bnbench.norms",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bnbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
