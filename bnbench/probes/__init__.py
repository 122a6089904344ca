"""Probes: what happens inside a network in training, as Lightning callbacks and as functions.

Each file has a function `measure_<name>(model, x, y)` and a callback around it, and both are found here under
their names: ``from bnbench.probes import GradientFlow, measure_gradient_flow``.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from bnbench.probes.trace import Reading, Trace, trace_of

__all__ = ["PROBES", "Moment", "Probe", "ProbeEntry", "Reading", "Trace", "build_probe", "probe", "trace_of"]


def __getattr__(name: str) -> Any:
    # At first use, since traces are also read where nothing else needs torch.
    base = importlib.import_module("bnbench.probes.base")
    if name in __all__:
        return getattr(base, name)
    if not name.startswith("_"):
        for entry in base.PROBES.values():
            home = sys.modules[entry.probe.__module__]
            if name in (entry.probe.__name__, f"measure_{entry.name}"):
                return getattr(home, name)
    raise AttributeError(f"module 'bnbench.probes' has no attribute {name!r}")
