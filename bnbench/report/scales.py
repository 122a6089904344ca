"""Scales of figures: round numbers for a logarithmic one, numbers in few letters, places evenly spaced."""

from __future__ import annotations

import math

from matplotlib.ticker import MaxNLocator


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones for a logarithmic scale: powers of ten, or closer ones."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts, most in (((1,), 8), ((1, 3), 6), ((1, 2, 5), 6)):
        ticks = [part * 10.0**power for power in range(first, last + 1) for part in parts]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / most)]
    return [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def short(number: float) -> str:
    """A number of an axis in few letters: `0.03`, `2e−5`."""
    text = f"{number:g}"
    if number and not 1e-3 <= abs(number) < 1e6:
        digits, power = f"{number:.2e}".split("e")
        text = f"{float(digits):g}e{int(power)}"
    return text.replace("-", "−")


def evenly(count: int, most: int) -> list[int]:
    """So many of the first whole numbers, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
