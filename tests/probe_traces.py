"""Invented traces of two probes, for the tests of what keeps and shows them."""

from __future__ import annotations

import math

from bnbench.probes import Trace

TRACES = {
    "gradient_flow": Trace(
        "layer",
        ("body.0", "body.3"),
        (0, 5, 40),
        {"growth": (1.2, math.nan, 0.1 + 0.2), "ratio": (2.0, 3.0, -0.0)},
        {"norm": ((1.0, 2.0), (math.nan, 1e-310), (0.5, 0.25))},
    ),
    "landscape": Trace(
        "step",
        (0.5, 1.0, 2.0),
        (40,),
        {"range": (0.75,), "beta": (math.nan,)},
        {"loss": ((0.1, 0.2, 0.4),)},
    ),
}
