"""Verdicts in plain sentences: what a cell showed, and what a claim's cells say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bnbench.report.words import amount, probability, size_range
from bnbench.study.verdicts import ClaimVerdict, Verdict

#: The order in which claims are shown: disagreements with the article first.
ORDER = ("REFUTED", "MIXED", "SUPPORTED", "INCONCLUSIVE", "NOT TESTED")

#: A gate in a few words, and as a reason that says more.
_GATES = {
    "tuning_edge": (
        "the best learning rate may lie outside the grid",
        "more than 20 % of the replicates chose the lowest or the highest learning rate of the grid, so a"
        " better one may lie outside it",
    ),
    "under_trained": (
        "under-trained",
        "the networks did not fit their training data well enough to ask about regularization",
    ),
    "incomplete": ("incomplete", "trainings are missing or failed"),
    "diverged": (
        "too many diverged",
        "more than 20 % of the trainings of the arm that should be better diverged",
    ),
    "censored": (
        "censored",
        "some values are only bounds (a target that was never reached, or a range of learning rates that the"
        " grid cuts off), and these bounds cannot carry the verdict",
    ),
    "no_spread": ("no spread", "all replicates gave the same number, so there is no interval"),
    "low_power": ("too few replicates", "fewer than five replicates carry no verdict"),
}
_LABELS = {
    "negligible": "Any effect, in either direction, is smaller than what was declared to matter",
    "reversed": "The effect goes the other way",
    "at_least_delta": "The effect is there, and at least as large as what was declared to matter",
    "size_uncertain": "The effect is there; whether it is as large as what was declared to matter stays open",
}
_MOST_NAMES = 6


def gate(verdict: Verdict) -> str:
    """Why there is no verdict, in plain words; empty where no gate failed."""
    if not verdict.gate:
        return ""
    _, known = _GATES.get(verdict.gate, ("", verdict.gate.replace("_", " ")))
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


def beside(verdict: Verdict) -> str:
    """What is said beside a cell's numbers: who diverged, and tests that do not decide; mostly nothing."""
    parts = [
        f"{count} {'training' if count == 1 else 'trainings'} of “{arm}” diverged, in the score as guessing"
        for arm, count in verdict.n_diverged.items()
        if count
    ]
    censored = sum(allows != "both" for allows in verdict.allows)
    if censored:
        parts.append(f"{censored} of {verdict.n} replicates are bounds only")
    if verdict.p_rank is not None:
        parts.append(f"signed-rank test that knows the bounds: p {_equals(verdict.p_rank)}")
    if verdict.page_p is not None:
        parts.append(f"Page's test of a trend over the doses: p {_equals(verdict.page_p)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _equals(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def status(verdict: ClaimVerdict) -> str:
    """The decision on a claim, or NOT TESTED where no study speaks of it."""
    return verdict.decision if verdict.cells else "NOT TESTED"


def conclude(verdict: ClaimVerdict, condition: str = "") -> str:
    """One plain sentence on a claim: in which cells it holds, in which not, how large, and what is open.

    `condition` says what the cells in which it holds have in common and the others have not.
    """
    cells = verdict.cells
    if not cells:
        return "No study of this report speaks of it."
    supported = [v for v in cells if v.on_claim == "SUPPORTED"]
    refuted = [v for v in cells if v.on_claim == "REFUTED"]
    parts = []
    if supported:
        parts.append(f"it holds in {_where(supported, verdict, _found)}")
    if refuted:
        parts.append(f"it fails in {_where(refuted, verdict, _found)}")
    if verdict.decision == "REFUTED":
        parts.reverse()
    parts += _open(verdict)
    first = {
        "SUPPORTED": "",
        "REFUTED": "",
        "MIXED": f"It depends on {condition}: " if condition else "It depends on the cell: ",
        "INCONCLUSIVE": "The data do not decide it: ",
    }[verdict.decision]
    if verdict.decision == "INCONCLUSIVE" and supported and refuted:
        parts.append("by chance alone cells could differ so much")
    text = first + "; ".join(parts)
    once = any(v.tuning == "once" for v in (*supported, *refuted))
    return f"{text[0].upper()}{text[1:]}{'; conditional on one tuning' if once else ''}."


def _where(cells: Sequence[Verdict], claim: ClaimVerdict, say: Callable[[Sequence[Verdict]], str]) -> str:
    """`3 of 4 cells: a, b (1.4 to 2.2 ×), c (the other way)`: how many, and which with what is said of them.

    Cells of one hypothesis of which the same is said stand together, under its name where there are several.
    """
    several = len({v.hypothesis for v in claim.cells}) > 1
    whole = len(cells) == claim.n_cells
    groups: dict[tuple[object, ...], list[Verdict]] = {}
    for v in cells:
        groups.setdefault((v.hypothesis, v.kind, v.label, v.gate, v.unit, v.delta), []).append(v)
    count = (
        f"all {len(cells)} cells" if whole and len(cells) > 1 else f"{len(cells)} of {claim.n_cells} cells"
    )
    if whole and len(groups) == 1:
        return f"{count if len(cells) > 1 else 'its one cell'}{_in_parentheses(say(cells))}"
    named = [
        (f"{v[0].hypothesis} in " if several else "")
        + _listed([cell.cell for cell in v])
        + _in_parentheses(say(v))
        for v in groups.values()
    ]
    return f"{count}: {', '.join(named)}"


def _in_parentheses(text: str) -> str:
    return f" ({text})" if text else ""


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    shown = ", ".join(names[:_MOST_NAMES] if more > 0 else names)
    return f"{shown} and {more} more" if more > 0 else shown


def _found(cells: Sequence[Verdict]) -> str:
    """What some cells of one decision and label found, with sizes: `any effect is below 1 pp: +0.09 pp`."""
    v = cells[0]
    matters = amount(v.delta, v.unit)
    sizes = size_range([v.estimate for v in cells if v.estimate is not None], v.unit)
    if v.decision == "INCONCLUSIVE":
        return sizes
    if v.kind == "equivalent":
        return f"a difference {'below' if v.decision == 'SUPPORTED' else 'above'} {matters}: {sizes}"
    if v.decision == "REFUTED":
        ways = {
            "reversed": "the effect goes the other way",
            "negligible": f"any effect is below {matters}",
        }
        return f"{ways.get(v.label, f'the effect is below {matters}')}: {sizes}"
    return f"{sizes}, perhaps below {matters}" if v.label == "size_uncertain" else sizes


def _open(claim: ClaimVerdict) -> list[str]:
    """What stays open: cells without a verdict by the reason, and those that are not there."""
    parts = []
    open_ = [v for v in claim.cells if v.decision == "INCONCLUSIVE"]
    if gated := [v for v in open_ if v.gate]:
        parts.append(f"no verdict in {_where(gated, claim, lambda some: _short(some[0].gate))}")
    if undecided := [v for v in open_ if not v.gate]:
        parts.append(f"undecided in {_where(undecided, claim, _found)}")
    missing = claim.n_cells - len(claim.cells)
    if missing > 0:
        parts.append(f"{missing} declared {'cell is' if missing == 1 else 'cells are'} not here")
    return parts


def _short(name: str) -> str:
    return _GATES[name][0] if name in _GATES else name.replace("_", " ")
