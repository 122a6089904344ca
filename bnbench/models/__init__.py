"""Reference models with a slot for the norm: MLP, CNN, VGG and ResNet."""

from bnbench.models.base import (
    MODELS,
    ORDERS,
    ModelEntry,
    ParameterCount,
    Slot,
    build_model,
    check_last_norm,
    describe,
    model,
    norm_scales,
    output_layer,
)
from bnbench.models.init import initialize

__all__ = [
    "MODELS",
    "ORDERS",
    "ModelEntry",
    "ParameterCount",
    "Slot",
    "build_model",
    "check_last_norm",
    "describe",
    "initialize",
    "model",
    "norm_scales",
    "output_layer",
]
