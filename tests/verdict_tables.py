"""Tables made so that their verdict is known: own rows whose differences have a chosen interval."""

import math

import numpy as np
from scipy import stats as scipy_stats

from bnbench.study import Arm, Cell, Design, Entry, Estimate, Hypothesis, Result, Study, Table, Trial
from bnbench.study.claims import judge

GRID = (0.01, 0.1, 1.0)
MLP = (Cell("mlp"),)
DELTA = 1.0


def effect(replicate, metric="effect"):
    """The number that the test put into the own row of `batch`, with what its reason says it allows."""
    row = replicate.own("batch")
    return Estimate(row[metric], row.result.reason or "both")


def hypothesis(name="C.a", **changes):
    values = {"claim": "C", "sentence": "s", "estimand": effect, "delta": DELTA, "better": ("batch",)}
    return Hypothesis(name, **{**values, "other": ("none",), **changes})


def study(
    *hypotheses,
    cells=MLP,
    replicates=10,
    program="search",
    tuning="per_replicate",
    lr=GRID,
    arms=("none", "batch"),
):
    different = tuple(Arm(name, dropout=i / 10) for i, name in enumerate(arms))
    design = Design(Trial(), tuple(cells), different, lr, replicates, tuning)
    return Study("s", "?", hypotheses or (hypothesis(),), design, design, baseline="none", program=program)


def curve(steps, budget, target):
    """A curve of accuracy that first reaches the target at this step, or never where it is None."""
    points = (
        ((1, 0.1), (budget, target / 2)) if steps is None else ((1, 0.1), (steps, target), (budget, target))
    )
    return dict(zip(("step", "val/acc"), zip(*points, strict=True), strict=True))


def row(
    arm,
    replicate,
    *,
    cell="mlp",
    role="own",
    lr=0.1,
    steps=500,
    status="done",
    reason="",
    curve=None,
    **metrics,
):
    values = {"chance": 0.1, "val/acc": 0.9, "train/acc": 0.99}
    values |= {name.replace("_", "/", 1): value for name, value in metrics.items()}
    result = Result(status, values, curve or {}, reason)
    return Entry(cell, arm, replicate, role, Trial(lr=lr, steps=steps), result)


def rows(values, *, cell="mlp", allows=(), better=(), other=()):
    """Own rows of both arms; `allows`, `better` and `other` give changes by replicate."""
    entries = []
    for index, value in enumerate(values):
        changes = dict(better).get(index, {})
        reason = dict(allows).get(index, "")
        entries.append(row("batch", index, **{"cell": cell, "effect": value, "reason": reason, **changes}))
        entries.append(row("none", index, **{"cell": cell, **dict(other).get(index, {})}))
    return tuple(entries)


def between(low, high, n=10, level=0.95):
    """n values whose Student interval at this level is [low, high]."""
    pattern = np.linspace(-1, 1, n)
    half = scipy_stats.t.ppf((1 + level) / 2, n - 1) * np.std(pattern, ddof=1) / math.sqrt(n)
    return [float((low + high) / 2 + x * (high - low) / 2 / half) for x in pattern]


def judge_one(values, *, the_hypothesis=None, size=1, program="search", cells=MLP, **changes):
    the_study = study(the_hypothesis or hypothesis(), replicates=len(values), program=program, cells=cells)
    (verdict,) = judge(the_study, "quick", Table(rows(values, **changes)), {"C": size})
    return verdict


GOOD = between(1.5, 2.5)


def changed(count, **changes):
    return dict.fromkeys(range(count), changes)
