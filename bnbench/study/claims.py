"""Verdicts: a table of results in, a decision for every hypothesis in every cell and for every claim out.

The rules are fixed before the first trial and have no settings. An interval at level 1 − .05/m decides, m
being the number of primary hypotheses times cells that the claim declares over all studies, whatever has been
run; an exploratory hypothesis is a family of its own. A gate makes a verdict INCONCLUSIVE and leaves its
numbers to be seen. The first gate of this order is named:

incomplete      a row that the hypothesis needs is missing or failed; only the count n is shown
low_power       fewer than 5 replicates
diverged        over 20 % of the own rows of an arm in `better` diverged (program search)
under_trained   an arm in `other` (in `better` if there is none) misses the cell's `min_train_acc` (search);
                with label noise it is the noisy labels that must be learned, so such a cell has a constant
                of its own, or none
tuning_edge     over 20 % of the replicates pick an end of the grid, in an arm on a grid that trains at all
censored        what was not observed could change the decision
no_spread       all replicates give the same number, so there is no interval
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from statistics import fmean, median
from typing import Literal

from bnbench.registry import BadInput, nearest
from bnbench.study import stats
from bnbench.study.design import Cell, Design
from bnbench.study.estimands import TRAINS_AT_ALL, metric_slope, rising_doses
from bnbench.study.spec import Estimate, Hypothesis, Study
from bnbench.study.table import Entry, Replicate, Table
from bnbench.study.verdicts import ClaimVerdict, Decision, Gate, Label, Verdict

#: The chance of any false verdict in a claim's family.
ALPHA = 0.05
#: Fewer replicates carry no verdict.
FEWEST_REPLICATES = 5
#: A gate closes where more than this share of the replicates fail it.
TOLERATED_SHARE = 0.2
#: The cell's constant that holds the training accuracy below which a comparison says nothing.
MIN_TRAIN_ACC = "min_train_acc"
# Squares of larger numbers would overflow; no honest measurement comes near.
_LARGEST = 1e100


def family_sizes(studies: Iterable[Study], preset: str) -> dict[str, int]:
    """The number of primary hypotheses times cells that each claim declares over all these studies."""
    sizes: dict[str, int] = {}
    for study in studies:
        for hypothesis in study.hypotheses:
            if hypothesis.primary:
                cells = study.cells_of(hypothesis, preset)
                sizes[hypothesis.claim] = sizes.get(hypothesis.claim, 0) + len(cells)
    return sizes


def judge(
    study: Study, preset: str, table: Table, family_size: Mapping[str, int], *, bootstrap: bool = True
) -> tuple[Verdict, ...]:
    """Judge every hypothesis of a study in every cell of a preset, in the order of their declaration.

    `family_size` is what :func:`family_sizes` gives over all studies. Replicates beyond the declared ones
    are not read. Without `bootstrap` there is no `bca`, which decides nothing and takes most of the time.
    Raises BadInput for a primary hypothesis whose claim has no family size.
    """
    design = study.design(preset)
    return tuple(
        _judge_cell(study, design, hypothesis, cell, table, _size(hypothesis, family_size), bootstrap)
        for hypothesis in study.hypotheses
        for cell in study.cells_of(hypothesis, preset)
    )


def adjust(verdicts: Sequence[Verdict], family_sizes: Mapping[str, int]) -> tuple[Verdict, ...]:
    """Fill in Holm's adjusted sign-flip p over each claim's primary family.

    Members without a p, or not among these verdicts, count as 1. Raises BadInput where a family is larger
    than declared.
    """
    adjusted = list(verdicts)
    for claim in {v.claim for v in verdicts if v.primary}:
        members = [index for index, v in enumerate(verdicts) if v.primary and v.claim == claim]
        size = _declared(claim, family_sizes)
        p_values = stats.holm([verdicts[index].p_sign_flip for index in members], size)
        for index, p in zip(members, p_values, strict=True):
            adjusted[index] = dataclasses.replace(verdicts[index], p_holm=p)
    return tuple(adjusted)


def judge_claim(claim: str, verdicts: Iterable[Verdict]) -> ClaimVerdict:
    """Judge a claim by what its primary cells among these verdicts say on it.

    SUPPORTED if at least 2/3 of the declared primary cells are and none is REFUTED; REFUTED likewise. MIXED
    if a SUPPORTED and a REFUTED cell of hypotheses of one kind, both for or both against the claim, differ:
    Welch's t on values/δ, Holm-adjusted over all such pairs, p < .05, which says that the adjusted interval
    of the difference excludes 0. Else INCONCLUSIVE.
    """
    cells = tuple(v for v in verdicts if v.primary and v.claim == claim)
    supported = [v for v in cells if v.on_claim == "SUPPORTED"]
    refuted = [v for v in cells if v.on_claim == "REFUTED"]
    n_cells = max([len(cells), *(v.family_size for v in cells)])
    decision: Literal["SUPPORTED", "REFUTED", "MIXED", "INCONCLUSIVE"] = "INCONCLUSIVE"
    condition = ""
    if supported and refuted:
        condition = _condition(supported, refuted)
        decision = "MIXED" if condition else "INCONCLUSIVE"
    elif supported and 3 * len(supported) >= 2 * n_cells:
        decision = "SUPPORTED"
    elif refuted and 3 * len(refuted) >= 2 * n_cells:
        decision = "REFUTED"
    return ClaimVerdict(claim, decision, n_cells, len(supported), len(refuted), condition, cells)


def decide(kind: str, low: float, high: float, delta: float) -> tuple[Decision, Label]:
    """The decision that an interval [low, high] of the effect takes, and its label.

    greater: REFUTED if high < δ (`negligible` if low > −δ, `reversed` if high < 0 and low ≤ −δ); SUPPORTED
    if low > 0 and high ≥ δ (`at_least_delta` if low ≥ δ, else `size_uncertain`). equivalent: SUPPORTED if
    −δ < low and high < δ; REFUTED if low > δ or high < −δ. Else INCONCLUSIVE.
    """
    if kind == "equivalent":
        if -delta < low and high < delta:
            return "SUPPORTED", ""
        return ("REFUTED", "") if low > delta or high < -delta else ("INCONCLUSIVE", "")
    if high < delta:
        if low > -delta:
            return "REFUTED", "negligible"
        return "REFUTED", "reversed" if high < 0 else ""
    if low > 0:
        return "SUPPORTED", "at_least_delta" if low >= delta else "size_uncertain"
    return "INCONCLUSIVE", ""


def _declared(claim: str, sizes: Mapping[str, int]) -> int:
    if claim not in sizes:
        raise BadInput(f"no family size for claim {claim!r}{nearest(claim, sizes)}")
    return sizes[claim]


def _size(hypothesis: Hypothesis, sizes: Mapping[str, int]) -> int:
    return _declared(hypothesis.claim, sizes) if hypothesis.primary else 1


def _judge_cell(
    study: Study,
    design: Design,
    hypothesis: Hypothesis,
    cell: Cell,
    table: Table,
    family_size: int,
    bootstrap: bool,
) -> Verdict:
    there = {replicate.index: replicate for replicate in table.replicates(cell.name, cell.constants)}
    estimates: list[Estimate] = []
    missing: list[str] = []
    for index in range(design.replicates_in(cell.name)):
        try:
            estimates.append(_observe(study, design, hypothesis, there.get(index)))
        except (LookupError, ValueError, ArithmeticError) as error:
            # A KeyError prints as the bare key.
            said = f"nothing is named {error}" if isinstance(error, KeyError) else str(error)
            missing.append(f"replicate {index}: {said}")
    verdict = Verdict(
        study=study.name,
        hypothesis=hypothesis.name,
        claim=hypothesis.claim,
        cell=cell.name,
        kind=hypothesis.kind,
        delta=hypothesis.delta_in(cell),
        unit=hypothesis.unit,
        primary=hypothesis.primary,
        against=hypothesis.against,
        level=1 - ALPHA / family_size,
        family_size=family_size,
        n=len(estimates),
        tuning=design.tuning if study.program == "search" else "",
        expected_half_width=hypothesis.half_width.get(cell.name),
    )
    if missing:
        more = f" (and {len(missing) - 1} more replicates)" if len(missing) > 1 else ""
        return dataclasses.replace(verdict, gate="incomplete", reason=missing[0] + more)
    replicates = [there[index] for index in range(design.replicates_in(cell.name))]
    verdict = _measure(verdict, estimates, bootstrap)
    verdict = _follow_doses(verdict, hypothesis, replicates)
    if study.program == "search":
        rows = {arm: [r.own(arm) for r in replicates] for arm in _arms(hypothesis)}
        ends = (design.lr[0], design.lr[-1])
        edge = {
            arm: sum(row.trial.lr in ends for row in own) / len(own)
            for arm, own in rows.items()
            if not _is_searched(design, arm, cell.name)
        }
        verdict = dataclasses.replace(verdict, edge=edge)
    else:
        rows = {arm: [row for r in replicates for row in r.grid(arm)] for arm in _arms(hypothesis)}
    diverged = {arm: sum(row.result.status == "diverged" for row in rows[arm]) for arm in rows}
    verdict = dataclasses.replace(verdict, n_diverged=diverged)
    gate, reason = _gate(verdict, hypothesis, cell, rows if study.program == "search" else {})
    return dataclasses.replace(verdict, gate=gate, reason=reason) if gate else _conclude(verdict)


def _observe(study: Study, design: Design, hypothesis: Hypothesis, replicate: Replicate | None) -> Estimate:
    """The estimand's number in one replicate. Raises LookupError where a row that it needs is not there."""
    if replicate is None:
        raise LookupError("no rows")
    grid = list(design.lr)
    for arm in _arms(hypothesis):
        for entry in replicate.entries:
            # A failed common or timing row counts only if the estimand reads it, and is then missed below.
            counts = entry.role not in ("common", "timing")
            if counts and entry.arm == arm and entry.result.status == "failed":
                raise LookupError(f"{arm!r} failed at lr {entry.trial.lr:g}: {entry.result.brief}")
        tried = [entry.trial.lr for entry in replicate.grid(arm)]
        whole = tried == grid or (bool(tried) and _is_searched(design, arm, replicate.cell))
        if not whole and (tried or study.program == "sweep"):
            raise LookupError(f"{arm!r} has {len(tried)} of {len(grid)} points of its grid")
        if study.program == "search":
            replicate.own(arm)
    finished = tuple(entry for entry in replicate.entries if entry.result.status != "failed")
    observed = hypothesis.estimand(dataclasses.replace(replicate, entries=finished))
    estimate = observed if isinstance(observed, Estimate) else Estimate(observed)
    if not abs(estimate.value) < _LARGEST:
        raise ValueError(f"the estimand gave {estimate.value}")
    return Estimate(float(estimate.value), estimate.allows)


def _is_searched(design: Design, arm: str, cell: str) -> bool:
    """Whether an arm searches a space, which has no grid and no ends of it."""
    return any(a.name == arm and a.space_in(cell) for a in design.arms)


def _arms(hypothesis: Hypothesis) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*hypothesis.better, *hypothesis.other)))


def _measure(verdict: Verdict, estimates: Sequence[Estimate], bootstrap: bool) -> Verdict:
    """The verdict with its statistics."""
    values, allows = tuple(e.value for e in estimates), tuple(e.allows for e in estimates)
    exact = len(values) <= stats.MOST_SIGN_FLIPS
    censored = any(a != "both" for a in allows)
    low, high = stats.paired_t_interval(values, verdict.level) or (None, None)
    return dataclasses.replace(
        verdict,
        values=values,
        allows=allows,
        estimate=fmean(values),
        low=low,
        high=high,
        half_width=stats.smallest_visible_effect(values, verdict.level),
        p=stats.paired_t_p(values),
        p_sign_flip=stats.sign_flip_p(values) if exact else None,
        p_rank=stats.censored_rank_p(values, allows) if exact and censored else None,
        bca=stats.bca_interval(values, seed=0) if bootstrap else None,
        d_z=stats.d_z(values),
        cliffs_delta=stats.cliffs_delta(values, (0.0,)),
    )


def _follow_doses(verdict: Verdict, hypothesis: Hypothesis, replicates: Sequence[Replicate]) -> Verdict:
    """The verdict with its trend over the doses, where a slope over three or more is judged."""
    estimand = hypothesis.estimand
    if not isinstance(estimand, functools.partial) or estimand.func is not metric_slope:
        return verdict
    rows = [rising_doses(replicate, **estimand.keywords) for replicate in replicates]
    if len(rows) < 2 or len(rows[0]) < 3:
        return verdict
    page_p, dose_rho = stats.page_trend(rows)[1], stats.mean_rank_correlation(rows)
    return dataclasses.replace(verdict, page_p=page_p, dose_rho=dose_rho)


def _gate(
    verdict: Verdict, hypothesis: Hypothesis, cell: Cell, own: Mapping[str, Sequence[Entry]]
) -> tuple[Gate, str]:
    """The first gate that closes before the interval is read, and why; two empty strings where none does.

    `own` has the arms' confirmed rows, and is empty for a sweep.
    """
    n = verdict.n
    if n < FEWEST_REPLICATES:
        return "low_power", f"{n} replicates; a verdict takes {FEWEST_REPLICATES} or more"
    for arm in hypothesis.better if own else ():
        if verdict.n_diverged[arm] / n > TOLERATED_SHARE:
            return "diverged", f"{verdict.n_diverged[arm]} of {n} own rows of {arm!r} diverged"
    if own and MIN_TRAIN_ACC in cell.constants:
        wanted = cell.constants[MIN_TRAIN_ACC]
        for arm in hypothesis.other or hypothesis.better:
            reached = median(row["train/acc"] for row in own[arm])
            if reached < wanted:
                return "under_trained", f"{arm!r} reaches training accuracy {reached:.3g}, not {wanted:.3g}"
    for arm, rows in own.items():
        guessing = median(row["chance"] for row in rows)
        trains_at_all = median(row["val/acc"] for row in rows) >= TRAINS_AT_ALL * guessing
        if trains_at_all and verdict.edge.get(arm, 0.0) > TOLERATED_SHARE:
            return "tuning_edge", f"{arm!r} picks an end of its grid in {verdict.edge[arm]:.0%} of replicates"
    if "neither" in verdict.allows or {"support", "refute"} <= set(verdict.allows):
        return "censored", f"{_censored(verdict)} replicates are censored, and not all in one direction"
    if verdict.low is None:
        return "no_spread", "all replicates give the same number"
    return "", ""


def _conclude(verdict: Verdict) -> Verdict:
    """The verdict with the decision that its interval takes, if no censored value could change it."""
    assert verdict.low is not None and verdict.high is not None, "the gate no_spread comes first"
    decision, label = decide(verdict.kind, verdict.low, verdict.high, verdict.delta)
    # The truth is at least a value that allows "support": that bounds nothing from above, and vice versa.
    rests_on_high = verdict.high < verdict.delta
    rests_on_low = decision == "SUPPORTED" if verdict.kind == "greater" else verdict.low > -verdict.delta
    forbidden = {"support"} & set(verdict.allows) if rests_on_high else set()
    forbidden |= {"refute"} & set(verdict.allows) if rests_on_low else set()
    if decision != "INCONCLUSIVE" and forbidden:
        reason = f"{_censored(verdict)} replicates are censored; their true values could undo {decision}"
        return dataclasses.replace(verdict, gate="censored", reason=reason)
    if label == "negligible" and "refute" in verdict.allows:
        label = ""
    return dataclasses.replace(verdict, decision=decision, label=label)


def _censored(verdict: Verdict) -> str:
    return f"{sum(a != 'both' for a in verdict.allows)} of {verdict.n}"


def _condition(supported: Sequence[Verdict], refuted: Sequence[Verdict]) -> str:
    """Which cells support and which refute a claim, among those that demonstrably differ; else nothing."""
    pairs = [(s, r) for s, r in product(supported, refuted) if (s.kind, s.against) == (r.kind, r.against)]
    p_values = stats.holm(
        [stats.welch_p([x / v.delta for x in v.values], [x / w.delta for x in w.values]) for v, w in pairs],
        len(pairs),
    )
    differing = [pair for pair, p in zip(pairs, p_values, strict=True) if p is not None and p < ALPHA]
    if not differing:
        return ""
    holds = dict.fromkeys(f"{s.cell} ({s.hypothesis})" for s, _ in differing)
    fails = dict.fromkeys(f"{r.cell} ({r.hypothesis})" for _, r in differing)
    return f"supported in {', '.join(holds)}; refuted in {', '.join(fails)}"
