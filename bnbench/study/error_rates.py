"""How often the judge errs: random tables of known truth, judged by the code that judges studies.

The truth of a :class:`World` is chosen, its tables are drawn, and `judge`, `adjust` and `judge_claim` see
them as they see a study's. All effects and standard deviations are in units of δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt

from bnbench.study.claims import adjust, judge, judge_claim
from bnbench.study.design import Arm, Cell, Design
from bnbench.study.estimands import accuracy_difference
from bnbench.study.spec import Hypothesis, Study
from bnbench.study.table import Entry, Result, Table
from bnbench.study.trial import Trial
from bnbench.study.verdicts import ClaimVerdict, Verdict

Shape = Literal["normal", "gamma", "exponential", "tied"]
_Array = npt.NDArray[np.float64]

#: The chance of any false verdict in a claim's family: what the judge is held to, whatever it thinks itself.
LEVEL = 0.05
#: A measured rate may miss its bound by this many standard errors of such a rate, since it is measured.
SLACK = 3.0
#: The paired standard deviation that the studies show, in units of δ (the median of their primary cells).
STUDIES_SD = 0.9
_CLAIM = "C"
_TWICE = "A/A"


@dataclass(frozen=True)
class World:
    """What is true in every table that is drawn from here.

    Two arms are compared in `cells` cells, all primary for one claim. `effects` are the true mean
    differences, repeated over the cells; `sd` is the standard deviation of a paired difference. `shape` is
    how the accuracy of each arm scatters: normal, gamma (shape 4), exponential, or tied (three values). The
    difference of two such arms is symmetric, as in an A/A study; where `skewed`, only one arm scatters and
    the differences have its skew. `correlation` is that of two cells.
    """

    effects: tuple[float, ...] = (0.0,)
    sd: float = STUDIES_SD
    shape: Shape = "normal"
    replicates: int = 10
    cells: int = 6
    kind: Literal["greater", "equivalent"] = "greater"
    skewed: bool = False
    correlation: float = 0.0

    @property
    def truth(self) -> tuple[float, ...]:
        """The true effect in each cell."""
        return tuple(self.effects[index % len(self.effects)] for index in range(self.cells))

    @property
    def is_same_arm_twice(self) -> bool:
        """Whether the two arms are one and the same (A/A)."""
        return not any(self.effects) and not self.skewed

    def __str__(self) -> str:
        effects = " and ".join("0" if e == 0 else "δ" if e == 1 else f"{e:g}δ" for e in self.effects)
        parts = [
            _TWICE if self.is_same_arm_twice else f"effect {effects}",
            f"{self.shape}, skewed" if self.skewed and self.shape in ("gamma", "exponential") else self.shape,
            f"sd {self.sd:g}δ",
            f"n = {self.replicates}",
            f"{self.cells} cell{'s' if self.cells > 1 else ''}",
            "equivalent" if self.kind == "equivalent" else "",
            f"correlated {self.correlation:g}" if self.correlation else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Outcome:
    """What the judge says of one table, beside the truth."""

    truth: tuple[float, ...]
    verdicts: tuple[Verdict, ...]
    claim: ClaimVerdict


def _misses(outcome: Outcome) -> float:
    return any(
        v.low is not None and v.high is not None and not v.low <= effect <= v.high
        for v, effect in zip(outcome.verdicts, outcome.truth, strict=True)
    )


def _any(outcome: Outcome, decision: str) -> float:
    return any(v.decision == decision for v in outcome.verdicts)


def _share(outcome: Outcome, decision: str) -> float:
    return sum(v.decision == decision for v in outcome.verdicts) / len(outcome.verdicts)


def _claim(outcome: Outcome, decision: str) -> float:
    return outcome.claim.decision == decision


def _holm(outcome: Outcome) -> float:
    return any(v.p_holm is not None and v.p_holm <= LEVEL for v in outcome.verdicts)


MISSES = "an interval misses the truth"
HOLM = "a p by sign-flip and Holm is .05 or less"
#: What can be counted in an outcome: 1 where it happened, 0 where not, of cells their share.
EVENTS: Mapping[str, Callable[[Outcome], float]] = {
    MISSES: _misses,
    HOLM: _holm,
    "a cell SUPPORTED": partial(_any, decision="SUPPORTED"),
    "a cell REFUTED": partial(_any, decision="REFUTED"),
    "share of cells SUPPORTED": partial(_share, decision="SUPPORTED"),
    "share of cells REFUTED": partial(_share, decision="REFUTED"),
    "claim SUPPORTED": partial(_claim, decision="SUPPORTED"),
    "claim REFUTED": partial(_claim, decision="REFUTED"),
    "claim MIXED": partial(_claim, decision="MIXED"),
}


@dataclass(frozen=True)
class Promise:
    """How often, in tables of a world, an event happens at most, or at least."""

    world: World
    event: str
    bound: float
    side: Literal["at most", "at least"] = "at most"


@dataclass(frozen=True)
class Rate:
    """How often something happened, and the border that the rate may not cross: the bound and its slack."""

    truth: str
    event: str
    rate: float
    tables: int
    bound: float
    side: Literal["at most", "at least"]

    @property
    def border(self) -> float:
        """The bound, moved by SLACK standard errors √(bound (1 − bound)/tables)."""
        slack = SLACK * math.sqrt(self.bound * (1 - self.bound) / self.tables)
        return self.bound + slack if self.side == "at most" else self.bound - slack

    @property
    def is_kept(self) -> bool:
        """Whether the rate is on the right side of its border."""
        return self.rate <= self.border if self.side == "at most" else self.rate >= self.border


#: How often Student's interval at .95 misses the mean of 5, 10 and 20 values.
_KNOWN_MISSES: Mapping[Shape, tuple[float, float, float]] = {
    "normal": (0.05, 0.05, 0.05),
    "tied": (0.045, 0.05, 0.06),
    "gamma": (0.07, 0.065, 0.06),
    "exponential": (0.12, 0.10, 0.085),
}


def _promises() -> Iterator[Promise]:
    """All that is promised of the judge, and what it is known to miss."""
    # The same arm twice: whatever the family, the noise or n, a difference is found in 5 % of the tables.
    twice = [World(cells=cells) for cells in (1, 4, 6, 12)]
    twice += [World(replicates=n) for n in (5, 20)]
    twice += [World(shape=shape) for shape in ("gamma", "exponential", "tied")]
    twice += [World(correlation=0.5)]
    for world in twice:
        yield Promise(world, MISSES, LEVEL)
    for event in (HOLM, "a cell SUPPORTED", "claim SUPPORTED", "claim MIXED"):
        yield Promise(World(), event, LEVEL)
    yield Promise(World(replicates=20), "share of cells REFUTED", 0.9, "at least")
    # At the border: an effect of just δ is not too small, and not negligible.
    yield Promise(World((1.0,)), "a cell REFUTED", LEVEL)
    yield Promise(World((1.0,), sd=0.3, kind="equivalent"), "a cell SUPPORTED", LEVEL)
    yield Promise(World((1.0,), sd=0.3, kind="equivalent"), "a cell REFUTED", LEVEL)
    # Planted effects are found.
    yield Promise(World((1.0,)), "share of cells SUPPORTED", 0.5, "at least")
    yield Promise(World((2.0,)), "share of cells SUPPORTED", 0.9, "at least")
    yield Promise(World((2.0,)), "claim SUPPORTED", 0.9, "at least")
    yield Promise(World(sd=0.3, kind="equivalent"), "share of cells SUPPORTED", 0.9, "at least")
    yield Promise(World((2.0,), sd=0.5, kind="equivalent"), "share of cells REFUTED", 0.9, "at least")
    yield Promise(World((2.0, 0.0), sd=0.5), "claim MIXED", 0.9, "at least")
    # One interval alone. Student's t is known to cover less where differences are skewed.
    for shape, misses in _KNOWN_MISSES.items():
        for n, bound in zip((5, 10, 20), misses, strict=True):
            yield Promise(World((0.7,), 1.0, shape, n, cells=1, skewed=True), MISSES, bound)


PROMISES: tuple[Promise, ...] = tuple(_promises())


def measure_rates(promises: Iterable[Promise], tables: int, seed: int = 0) -> tuple[Rate, ...]:
    """The rates of promises over that many tables of each world; each world is drawn once."""
    by_world: dict[World, list[Promise]] = {}
    for promise in promises:
        by_world.setdefault(promise.world, []).append(promise)
    rates = []
    for world, of_world in by_world.items():
        happened = [0.0] * len(of_world)
        for outcome in outcomes(world, tables, seed):
            for index, promise in enumerate(of_world):
                happened[index] += EVENTS[promise.event](outcome)
        rates += [
            Rate(str(world), p.event, count / tables, tables, p.bound, p.side)
            for p, count in zip(of_world, happened, strict=True)
        ]
    return tuple(rates)


def pool_twice(rates: Iterable[Rate]) -> Rate:
    """False differences over all A/A tables together: the same rate, measured most precisely."""
    twice = [rate for rate in rates if rate.truth.startswith(_TWICE) and rate.event == MISSES]
    tables = sum(rate.tables for rate in twice)
    mean = sum(rate.rate * rate.tables for rate in twice) / tables
    return Rate(f"{_TWICE}, all of these tables", MISSES, mean, tables, LEVEL, "at most")


def outcomes(world: World, tables: int, seed: int) -> Iterator[Outcome]:
    """Draw tables from a world and judge each."""
    study = _study(world)
    sizes = {_CLAIM: world.cells}
    for accuracies in draw(world, tables, seed):
        verdicts = judge(study, "quick", _table(study, accuracies), sizes, bootstrap=False)
        verdicts = adjust(verdicts, sizes)
        yield Outcome(world.truth, verdicts, judge_claim(_CLAIM, verdicts))


def draw(world: World, tables: int, seed: int) -> _Array:
    """Accuracies in percent: tables x cells x replicates x arms, of which the second has the effect."""
    generator = np.random.default_rng([seed, crc32(str(world).encode())])
    shared = _noise(world.shape, (tables, 1, world.replicates, 2), generator)
    own = _noise(world.shape, (tables, world.cells, world.replicates, 2), generator)
    noise = math.sqrt(world.correlation) * shared + math.sqrt(1 - world.correlation) * own
    if world.skewed:
        noise[..., 0] = 0.0
    else:
        noise /= math.sqrt(2)
    noise *= world.sd
    noise[..., 1] += np.asarray(world.truth)[:, None]
    return 90 + noise


def _study(world: World) -> Study:
    """A study whose effect is a difference of two arms in percentage points, with δ = 1."""
    hypothesis = Hypothesis(
        name="h",
        claim=_CLAIM,
        sentence="The one arm is better than the other.",
        estimand=partial(accuracy_difference, better="batch", other="none"),
        delta=1.0,
        better=("batch",),
        other=("none",),
        kind=world.kind,
    )
    cells = tuple(Cell(f"cell-{index}") for index in range(world.cells))
    arms = (Arm("none", norm="none"), Arm("batch"))
    design = Design(Trial(), cells, arms, lr=(0.01, 0.1, 1.0), replicates=world.replicates)
    return Study("errors", "How often does the judge err?", (hypothesis,), design, design, baseline="none")


_ROW = Trial(lr=0.1)


def _table(study: Study, accuracies: _Array) -> Table:
    """The confirmed rows of both arms; `accuracies` are by cell, replicate and arm, in percent."""
    entries = [
        Entry(cell.name, arm.name, replicate, "own", _ROW, _result(float(accuracies[c, replicate, a])))
        for c, cell in enumerate(study.quick.cells)
        for replicate in range(study.quick.replicates)
        for a, arm in enumerate(study.quick.arms)
    ]
    return Table(tuple(entries))


def _result(percent: float) -> Result:
    return Result("done", {"test/acc": percent / 100, "val/acc": 0.9, "train/acc": 0.99, "chance": 0.1})


def _noise(shape: Shape, size: tuple[int, ...], generator: np.random.Generator) -> _Array:
    """Independent draws with mean 0 and standard deviation 1."""
    if shape == "normal":
        return generator.standard_normal(size)
    if shape == "gamma":
        return generator.gamma(4.0, 0.5, size) - 2.0
    if shape == "exponential":
        return generator.exponential(1.0, size) - 1.0
    return generator.integers(-1, 2, size).astype(np.float64) * math.sqrt(1.5)
