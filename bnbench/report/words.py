"""Numbers and verdicts in plain words: units, digits, and one sentence for each outcome."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from bnbench.study.claims import ClaimVerdict, Verdict

#: The order in which claims are shown: disagreements with the article first.
ORDER = ("REFUTED", "MIXED", "SUPPORTED", "INCONCLUSIVE", "NOT TESTED")

_GATES = {
    "tuning_edge": "more than 20 % of the replicates chose the lowest or the highest learning rate of the"
    " grid, so a better one may lie outside it",
    "under_trained": "the networks did not fit their training data well enough to ask about regularization",
    "incomplete": "trainings are missing or failed",
    "diverged": "more than 20 % of the trainings of the arm that should be better diverged",
    "censored": "some values are only bounds (a target that was never reached, or a range of learning rates"
    " that the grid cuts off), and these bounds cannot carry the verdict",
    "no_spread": "all replicates gave the same number, so there is no interval",
    "low_power": "fewer than five replicates carry no verdict",
}
_LABELS = {
    "negligible": "Any effect, in either direction, is smaller than what was declared to matter",
    "reversed": "The effect goes the other way",
    "at_least_delta": "The effect is there, and at least as large as what was declared to matter",
    "size_uncertain": "The effect is there; whether it is as large as what was declared to matter stays open",
}


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


def gate(verdict: Verdict) -> str:
    """Why there is no verdict, in plain words; empty where no gate failed."""
    if not verdict.gate:
        return ""
    known = _GATES.get(verdict.gate, verdict.gate.replace("_", " "))
    reason = " ".join(verdict.reason.split())
    return f"{known} ({reason})" if reason else known


def explain(verdict: Verdict) -> str:
    """One sentence on what a cell showed."""
    matters = f"({amount(verdict.delta, verdict.unit)})"
    if verdict.gate:
        sentence = f"No verdict: {gate(verdict)}"
    elif verdict.decision == "INCONCLUSIVE":
        sentence = f"The interval leaves open whether there is an effect that matters {matters}"
    elif verdict.kind == "equivalent":
        sentence = (
            f"The two differ by less than what was declared to matter {matters}"
            if verdict.decision == "SUPPORTED"
            else f"The two differ by more than what was declared to matter {matters}"
        )
    else:
        smaller = "The effect is smaller than what was declared to matter"
        matters = "" if verdict.label == "reversed" else f" {matters}"
        sentence = _LABELS.get(verdict.label, smaller) + matters
    return f"{sentence}; conditional on one tuning." if verdict.tuning == "once" else f"{sentence}."


def status(verdict: ClaimVerdict) -> str:
    """The decision on a claim, or NOT TESTED where no study speaks of it."""
    return verdict.decision if verdict.cells else "NOT TESTED"


def conclude(verdict: ClaimVerdict) -> str:
    """One plain sentence on a claim."""
    cells = verdict.cells
    if not cells:
        return "No study of this report speaks of it."
    counts: Counter[str] = Counter(cell.decision for cell in cells)
    total = f"{verdict.n_cells} cell" + ("s" if verdict.n_cells > 1 else "")
    if verdict.decision == "MIXED":
        return f"It depends: {verdict.condition}."
    if verdict.decision == "INCONCLUSIVE":
        counts["INCONCLUSIVE"] += verdict.n_cells - len(cells)
        kinds = ("SUPPORTED", "REFUTED", "INCONCLUSIVE")
        found = ", ".join(f"{counts[kind]} {kind.lower()}" for kind in kinds if counts[kind])
        return f"The data do not decide it: of {total}, {found}."
    share = f"{counts[verdict.decision]} of {total}"
    if verdict.decision == "SUPPORTED":
        return f"The data agree with the article in {share}."
    labels = Counter(cell.label for cell in cells if cell.decision == "REFUTED")
    why = {
        "reversed": "the effect goes the other way",
        "negligible": "there is no effect of a size that matters",
        "": "the effect is smaller than what matters",
    }
    reasons = " or ".join(why[label] for label in ("reversed", "negligible", "") if labels[label])
    return f"The data contradict the article in {share}" + (f": {reasons}." if reasons else ".")


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
