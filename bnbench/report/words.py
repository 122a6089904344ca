"""Numbers for people: units, digits, signs, ranges."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from bnbench.study.verdicts import Verdict


def is_ratio(unit: str) -> bool:
    """Whether numbers of this unit are logarithms of ratios, shown to people as ratios."""
    return unit.startswith("log")


def decimals(width: float) -> int:
    """Decimals that show two significant digits of a width, three at most."""
    return 2 if width <= 0 or not math.isfinite(width) else min(3, max(0, 1 - math.floor(math.log10(width))))


def plain(value: float, places: int) -> str:
    """A number with a true minus sign."""
    text = f"{value:.{places}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{places}f}"


def signed(value: float, places: int) -> str:
    """A number with its sign."""
    text = plain(value, places)
    return text if text.startswith("−") or not float(text) else f"+{text}"


def _ratio(value: float) -> str:
    times = math.exp(min(value, 50.0))
    return f"{times:.2f}" if times < 10 else f"{times:.0f}"


def amount(value: float, unit: str) -> str:
    """A size with its unit, such as a smallest effect that matters: `1.25 ×`, `1.0 pp`."""
    return f"{_ratio(value)} ×" if is_ratio(unit) else f"{value:.3g} {unit}".replace("-", "−").strip()


def size_range(values: Sequence[float], unit: str) -> str:
    """How large some effects are, smallest to largest: `1.4 to 2.2 ×`, `−2.9 pp`."""
    low, high = min(values), max(values)
    if is_ratio(unit):
        texts = [_ratio(low), _ratio(high)]
        unit = "×"
    else:
        places = 1 if max(abs(low), abs(high)) >= 1 else 2
        texts = [signed(low, places), signed(high, places)]
    return f"{' to '.join(dict.fromkeys(texts))} {unit}".strip()


def effect(verdict: Verdict) -> str:
    """The estimate with its interval and unit: `+1.1 pp [+0.4, +1.7]`, `1.80 × [1.50, 2.14]`."""
    if verdict.estimate is None:
        return "no estimate"
    estimate, low, high = verdict.estimate, verdict.low, verdict.high
    if is_ratio(verdict.unit):
        text = f"{_ratio(estimate)} ×"
        return text if low is None or high is None else f"{text} [{_ratio(low)}, {_ratio(high)}]"
    places = decimals((high - low) / 2 if low is not None and high is not None else abs(estimate) or 1.0)
    text = f"{signed(estimate, places)} {verdict.unit}".strip()
    if low is None or high is None:
        return text
    return f"{text} [{signed(low, places)}, {signed(high, places)}]"


def probability(p: float | None) -> str:
    """A p value with two significant digits."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float) -> str:
    """A time for people: `42 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def median_range(values: Sequence[float]) -> str:
    """`0.1 (0.03–0.3)`: the lower median, and the range where the values differ."""
    if not values:
        return "–"
    middle = f"{statistics.median_low(values):g}"
    low, high = min(values), max(values)
    return middle if low == high else f"{middle} ({low:g}–{high:g})"


def dimension_words(name: str) -> str:
    """The name of a dimension for people: `learning rate`, `batch size`."""
    return "learning rate" if name == "lr" else name.replace("_", " ")


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers as ranges: `0–3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
